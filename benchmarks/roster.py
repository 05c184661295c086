"""The contestants of each task, with their scripts, environments and checkpoints.

To add a contestant, add a line to ROSTER and a script to contestants/.
"""

from __future__ import annotations

from dataclasses import dataclass

OURS = "glmbatch"
OURS_INT8 = "glmbatch/int8"
OURS_FP8 = "glmbatch/fp8"
# One row at a time has no padding or batching to get wrong, so the others must agree with it.
REFERENCE = "transformers/row-by-row"


@dataclass(frozen=True)
class Contestant:
    """A program, or one variant of its use, in one task.

    `slow` contestants get only some of the rows. `only` is "cpu" or "cuda" for those that are set
    up for that device alone.
    """

    name: str
    task: str
    checkpoint: str = "transformers"
    slow: bool = False
    only: str = ""

    @property
    def program(self) -> str:
        """The program, which is also the name of its environment."""
        return self.name.partition("/")[0]

    @property
    def way(self) -> str:
        """The variant; empty if the program has only one."""
        return self.name.partition("/")[2]

    @property
    def script(self) -> str:
        """The name of its script in contestants/."""
        return f"with_{self.program.replace('.', '_')}.py"


# Contestants start and are shown in this order.
ROSTER = (
    Contestant(OURS, "classify"),
    Contestant(OURS_INT8, "classify", only="cpu"),
    Contestant(OURS_FP8, "classify", only="cuda"),
    Contestant(REFERENCE, "classify"),
    Contestant("transformers/pipeline", "classify"),
    Contestant("transformers/pipeline-sorted", "classify"),
    Contestant("vllm", "classify"),
    Contestant(OURS, "labels"),
    Contestant(REFERENCE, "labels", slow=True),
    Contestant("transformers/pairs", "labels", slow=True),
    Contestant("transformers/pairs-sorted", "labels", slow=True),
    Contestant(OURS, "one-token"),
    Contestant(REFERENCE, "one-token", slow=True),
    Contestant("vllm", "one-token"),
    Contestant(OURS, "generate"),
    Contestant(OURS_INT8, "generate", only="cpu"),
    Contestant(OURS_FP8, "generate", only="cuda"),
    Contestant(REFERENCE, "generate", slow=True),
    Contestant("transformers/static", "generate"),
    Contestant("transformers/static-sorted", "generate"),
    Contestant("transformers/continuous", "generate"),
    Contestant("vllm", "generate"),
    Contestant("llama.cpp/f32", "generate", "gguf-f32", only="cpu"),
    Contestant("llama.cpp/bf16", "generate", "gguf-bf16", only="cpu"),
    Contestant("llama.cpp/q8_0", "generate", "gguf-q8_0", only="cpu"),
    Contestant("openvino/f32", "generate", "openvino-f32", only="cpu"),
    Contestant("openvino/int8", "generate", "openvino-int8", only="cpu"),
    Contestant(OURS, "sample"),
    Contestant("vllm", "sample"),
    Contestant(OURS, "questions"),
    Contestant(REFERENCE, "questions", slow=True),
    Contestant("vllm", "questions"),
    Contestant(OURS, "fields"),
    Contestant("vllm", "fields"),
)
WAYS = tuple(sorted({contestant.name for contestant in ROSTER if contestant.way}))
PEERS = tuple(sorted({contestant.program for contestant in ROSTER} - {OURS}))


def taking_part(task: str, peers: list[str], always: set[str]) -> list[Contestant]:
    """`peers` (program or program/variant) and those that `always` take part, in roster order."""
    chosen = []
    for contestant in ROSTER:
        asked = contestant.name in peers or contestant.program in peers
        if contestant.task == task and (asked or contestant.name in always):
            chosen.append(contestant)
    return chosen
