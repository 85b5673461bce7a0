#!/usr/bin/env bash
# Tests and measures everything on one NVIDIA GPU in one command; bench/results/<card>-<date>-*.json is what it found.
#
#   bash bench/gpu.sh               the run itself, 560 seconds at the most (--limit); --help tells the rest
#   bash bench/gpu.sh --tiny        every part on a CPU at tiny sizes, in a few minutes
#   bash bench/gpu.sh --simulate    when each part would begin and end, without running any
#
# Needs python with torch for CUDA, triton, numpy, pytest, pybind11, typer, rich, tqdm and safetensors; pytest-xdist makes
# the tests faster. For the parts of whole models diffusers, and cache-dit to be compared with.
#
# On a machine without a network, carry along what it lacks:
#   wheels/*.whl                     packages, put in front of PYTHONPATH's (pip download --no-deps -d wheels
#                                    --python-version 3.12 --only-binary=:all: diffusers cache-dit importlib_metadata)
#   layercache/_*.cpython-312-*.so   the extensions for its Python (python3.12 setup.py build_ext --inplace); built there
#                                    otherwise, which takes a minute
# Tree, wheels and extensions are 45 MB.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false TQDM_DISABLE=1
if compgen -G "wheels/*.whl" >/dev/null; then
    site=$(mktemp -d)
    if "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" wheels/*.whl; then
        PYTHONPATH="$PYTHONPATH:$site"
    fi
fi
if [ -n "${OUT:-}" ]; then
    mkdir -p "$OUT"
    "$PYTHON" bench/gpu_run.py "$@" 2>&1 | tee "$OUT/gpu.log"
else
    "$PYTHON" bench/gpu_run.py "$@"
fi
