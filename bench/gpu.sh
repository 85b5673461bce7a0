#!/usr/bin/env bash
# Builds, tests and measures everything on one NVIDIA GPU in one command, and writes bench/results/<gpu>-<date>.json.
#
# Needs python with torch for CUDA, triton, numpy, pytest, pybind11, typer, rich and tqdm; for the last part diffusers and
# safetensors. Wheels in wheels/ are installed first, without a network. A part that fails is reported, the others still
# run, and the exit status is 1. All of it takes at most LIMIT seconds (470): a part that would run longer is stopped.
# Results and a log are also copied to the folder OUT, if that is set.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-}
LIMIT=${LIMIT:-470}
export PYTHONPATH="$PWD" TOKENIZERS_PARALLELISM=false TQDM_DISABLE=1
failed=()
if [ -n "$OUT" ]; then exec > >(tee "$OUT/gpu.log") 2>&1; fi

part() { # name, seconds at most, command...
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    if ((limit > LIMIT - SECONDS)); then limit=$((LIMIT - SECONDS)); fi
    echo "== $name"
    if ((limit < 1)); then
        echo "-- $name: FAILED, no time is left"
        failed+=("$name")
    elif timeout --kill-after 5 "$limit" "$@"; then
        echo "-- $name: $((SECONDS - start)) s"
    else
        echo "-- $name: FAILED after $((SECONDS - start)) s"
        failed+=("$name")
    fi
}

# Every case once, many at a time: what torch.compile and Triton make of it is on the disk when it is measured.
compile_ahead() {
    "$PYTHON" -c "
from layercache.benchmarks.cases import CASES
print(*(case.name for case in CASES), sep='\n')" |
        timeout 120 xargs -P "$(($(nproc) / 2 + 1))" -d '\n' -I{} \
            "$PYTHON" -m layercache.cli bench kernels --device cuda --op {} --rounds 1 >/dev/null 2>&1
}

if compgen -G "wheels/*.whl" >/dev/null; then
    part "wheels" 60 "$PYTHON" -m pip install --quiet --no-index --no-deps --break-system-packages wheels/*.whl
fi
part "build" 150 "$PYTHON" setup.py --quiet build_ext --inplace --parallel 3
part "machine" 60 "$PYTHON" -c "
import torch, triton
assert torch.cuda.is_available(), 'torch sees no GPU'
print(torch.cuda.get_device_name(), '| torch', torch.__version__, '| triton', triton.__version__)"

gpu=$("$PYTHON" -c "import torch; print(torch.cuda.get_device_name().lower().replace(' ', '-'))" 2>/dev/null || echo gpu)
result="bench/results/$gpu-$(date -u +%Y-%m-%d).json"
mkdir -p bench/results

workers=()
if "$PYTHON" -c "import xdist" 2>/dev/null; then workers=(--numprocesses 6 --dist worksteal); fi
compile_ahead &
ahead=$!
part "tests" 180 "$PYTHON" -m pytest -q --tb=short --maxfail=20 "${workers[@]}" tests/gpu
wait "$ahead"

kernels() { # name, seconds, file, option...
    local name=$1 limit=$2 file=$3
    shift 3
    # what was measured is written before the part is stopped, also where little time is left
    if ((limit > LIMIT - SECONDS - 25)); then limit=$((LIMIT - SECONDS - 25)); fi
    if ((limit < 0)); then limit=0; fi
    part "$name" "$((limit + 20))" "$PYTHON" -m layercache.cli bench kernels --device cuda --rounds 5 \
        --time-limit "$limit" --json "$file" "$@"
}
# 25 MB a tensor in bf16, with torch.compile; then 1, 100 and 340 MB without, whose compilation takes minutes
kernels "kernels" 120 "$result"
if "$PYTHON" -c "import diffusers" 2>/dev/null; then
    part "end to end" 60 "$PYTHON" bench/end_to_end.py --batch 64 --rounds 3 --json "${result%.json}-end-to-end.json"
else
    echo "== end to end: left out, diffusers is not installed"
fi
kernels "kernels, other sizes" 90 "${result%.json}-sizes.json" --no-compile \
    --shape 1x512x1024 --shape 1x8192x6144 --shape 1x32768x5120

if [ -n "$OUT" ]; then cp -f bench/results/"$gpu"-*.json "$OUT"/ 2>/dev/null; fi
if [ ${#failed[@]} -gt 0 ]; then
    echo "FAILED: ${failed[*]}"
    exit 1
fi
echo "all parts passed; figures: $result"
