"""The checkpoint and its precision. Every setting here changes answers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from glmbatch.settings.kinds import Address, Settings, text_alone


class ModelConfig(Settings):
    """The checkpoint and its precision."""

    path: Address = Field(
        description="ChatGLM2 checkpoint in its original layout: a directory, an address such as "
        "s3://bucket/name, or a hub id such as THUDM/chatglm2-6b.",
    )
    revision: str | None = Field(
        None,
        description="Commit of the hub repository. Required with a hub id, refused with a "
        "directory.",
    )
    adapter: Address | None = Field(
        None,
        description="Directory of a LoRA adapter saved by peft, merged into the weights at load. "
        "Empty: none.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Precision of the computation. auto picks the fastest: bfloat16 on CUDA, "
        "float32 on CPU. On CUDA, float32 takes twice the memory.",
    )
    quantization: Literal["none", "int8"] = Field(
        "none",
        description="int8 computes the layers in 8 bits, on CPU only: at least twice as fast, but "
        "it can change answers. Compare both on a sample first.",
    )


ModelSetting = Annotated[ModelConfig, text_alone("model")]
