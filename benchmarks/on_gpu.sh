#!/bin/bash
# Checks and measurements that need a GPU, the most important first. Results go to the folder $OUT.
#
#     OUT=results bash benchmarks/on_gpu.sh correct     answers compared with the CPU, CUDA graphs, same bits in any batch (minutes)
#     OUT=results bash benchmarks/on_gpu.sh small       the engine compared with transformers on the middle shape
#     OUT=results bash benchmarks/on_gpu.sh full        speed and memory of the full 6B shape in bfloat16
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
# Only torch, transformers and pytest are needed. glmbatch and Prefect need not be installed.
export PYTHONPATH=$PWD
mkdir -p "$OUT"
case ${1:-correct} in
correct)
    # --confcutdir skips tests/conftest.py, which imports pydantic and more.
    files=$(grep -lr --include='test_*.py' 'mark.gpu' tests/unit/glm)
    "$python" -m pytest -p no:cacheprovider --confcutdir tests/unit/glm -W default -m gpu $files 2>&1 | tee "$OUT/correct.log"
    ;;
small) "$python" benchmarks/engine.py --shape mid --dtype bfloat16 --device cuda --rows 256 --peers transformers | tee "$OUT/small.log" ;;
full) "$python" benchmarks/engine.py --shape 6b --dtype bfloat16 --device cuda --rows 1024 --peers transformers | tee "$OUT/full.log" ;;
*) sed -n '2,6p' "$0" && exit 2 ;;
esac
if command -v nvidia-smi >/dev/null; then
    nvidia-smi --query-gpu=name,memory.used,memory.total --format=csv | tee "$OUT/device.csv"
fi
