#!/usr/bin/env bash
# Runs the kernels' tests, both benchmarks and training from JPEGs on a machine with a GPU, in under 10 minutes. Without
# a GPU it runs the same with small sizes, as a rehearsal.
#   scripts/gpu_check.sh OUT_FOLDER [IMAGE_FOLDER]
# IMAGE_FOLDER contains class folders of JPEGs. PYTHON is the interpreter (default: python3); it needs torch 2.11 or newer
# and torchvision, as in PyTorch's and NVIDIA's container images. Other missing packages are installed in the versions of
# requirements.txt, into PYTHON's virtual environment or, if it is not in one, into the new OUT_FOLDER/venv.
# Writes JSON, PNG and log files to OUT_FOLDER, and summary.txt with date, commit, device and a line for each part. If a
# part fails, the others still run and the exit code is 1.
set -uo pipefail
if [[ ${1-} == -* || $# -eq 0 || $# -gt 2 ]]; then
  sed -n '2,/^set /{s/^# \{0,1\}//p}' "$0"
  [[ ${1-} == -h || ${1-} == --help ]] && exit
  exit 2
fi
out=$(mkdir -p "$1" && cd "$1" && pwd) || exit 2
images=
if [[ -n ${2-} ]]; then
  images=$(cd "$2" && pwd) || exit 2
fi
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
export PYTHONPATH="$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH}"
for module in torch torchvision; do
  if ! "$python" -c "import $module"; then
    echo "error: $python cannot import $module; set PYTHON to an interpreter that can" >&2
    exit 2
  fi
done
missing=$("$python" - hydra:hydra-core omegaconf timm rich safetensors huggingface_hub httpx2 PIL:pillow numpy matplotlib \
  pytest pytest_timeout:pytest-timeout <<'END'
import importlib.util, re, sys

lines = [re.match(r"([\w.-]+)==[\w.]+", line) for line in open("requirements.txt")]
pins = {pin[1]: pin[0] for pin in lines if pin}
for name in sys.argv[1:]:
    module, _, package = name.partition(":")
    if importlib.util.find_spec(module) is None:
        print(pins[package or module])
END
) || exit 2
if [[ -n $missing ]]; then
  mapfile -t missing <<<"$missing"
  # From package metadata, because torch.__version__ may have a suffix that the metadata lacks.
  "$python" -c 'from importlib.metadata import version
for name in ("torch", "torchvision"): print(f"{name}=={version(name)}")' >"$out/constraints.txt" || exit 2
  in_venv=$("$python" -c 'import sys; print(int(sys.prefix != sys.base_prefix))')
  if ((in_venv)) || { "$python" -m venv --system-site-packages "$out/venv" && python=$out/venv/bin/python; }; then
    "$python" -m pip install --constraint "$out/constraints.txt" "${missing[@]}"
  fi >"$out/install.log" 2>&1
  if ! "$python" -c 'import hydra, omegaconf, timm, rich, matplotlib, pytest, pytest_timeout' 2>>"$out/install.log"; then
    echo "error: cannot install the missing packages (see $out/install.log): ${missing[*]}" >&2
    exit 2
  fi
fi
failed=0
summary=("date     $(date --utc --iso-8601=seconds)" "commit   $(git describe --always --dirty 2>/dev/null || echo unknown)")
device=$("$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")') || exit 2
summary+=("device   ${device:-CPU}" "torch    $("$python" -c 'import torch; print(torch.__version__)')")

part() { # part NAME SECONDS COMMAND...
  local name=$1 limit=$2
  shift 2
  [[ -n $device ]] || limit=600 # a CPU is slow
  if timeout "$limit" "$@" >"$out/$name.log" 2>&1; then
    summary+=("ok       $name")
  else
    summary+=("failed   $name (exit code $?; see $name.log)")
    failed=1
  fi
}

tests=("$python" -m pytest -p no:cacheprovider)
if [[ -n $device ]]; then
  sizes=(--size 224 --batch 512 --precision bf16 --repeats 1 --loaded)
  ours=fused variants=(--only fused eager timm-eager timm-compiled)
  loading=(--repeats 1)
  part kernels 80 "${tests[@]}" tests/models/test_kernels_gpu.py tests/data/device/test_triton_kernel_gpu.py
else
  sizes=(--size 32 --batch 2 --precision fp32 --repeats 1 --steps 2 --uncounted 1 --loaded)
  ours=eager variants=(--only eager timm-eager)
  loading=(--repeats 1 --images 40 --batch 4)
  summary+=("skipped  kernels: there is no GPU; the other parts use small sizes")
fi
part operators 120 "${tests[@]}" tests/models/test_operators.py -k "not interpreted"
part fused 40 "${tests[@]}" tests/models/test_fused.py
part train 190 "$python" -m benchmarks.train "${sizes[@]}" "${variants[@]}" \
  --json "$out/train.json" --plot "$out/train.png"
part inference 40 "$python" -m benchmarks.train "${sizes[@]}" --only "$ours" timm-eager --inference \
  --json "$out/inference.json"
loaders=(torch timm)
if "$python" -c 'import nvidia.dali' 2>"$out/dali.log"; then
  loaders+=(dali)
else
  summary+=("skipped  DALI: nvidia-dali is not installed; only the torch and timm loaders are measured")
fi
if [[ -n $images ]]; then
  part jpegs 50 "$python" -m benchmarks.train "${sizes[@]}" --only "$ours" --workers "$(nproc)" --data "$images" \
    --json "$out/jpegs.json"
  part loader 70 "$python" -m benchmarks.loader "$images" "${loading[@]}" --only "${loaders[@]}" \
    --json "$out/loader.json"
else
  summary+=("skipped  jpegs, loader: no image folder was given")
fi
cat "$out"/train.log "$out"/inference.log
for log in "$out"/{jpegs,loader}.log; do
  [[ ! -f $log ]] || cat "$log"
done
printf '%s\n' "${summary[@]}" | tee "$out/summary.txt"
exit "$failed"
