#!/bin/bash
# The checks and measurements that need a GPU, the most telling first. Results go to the folder $OUT.
#
#     OUT=results bash benchmarks/on_gpu.sh correct     attention, CUDA graphs and bits beside the CPU (minutes)
#     OUT=results bash benchmarks/on_gpu.sh small       the engine beside its peers on the middle shape
#     OUT=results bash benchmarks/on_gpu.sh full        the full 6B shape in bfloat16: speed and memory
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
# torch, transformers and pytest are enough: neither glmbatch nor Prefect needs to be installed.
export PYTHONPATH=$PWD
mkdir -p "$OUT"
case ${1:-correct} in
correct)
    # With tests/unit/glm as the root of fixtures, since tests/conftest.py imports pydantic and more.
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
