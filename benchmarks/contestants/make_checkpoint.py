"""Write a checkpoint of random weights in transformers' format.

python make_checkpoint.py KIND CONFIG_JSON SEED PATH
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from models import save_model

if __name__ == "__main__":
    kind, config, seed, path = sys.argv[1:]
    save_model(kind, json.loads(config), int(seed), Path(path))
