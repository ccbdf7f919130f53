#!/usr/bin/env bash
# On a machine with a GPU, in under 8 minutes: the kernels' tests, both benchmarks, training from JPEGs. Without a GPU the
# same with small sizes: a rehearsal.
#   scripts/gpu_check.sh OUT_FOLDER [IMAGE_FOLDER]
# IMAGE_FOLDER holds class folders of JPEGs. PYTHON names the interpreter (default: python3), with torch 2.11 or newer.
# Writes JSON, PNG and log files to OUT_FOLDER, and summary.txt: what was measured where, and a line for each part. A part
# that fails does not stop the others; the exit code is then 1.
set -uo pipefail
out=$(mkdir -p "${1:?give a folder for the results}" && cd "$1" && pwd) || exit 2
images=
if [[ -n ${2-} ]]; then
  images=$(cd "$2" && pwd) || exit 2
fi
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
export PYTHONPATH="$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH}"
failed=0
summary=("date     $(date --utc --iso-8601=seconds)" "commit   $(git describe --always --dirty 2>/dev/null || echo unknown)")
device=$("$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")') || exit 2
summary+=("device   ${device:-CPU}" "torch    $("$python" -c 'import torch; print(torch.__version__)')")

part() { # part NAME SECONDS COMMAND...
  local name=$1 limit=$2
  shift 2
  [[ -n $device ]] || limit=600 # a rehearsal takes its time
  if timeout "$limit" "$@" >"$out/$name.log" 2>&1; then
    summary+=("ok       $name")
  else
    summary+=("failed   $name (exit code $?; see $name.log)")
    failed=1
  fi
}

tests=("$python" -m pytest -p no:cacheprovider)
if [[ -n $device ]]; then
  sizes=(--size 224 --batch 512 --precision bf16 --repeats 1)
  variants=(--only fused eager timm-eager timm-compiled)
  loading=(--repeats 1)
  part kernels 80 "${tests[@]}" tests/models/test_kernels_gpu.py tests/data/test_triton_transform_gpu.py
else
  sizes=(--size 32 --batch 2 --precision fp32 --repeats 1 --steps 2 --uncounted 1)
  variants=(--only fused eager timm-eager)
  loading=(--repeats 1 --images 40 --batch 4)
  summary+=("skipped  kernels: there is no GPU, and the sizes are small")
fi
part fused 40 "${tests[@]}" tests/models/test_fused.py
part train 190 "$python" scripts/benchmark_train.py "${sizes[@]}" "${variants[@]}" \
  --json "$out/train.json" --plot "$out/train.png"
part inference 40 "$python" scripts/benchmark_train.py "${sizes[@]}" --only fused timm-eager --inference \
  --json "$out/inference.json"
loaders=(torch timm)
if "$python" -c 'import nvidia.dali' 2>"$out/dali.log"; then
  loaders+=(dali)
else
  summary+=("skipped  DALI: nvidia-dali is not installed; the loaders are torch's and timm's")
fi
if [[ -n $images ]]; then
  part jpegs 50 "$python" scripts/benchmark_train.py "${sizes[@]}" --only fused --workers "$(nproc)" --data "$images" \
    --json "$out/jpegs.json"
  part loader 70 "$python" scripts/benchmark_loader.py "$images" "${loading[@]}" --only "${loaders[@]}" \
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
