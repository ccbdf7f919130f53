# Functions shared by the batch scripts, which source this file from the repository's root.
#
#   start_program PROGRAM ARGUMENTS...   run one torchrun per node under srun; returns when they have ended
#   finish                               requeue the job or exit, depending on how the program ended
#
# Exit codes of a job: 0: done. 75: interrupted, and either cancelled or out of requeues; the same command resumes. Any
# other: failed. A job that is requeued has no exit code.
set -euo pipefail

fail() {
  echo "error: $*" >&2
  exit 2
}

[[ -n ${SLURM_JOB_ID-} ]] || fail "SLURM_JOB_ID: not set, so this is not a SLURM job; submit it: sbatch slurm/train.sbatch ..."
[[ -f train.py ]] || fail "no train.py in $PWD; submit from the repository's root, or add --chdir=ROOT"

# Site settings: see site.example.env.
METAFORMER_TORCHRUN=()
METAFORMER_PYTHON=()
METAFORMER_SRUN_OPTIONS=()
if [[ -f slurm/site.env ]]; then
  # shellcheck source=slurm/site.example.env
  source slurm/site.env
fi
bin=
[[ ! -x .venv/bin/torchrun ]] || bin=$PWD/.venv/bin/
((${#METAFORMER_TORCHRUN[@]})) || METAFORMER_TORCHRUN=("${bin}torchrun")
((${#METAFORMER_PYTHON[@]})) || METAFORMER_PYTHON=("${bin}python3")
command -v "${METAFORMER_TORCHRUN[0]}" >/dev/null ||
  fail "${METAFORMER_TORCHRUN[0]}: not found; run make install, or set METAFORMER_TORCHRUN in slurm/site.env"

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # torchrun sets the same, but prints a long warning
if [[ -n ${SLURM_CPUS_PER_TASK-} ]]; then
  export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # recent versions of srun do not inherit it from sbatch
fi
# Here train.py writes how it ended, because torchrun does not pass on exit codes. Rank 0 may run on any node.
export METAFORMER_STATUS_FILE=$PWD/runs/.slurm/$SLURM_JOB_ID.json
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120} # seconds in which workers can save

warned=
program=
code=0

# SLURM's warning reaches only this shell. Forward it to torchrun as TERM, which torchrun passes to its workers; USR1
# would kill torchrun.
warn() {
  signalled=1
  [[ -z $warned ]] || return 0
  warned=1
  [[ -z $program ]] || scancel --signal=TERM "$SLURM_JOB_ID" || true
}
trap warn USR1
trap 'signalled=1 warned=1' TERM # at a preemption; SLURM sends it to the steps too

# Choose the first free port from one that depends on the job's number, below Linux's ephemeral ports.
choose_port() {
  local tried
  for ((tried = 0; tried < 20; tried++)); do
    port=$((10000 + (SLURM_JOB_ID + tried) % 20000))
    grep -qiE ":$(printf %04X "$port") [0-9A-F]+:0000 0A " /proc/net/tcp /proc/net/tcp6 2>/dev/null || return 0
    echo "port $port is in use on $(hostname)" >&2
  done
  fail "ports $((port - 19)) to $port are in use on $(hostname); stop the programs that listen there, or exclude the node"
}

start_program() {
  local hosts first_host port
  hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
  first_host=${hosts%%$'\n'*}
  choose_port
  mkdir -p "${METAFORMER_STATUS_FILE%/*}" || fail "$PWD/runs: cannot be written; submit from a folder that you own"
  rm -f "$METAFORMER_STATUS_FILE"
  # No restarts by torchrun, because SLURM requeues. In the background, because traps wait for foreground commands.
  srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 \
    "${METAFORMER_SRUN_OPTIONS[@]}" \
    "${METAFORMER_TORCHRUN[@]}" --nnodes="$SLURM_JOB_NUM_NODES" \
    --nproc_per_node="${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}" \
    --rdzv_backend=c10d --rdzv_endpoint="$first_host:$port" --rdzv_id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" \
    --max_restarts=0 "$@" &
  program=$!
  signalled=1
  while [[ -n $signalled ]]; do # a signal interrupts `wait`
    signalled=
    code=0
    wait "$program" || code=$?
  done
}

state() {
  [[ ! -f $METAFORMER_STATUS_FILE ]] || sed -n 's/.*"state": *"\([a-z]*\)".*/\1/p' "$METAFORMER_STATUS_FILE"
}

# Not `scontrol | grep -q`: grep exits at the first match, and with pipefail the SIGPIPE of scontrol would be a failure.
job_is() {
  [[ " $(scontrol --oneliner show job "$SLURM_JOB_ID") " == *" "$1* ]]
}

preempted() {
  job_is "PreemptTime=[0-9]"
}

cancelled() { # by the user, so it is not requeued
  ! job_is "JobState=RUNNING "
}

# Requeue an interrupted job. SLURM itself does so only if a job does not end in time or a node is lost.
finish() {
  local state restarts=${SLURM_RESTART_COUNT:-0} max_requeues=${METAFORMER_MAX_REQUEUES:-50}
  state=$(state)
  rm -f "$METAFORMER_STATUS_FILE"
  if ((code == 0)) || [[ $state == "done" ]]; then # a signal may reach torchrun after the program is done
    exit 0
  fi
  if ((code == 128 + 15)); then # torchrun got SIGTERM before it could pass it to the workers
    warned=1
  fi
  if [[ $state != interrupted && (-z $warned || $state == failed) ]] && ! preempted; then
    echo "job $SLURM_JOB_ID: failed" >&2
    exit "$code"
  fi
  if cancelled; then
    echo "job $SLURM_JOB_ID: interrupted and cancelled; the same command resumes it" >&2
    exit 75
  fi
  if ((restarts >= max_requeues)); then
    echo "job $SLURM_JOB_ID: interrupted, and already requeued $restarts times (METAFORMER_MAX_REQUEUES=$max_requeues)" >&2
    exit 75
  fi
  echo "job $SLURM_JOB_ID: interrupted; requeue $((restarts + 1))" >&2
  scontrol requeue "$SLURM_JOB_ID" || exit 75
  exit 75
}
