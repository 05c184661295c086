#!/bin/bash
# Checks and measurements that need a GPU, in parts of less than ten minutes. Results go to the folder $OUT.
#
#     OUT=results bash benchmarks/on_gpu.sh correct     answers compared with the CPU, CUDA graphs, same bits in any batch
#     OUT=results bash benchmarks/on_gpu.sh kernels     what the GPU's kernels reach: attention, products, head, sampling
#     OUT=results bash benchmarks/on_gpu.sh step        one forward of the engine, and a profile of what it runs
#     OUT=results bash benchmarks/on_gpu.sh engine      the engine over 4,096 rows: all tasks, one after the other
#     OUT=results bash benchmarks/on_gpu.sh memory      what a closed engine leaves, a second load, too little memory
#     OUT=results bash benchmarks/on_gpu.sh fp8         8-bit products beside bfloat16: speed, and how many answers they change
#     OUT=results bash benchmarks/on_gpu.sh vllm        vLLM over the same rows; it must be installed
#
# Further arguments go to the part's script: engine --task generate --slots 1024 --rows 2048
# CPU=1 tries a part without a GPU, on a tiny model; fp8 then runs as int8.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
part=${1:-correct}
shift || true
# Only torch, transformers and pytest are needed. glmbatch and Prefect need not be installed.
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
mkdir -p "$OUT"
small=()
if [ -n "${CPU:-}" ]; then
    small=(--shape tiny --device cpu --dtype float32 --rows 4)
fi

# The 6B shape with weights made on the GPU, one contestant at a time, each written to the file when it ends.
engine() {
    "$python" benchmarks/engine.py --shape 6b --dtype bfloat16 --device cuda --rounds 1 --seconds 540 --alone --build seed \
        --rows 4096 --answers 58,4,256 --threads 0 --cache "${CACHE:-/tmp/glmbatch-benchmarks}" \
        --out "$OUT/$part.jsonl" "${small[@]}" "$@" 2>&1 | tee "$OUT/$part.log"
}

case $part in
correct)
    # --confcutdir skips tests/conftest.py, which imports pydantic and more.
    files=$(grep -lr --include='test_*.py' 'mark.gpu' tests/unit/glm)
    "$python" -m pytest -p no:cacheprovider --confcutdir tests/unit/glm -W default -m gpu $files "$@" 2>&1 | tee "$OUT/correct.log"
    ;;
kernels | step | memory)
    timeout 540 "$python" "benchmarks/$part.py" --out "$OUT/$part.jsonl" "${small[@]}" "$@" 2>&1 | tee "$OUT/$part.log"
    ;;
fp8)
    timeout 540 "$python" benchmarks/quantized.py --out "$OUT/$part.jsonl" "${small[@]}" "$@" 2>&1 | tee "$OUT/$part.log"
    ;;
engine) engine --task generate,sample,labels,one-token,classify --peers "" "$@" ;;
vllm) engine --task generate,sample,one-token --peers vllm --no-ours "$@" ;;
*) sed -n '2,14p' "$0" && exit 2 ;;
esac
if command -v nvidia-smi >/dev/null; then
    nvidia-smi --query-gpu=name,driver_version,memory.used,memory.total --format=csv | tee "$OUT/device.csv"
fi
