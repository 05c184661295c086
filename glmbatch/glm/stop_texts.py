"""When generation stops: a value that an engine in another process can load. No tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from glmbatch.glm.tokenizer import Tokenizer


@dataclass(frozen=True)
class StopTexts:
    """Tells whether the end of generated ids contains one of `texts`.

    It decodes the last `window` tokens only. Each token stands for at least one byte, so a stop
    text at the end has at most as many tokens as bytes. Four more tokens complete a first character
    that would be cut. `continues` is as for `Tokenizer.decode`.
    """

    texts: tuple[str, ...]
    tokenizer: Tokenizer
    window: int
    continues: bool = False

    def __call__(self, ids: Sequence[int]) -> bool:
        """Whether generation stops after `ids`."""
        tail = self.tokenizer.decode(list(ids[-self.window :]), continues=self.continues)
        return any(text in tail for text in self.texts)


def stop_at(
    texts: Sequence[str], tokenizer: Tokenizer, *, continues: bool = False
) -> StopTexts | None:
    """The check for `texts`, which a request takes as its `should_stop`; None without any.

    Set `continues` if the answers continue their prompts.
    """
    if not texts:
        return None
    window = max(len(text.encode()) for text in texts) + 4
    return StopTexts(tuple(texts), tokenizer, window, continues)
