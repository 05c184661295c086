"""The words of `words.yaml` as values: products, aspects, opinions, frames. No logic."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Opinions:
    """Opinions about an aspect in one language. `good` and `bad` words need a frame."""

    name: str
    good: tuple[str, ...]
    bad: tuple[str, ...]
    good_phrases: tuple[str, ...]
    bad_phrases: tuple[str, ...]


@dataclass(frozen=True)
class Aspect:
    """One aspect of a product. The `team` responsible for it decides how the shop replies."""

    key: str
    team: str
    zh: Opinions
    en: Opinions


@dataclass(frozen=True)
class Kind:
    """A kind of product: its names, and the keys of the aspects that reviews mention."""

    category: str
    zh: str
    en: str
    aspects: tuple[str, ...]


@dataclass(frozen=True)
class Language:
    """How one language expresses an opinion `{p}` about an aspect `{a}`, and the text around it."""

    good: tuple[str, ...]
    bad: tuple[str, ...]
    middling: tuple[str, ...]
    plain_frames: tuple[str, ...]
    not_good_frames: tuple[str, ...]
    not_bad_frames: tuple[str, ...]
    phrase_frames: tuple[str, ...]
    middling_frames: tuple[str, ...]
    contrasts: tuple[str, ...]
    openers: tuple[str, ...]
    distractions: tuple[str, ...]
    unused: tuple[str, ...]
    verdicts: dict[str, tuple[str, ...]]
    refund: dict[str, str]
    comma: str
    stop: str
    also: tuple[str, ...]


def _frozen(value: Any) -> Any:
    """`value` with tuples in place of lists, at every depth."""
    if isinstance(value, list):
        return tuple(map(_frozen, value))
    return {key: _frozen(each) for key, each in value.items()} if isinstance(value, dict) else value


_WORDS = _frozen(yaml.safe_load((Path(__file__).parent / "words.yaml").read_text(encoding="utf-8")))

ASPECTS = {
    key: Aspect(key, aspect["team"], Opinions(**aspect["zh"]), Opinions(**aspect["en"]))
    for key, aspect in _WORDS["aspects"].items()
}
COMMON_ASPECTS: tuple[str, ...] = _WORDS["common_aspects"]
KINDS = tuple(
    Kind(**kind | {"aspects": kind["aspects"] + COMMON_ASPECTS}) for kind in _WORDS["kinds"]
)
BRANDS: tuple[dict[str, str], ...] = _WORDS["brands"]
ZH = Language(**_WORDS["languages"]["zh"])
EN = Language(**_WORDS["languages"]["en"])
# Keyed by language, then sentiment, then form.
REPLIES: dict[str, dict[str, dict[str, str]]] = _WORDS["replies"]
EMOJI: dict[str, tuple[str, ...]] = _WORDS["emoji"]
LOOK_ALIKES: tuple[str, ...] = _WORDS["look_alikes"]
HTML: tuple[str, ...] = _WORDS["html"]
WIDE_WORDS: tuple[str, ...] = _WORDS["wide_words"]
ZH_TYPOS = dict(map(tuple, _WORDS["zh_typos"]))
TRADITIONAL = dict(map(tuple, _WORDS["traditional"]))
