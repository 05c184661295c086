"""Who takes part in which task, with which script, environment and checkpoint.

To add a contestant, add a line to ROSTER and a script to contestants/.
"""

from __future__ import annotations

from dataclasses import dataclass

OURS = "glmbatch"
OURS_INT8 = "glmbatch/int8"
# One row at a time cannot go wrong by padding or batching, so it is what others must agree with.
REFERENCE = "transformers/row-by-row"


@dataclass(frozen=True)
class Contestant:
    """A program, or a way of using it, in one task.

    `slow` contestants get a part of the rows. `cpu_only` ones are set up here for CPU only.
    """

    name: str
    task: str
    checkpoint: str = "transformers"
    slow: bool = False
    cpu_only: bool = False

    @property
    def program(self) -> str:
        """What it is, and the name of its environment."""
        return self.name.partition("/")[0]

    @property
    def way(self) -> str:
        """How it goes about the task; empty where it has one way."""
        return self.name.partition("/")[2]

    @property
    def script(self) -> str:
        """Its file in contestants/."""
        return f"with_{self.program.replace('.', '_')}.py"


# They are started and shown in this order.
ROSTER = (
    Contestant(OURS, "classify"),
    Contestant(OURS_INT8, "classify", cpu_only=True),
    Contestant(REFERENCE, "classify"),
    Contestant("transformers/pipeline", "classify"),
    Contestant("transformers/pipeline-sorted", "classify"),
    Contestant("vllm", "classify", cpu_only=True),
    Contestant(OURS, "labels"),
    Contestant(REFERENCE, "labels", slow=True),
    Contestant("transformers/pairs", "labels", slow=True),
    Contestant("transformers/pairs-sorted", "labels", slow=True),
    Contestant(OURS, "generate"),
    Contestant(OURS_INT8, "generate", cpu_only=True),
    Contestant(REFERENCE, "generate", slow=True),
    Contestant("transformers/static", "generate"),
    Contestant("transformers/static-sorted", "generate"),
    Contestant("transformers/continuous", "generate"),
    Contestant("vllm", "generate", cpu_only=True),
    Contestant("llama.cpp/f32", "generate", "gguf-f32", cpu_only=True),
    Contestant("llama.cpp/q8_0", "generate", "gguf-q8_0", cpu_only=True),
    Contestant("openvino/f32", "generate", "openvino-f32", cpu_only=True),
    Contestant("openvino/int8", "generate", "openvino-int8", cpu_only=True),
)
WAYS = tuple(sorted({contestant.name for contestant in ROSTER if contestant.way}))
PEERS = tuple(sorted({contestant.program for contestant in ROSTER} - {OURS}))


def taking_part(task: str, peers: list[str]) -> list[Contestant]:
    """Ours, the reference, and those of `peers` (program or program/way), in roster order."""
    always = {OURS, REFERENCE}
    chosen = []
    for contestant in ROSTER:
        asked = contestant.name in peers or contestant.program in peers
        if contestant.task == task and (asked or contestant.name in always):
            chosen.append(contestant)
    return chosen
