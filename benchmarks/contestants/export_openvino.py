"""Convert a causal checkpoint to OpenVINO: python export_openvino.py CHECKPOINT NUMBERS PATH.

NUMBERS is f32, or int8 for 8-bit weights. Runs in OpenVINO's own environment.
"""

from __future__ import annotations

import sys
from pathlib import Path

from optimum.intel import (  # type: ignore[import-not-found]
    OVModelForCausalLM,
    OVWeightQuantizationConfig,
)


def export(checkpoint: Path, numbers: str, path: Path) -> None:
    quantization = OVWeightQuantizationConfig(bits=8) if numbers == "int8" else None
    # Without `load_in_8bit`, optimum would compress large models by default.
    model = OVModelForCausalLM.from_pretrained(
        checkpoint,
        export=True,
        compile=False,
        load_in_8bit=None if quantization else False,
        quantization_config=quantization,
    )
    model.save_pretrained(path)


if __name__ == "__main__":
    export(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
