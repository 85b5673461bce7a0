#!/usr/bin/env bash
# Builds, tests and measures everything on one NVIDIA GPU in one command, and writes bench/results/<gpu>-<date>.json.
#
# Needs python with torch for CUDA, triton, numpy, pytest, pybind11, typer, rich and tqdm; for the last part diffusers and
# safetensors. Wheels in wheels/ are installed first, without a network. A part that fails is reported, the others still run, and the exit status is 1.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-}
export PYTHONPATH="$PWD" TOKENIZERS_PARALLELISM=false
failed=()

part() { # name, command...
    local name=$1 start=$SECONDS
    shift
    echo "== $name"
    if "$@"; then echo "-- $name: $((SECONDS - start)) s"; else
        echo "-- $name: FAILED after $((SECONDS - start)) s"
        failed+=("$name")
    fi
}

if compgen -G "wheels/*.whl" >/dev/null; then
    part "wheels" "$PYTHON" -m pip install --quiet --no-index --no-deps --break-system-packages wheels/*.whl
fi
part "build" "$PYTHON" setup.py --quiet build_ext --inplace --parallel 3
part "machine" "$PYTHON" -c "
import torch, triton
assert torch.cuda.is_available(), 'torch sees no GPU'
print(torch.cuda.get_device_name(), '| torch', torch.__version__, '| triton', triton.__version__)"

gpu=$("$PYTHON" -c "import torch; print(torch.cuda.get_device_name().lower().replace(' ', '-'))" 2>/dev/null || echo gpu)
result="bench/results/$gpu-$(date -u +%Y-%m-%d).json"
mkdir -p bench/results

part "tests" timeout 240 "$PYTHON" -m pytest -q --maxfail=20 tests/gpu
# 25 MB a tensor in bf16, with torch.compile; then 1, 100 and 340 MB without, whose compilation takes minutes
part "kernels" timeout 200 "$PYTHON" -m layercache.cli bench kernels --device cuda --rounds 5 --json "$result"
part "kernels, other sizes" timeout 120 "$PYTHON" -m layercache.cli bench kernels --device cuda --rounds 5 --no-compile \
    --json "${result%.json}-sizes.json" --shape 1x512x1024 --shape 1x8192x6144 --shape 1x32768x5120
if "$PYTHON" -c "import diffusers" 2>/dev/null; then
    part "end to end" timeout 120 "$PYTHON" bench/end_to_end.py --batch 64 --rounds 3 --json "${result%.json}-end-to-end.json"
else
    echo "== end to end: left out, diffusers is not installed"
fi

if [ -n "$OUT" ]; then cp -f bench/results/"$gpu"-*.json "$OUT"/ 2>/dev/null; fi
if [ ${#failed[@]} -gt 0 ]; then
    echo "FAILED: ${failed[*]}"
    exit 1
fi
echo "all parts passed; figures: $result"
