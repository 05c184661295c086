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
    that would be cut.
    """

    texts: tuple[str, ...]
    tokenizer: Tokenizer
    window: int

    def __call__(self, ids: Sequence[int]) -> bool:
        """Whether generation stops after `ids`."""
        tail = self.tokenizer.decode(list(ids[-self.window :]))
        return any(text in tail for text in self.texts)


def stop_at(texts: Sequence[str], tokenizer: Tokenizer) -> StopTexts | None:
    """The check for `texts`, which a request takes as its `should_stop`; None without any."""
    if not texts:
        return None
    window = max(len(text.encode()) for text in texts) + 4
    return StopTexts(tuple(texts), tokenizer, window)
