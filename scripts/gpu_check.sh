#!/usr/bin/env bash
# On a machine with a GPU: kernel and self-check tests, both benchmarks, the loader's table. Without one: small sizes.
#   scripts/gpu_check.sh OUT_FOLDER [IMAGE_FOLDER]
# PYTHON names the interpreter (default: python3), with torch 2.11 or newer. Writes JSON, PNG and log files to OUT_FOLDER,
# and a line for each part at the end. A part that fails does not stop the others; the exit code is then 1.
set -uo pipefail
out=$(mkdir -p "${1:?give a folder for the results}" && cd "$1" && pwd)
images=${2:+$(cd "$2" && pwd)}
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH="$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH}"
summary=()

part() { # part NAME SECONDS COMMAND...
    local name=$1 limit=$2
    shift 2
    if timeout "$limit" "$@" >"$out/$name.log" 2>&1; then
        summary+=("ok       $name")
    else
        summary+=("failed   $name (exit code $?; see $name.log)")
        failed=1
    fi
}

failed=0
if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    sizes=(--size 224 --batch 512 --precision bf16 --repeats 1)
    variants=(--only fused eager timm-eager timm-compiled)
    part kernels 90 "$python" -m pytest -q -p no:cacheprovider tests/models/test_kernels_gpu.py
else
    summary+=("skipped  kernels on a GPU: there is none; small sizes on the CPU")
    sizes=(--size 32 --batch 2 --precision fp32 --repeats 1 --steps 2 --uncounted 1)
    variants=(--only fused eager timm-eager)
fi
part fused 60 "$python" -m pytest -q -p no:cacheprovider tests/models/test_fused.py
part train 150 "$python" scripts/benchmark_train.py "${sizes[@]}" "${variants[@]}" \
    --json "$out/train.json" --plot "$out/train.png"
part inference 60 "$python" scripts/benchmark_train.py "${sizes[@]}" --only fused timm-eager --inference \
    --json "$out/inference.json"
if [ -n "$images" ]; then
    part loader 110 "$python" scripts/benchmark_loader.py "$images" --repeats 1 --json "$out/loader.json"
else
    summary+=("skipped  loader: no image folder was given")
fi
"$python" -c 'import nvidia.dali' 2>"$out/dali.log" || summary+=("skipped  DALI: nvidia-dali is not installed")
cat "$out"/train.log "$out"/inference.log
printf '%s\n' "${summary[@]}" | tee "$out/summary.txt"
exit "$failed"
