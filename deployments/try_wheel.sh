#!/usr/bin/env bash
# Try the wheel in dist/ as a user would: an empty environment, no checkout, one job over the sample.
#
#     bash deployments/try_wheel.sh python3.12
#
# PIP_FIND_LINKS may name a folder of wheels, such as a CPU build of torch.
set -euo pipefail
python=$(command -v "$1")
checkout=$(cd "$(dirname "$0")/.." && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

"$python" -m venv env
env/bin/python -m pip install --quiet 'uv>=0.9,<1'
wheel=$(ls "$checkout"/dist/glmbatch-*.whl)
UV_FIND_LINKS=${PIP_FIND_LINKS:-} env/bin/uv pip install --quiet --python env/bin/python \
  --constraint "$checkout/constraints.txt" "glmbatch[cpu] @ file://$wheel"

# Only the sample is taken along: the code must come from the wheel.
cp -r "$checkout/sample_data" .
export PREFECT_HOME=$folder/prefect
env/bin/glmbatch run sample_data/reviews.yaml --output answers --limit 200 >printed || test $? -eq 3
head -1 printed
env/bin/glmbatch verify answers
env/bin/python -c "import glmbatch, sys; assert glmbatch.__file__.startswith('$folder'); print('Python', sys.version.split()[0], 'ok')"
