"""Which checkpoint answers, and in which numbers. Every setting here changes answers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from glmbatch.settings.kinds import Address, Settings


class ModelConfig(Settings):
    """Which checkpoint answers, and in which numbers."""

    path: Address = Field(
        description="Directory of a ChatGLM2 checkpoint in its original layout, here or in an "
        "object store (s3://bucket/name), or a hub id such as THUDM/chatglm2-6b.",
    )
    revision: str | None = Field(
        None,
        description="Commit of the hub repository; required for a hub id, refused for a directory.",
    )
    adapter: Address | None = Field(
        None,
        description="Directory of a LoRA adapter as peft saves it, merged into the weights at "
        "load; empty: none.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Numbers to compute in; auto is bfloat16 on CUDA and float32 on CPU, the "
        "faster of each. float32 on CUDA takes twice the memory.",
    )
    quantization: Literal["none", "int8"] = Field(
        "none",
        description="int8 computes the layers' products in 8 bits, on CPU only: at least twice as "
        "fast, but it can change answers. Try it on a sample and compare before you rely on it.",
    )


def _path_alone(value: object) -> object:
    return {"path": value} if isinstance(value, str) else value


# A text alone stands for the path of a model that sets nothing else.
ModelSetting = Annotated[ModelConfig, BeforeValidator(_path_alone)]
