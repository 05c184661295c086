"""Generate customer reviews with known answers: label, facts and a good shop's reply. No files.

A review consists of clauses. Each clause is an opinion about one aspect in one frame: "the sound
is far from crisp" has the aspect `sound`, the word `crisp` and the frame `the {a} is far from {p}`.
The combination decides the polarity; no single word does. One combination in seven is held out.
Held-out reviews use only these combinations, and training reviews use none of them. Each frame,
aspect and word on its own does occur in training.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass, field
from typing import Literal

from make_words import (
    ASPECTS,
    BRANDS,
    EMOJI,
    EN,
    HTML,
    KINDS,
    LOOK_ALIKES,
    REPLIES,
    TRADITIONAL,
    WIDE_WORDS,
    ZH,
    ZH_TYPOS,
    Aspect,
    Kind,
    Language,
)

Label = Literal["positive", "negative", "neutral"]
LABELS: tuple[Label, ...] = ("positive", "neutral", "negative")
HELD_OUT_SHARE = 1 / 7
# The most aspects that the facts list: the first ones of the text.
MOST_ASPECTS = 5
_OPPOSITE: dict[Label, Label] = {"positive": "negative", "negative": "positive"}


@dataclass(frozen=True)
class Facts:
    """What a review says, in the language of its reply: the true fields of the job's `facts`.

    `product` has no brand. `aspects` are in the order of the text, each once. `rating` is 5 for
    praise alone, 4 for praise with a concession, 3 if neutral, 2 for blame with a concession, and
    1 for blame alone. `wish` is a refund if the customer wants one, else the first aspect that is
    blamed, else None.
    """

    product: str
    aspects: tuple[str, ...]
    rating: int
    wish: str | None


@dataclass(frozen=True)
class Review:
    """One review with its true label, facts and reply.

    `good`, `bad` and `middling` name its aspects in the language of `reply`.
    """

    language: str
    category: str
    product: str
    text: str
    label: Label
    good: tuple[str, ...]
    bad: tuple[str, ...]
    middling: tuple[str, ...]
    reply: str
    facts: Facts


@dataclass
class _Draft:
    """A review in progress. `language` is zh, en or mixed (Chinese with English words)."""

    rng: random.Random
    language: str
    kind: Kind
    held_out: bool
    said: list[tuple[Label, Aspect]] = field(default_factory=list)

    @property
    def words(self) -> Language:
        return EN if self.language == "en" else ZH

    def name(self, aspect: Aspect) -> str:
        """The name of `aspect` in the shop's reply."""
        return aspect.en.name if self.language == "en" else aspect.zh.name

    def pick(self, options: tuple[str, ...]) -> str:
        return self.rng.choice(options)

    def chance(self, share: float) -> bool:
        return self.rng.random() < share


def write_review(rng: random.Random, *, held_out: bool, clauses: int = 0) -> Review:
    """A review from one part of the split, with one to three opinions or with `clauses`."""
    language = rng.choices(("zh", "en", "mixed"), (50, 42, 8))[0]
    label = rng.choices(LABELS, (42, 24, 34))[0]
    kind = rng.choice(KINDS)
    brand = rng.choice(BRANDS)
    product = f"{brand['en']} {kind.en}" if language == "en" else f"{brand['zh']}{kind.zh}"
    draft = _Draft(rng, language, kind, held_out)
    body = (
        _neutral_body(draft, clauses) if label == "neutral" else _polar_body(draft, label, clauses)
    )
    text = _spoil(draft, _finish(draft, body), label)
    good, bad, middling = (
        tuple(draft.name(aspect) for said, aspect in draft.said if said == polarity)
        for polarity in ("positive", "negative", "neutral")
    )
    reply = _reply(draft, label, product)
    facts = _facts(draft, body, label)
    return Review(language, kind.category, product, text, label, good, bad, middling, reply, facts)


def is_held_out(*parts: str) -> bool:
    """Whether this combination is held out from training. The same on every machine."""
    return zlib.crc32("\0".join(parts).encode()) % 7 == 0


def _polar_body(draft: _Draft, label: Label, clauses: int) -> str:
    """Opinions of one polarity, sometimes with a concession and a verdict that outweighs it."""
    words = draft.words
    if not clauses and draft.chance(0.08):
        return words.comma.join(_fitting_pair(draft, words.openers, words.verdicts[label]))
    verdict = draft.pick(words.verdicts[label])
    main = _clauses(draft, label, clauses or draft.rng.choices((1, 2, 3), (45, 38, 17))[0])
    if draft.chance(0.22):
        concession = _clauses(draft, _OPPOSITE[label], 1)
        contrast = draft.pick(words.contrasts)
        order = (main, concession)
        if draft.chance(0.8):
            order = (concession, main)
            draft.said.insert(0, draft.said.pop())  # `said` is in the order of the text
        return words.stop.join((contrast.join(order), verdict))
    return words.stop.join((main, verdict)) if draft.chance(0.4) else main


def _neutral_body(draft: _Draft, clauses: int) -> str:
    """Good and bad in balance, or indifference, or no opinion yet."""
    words = draft.words
    form = draft.rng.choices(("mixed", "middling", "unused"), (45, 35, 0 if clauses else 20))[0]
    if form == "unused":
        return words.comma.join(_fitting_pair(draft, words.openers, words.unused))
    verdict = draft.pick(words.verdicts["neutral"])
    if form == "middling":
        body = _clauses(draft, "neutral", clauses or draft.rng.choice((1, 1, 2)))
    else:
        first: Label = "positive" if draft.chance(0.5) else "negative"
        each = max(1, clauses // 2)
        sides = (_clauses(draft, first, each), _clauses(draft, _OPPOSITE[first], each))
        body = draft.pick(words.contrasts).join(sides)
    return words.stop.join((body, verdict)) if draft.chance(0.5) else body


def _fitting_pair(
    draft: _Draft, first: tuple[str, ...], second: tuple[str, ...]
) -> tuple[str, str]:
    """One of each, such that the combination is in the draft's part of the split."""
    while True:
        pair = draft.pick(first), draft.pick(second)
        if is_held_out(*pair) == draft.held_out:
            return pair


def _clauses(draft: _Draft, polarity: Label, count: int) -> str:
    text = ""
    for _ in range(count):
        clause = _clause(draft, polarity)
        text = f"{text}{draft.pick(draft.words.also)}{clause}" if text else clause
    return text


def _clause(draft: _Draft, polarity: Label) -> str:
    """An opinion about one aspect, if possible one that the review does not mention yet."""
    said = {aspect.key for _, aspect in draft.said}
    fresh = tuple(key for key in draft.kind.aspects if key not in said)
    while True:
        aspect = ASPECTS[draft.pick(fresh or draft.kind.aspects)]
        frame, word = _opinion(draft, aspect, polarity)
        if is_held_out(frame, aspect.key, word) == draft.held_out:
            break
    draft.said.append((polarity, aspect))
    name = (
        aspect.en.name
        if draft.words is EN or (draft.language == "mixed" and draft.chance(0.6))
        else aspect.zh.name
    )
    return frame.format(a=name, p=word)


def _opinion(draft: _Draft, aspect: Aspect, polarity: Label) -> tuple[str, str]:
    """A frame and a word that together express `polarity` about `aspect`."""
    words = draft.words
    if polarity == "neutral":
        return draft.pick(words.middling_frames), draft.pick(words.middling)
    own = aspect.en if words is EN else aspect.zh
    straight = own.good + words.good if polarity == "positive" else own.bad + words.bad
    form = draft.rng.choices(("plain", "negated", "phrase"), (55, 22, 23))[0]
    if form == "phrase":
        phrases = own.good_phrases if polarity == "positive" else own.bad_phrases
        return draft.pick(words.phrase_frames), draft.pick(phrases)
    if form == "plain":
        if draft.language == "mixed" and draft.chance(0.3):
            straight = aspect.en.good if polarity == "positive" else aspect.en.bad
        return draft.pick(words.plain_frames), draft.pick(straight)
    if polarity == "positive":
        return draft.pick(words.not_bad_frames), draft.pick(_negatable(own.bad + words.bad))
    return draft.pick(words.not_good_frames), draft.pick(_negatable(own.good + words.good))


def _negatable(options: tuple[str, ...]) -> tuple[str, ...]:
    """The words that can be negated. In Chinese, negated words and causatives cannot."""
    return tuple(word for word in options if word[0] not in "不没让令" and "不" not in word)


def _finish(draft: _Draft, body: str) -> str:
    """The body, with an optional opener, distraction and full stop, and with English capitals."""
    words = draft.words
    text = body
    if draft.chance(0.3) and not text.startswith(words.openers):
        text = words.stop.join((draft.pick(words.openers), text))
    if draft.chance(0.15):
        text = words.stop.join((text, draft.pick(words.distractions)))
    if draft.chance(0.7):
        text += words.stop.strip()
    if words is EN:
        sentences = text.split(". ")
        text = ". ".join(sentence[:1].upper() + sentence[1:] for sentence in sentences)
    return text


def _facts(draft: _Draft, body: str, label: Label) -> Facts:
    """The facts of a review, known from its opinions and its clean `body`."""
    aspects = tuple(dict.fromkeys(draft.name(aspect) for _, aspect in draft.said))
    is_mixed = len({polarity for polarity, _ in draft.said}) > 1
    rating = {"positive": 5 - is_mixed, "neutral": 3, "negative": 1 + is_mixed}[label]
    blamed = [draft.name(aspect) for polarity, aspect in draft.said if polarity == "negative"]
    wish = blamed[0] if blamed else None
    if draft.words.refund["said"] in body:
        wish = draft.words.refund["wish"]
    product = draft.kind.en if draft.language == "en" else draft.kind.zh
    return Facts(product, aspects[:MOST_ASPECTS], rating, wish)


def _reply(draft: _Draft, label: Label, product: str) -> str:
    """The shop's reply. It names the product and, if the review is not mixed, an aspect."""
    polarities = {polarity for polarity, _ in draft.said}
    aspect = draft.said[0][1] if draft.said else None
    if aspect is None:
        form = "plain"
    elif len(polarities) > 1:
        form = "divided"
    else:
        form = "middling" if label == "neutral" else aspect.team
    replies = REPLIES["en" if draft.language == "en" else "zh"][label]
    return replies[form].format(aspect and draft.name(aspect), product=product)


def _spoil(draft: _Draft, text: str, label: Label) -> str:
    """`text` as people and web forms leave it, with typos, emoji, entities and stray markup."""
    chance, pick = draft.chance, draft.pick
    chinese = draft.words is ZH
    if chance(0.05):
        text = _typo(draft, text)
    if chinese and chance(0.05):
        text = "".join(TRADITIONAL.get(character, character) for character in text)
    if not chinese and chance(0.05):
        text = text.lower()
    if not chinese and chance(0.015):
        text = text.upper()
    if chance(0.03):
        text = text.rstrip(".。") + pick(("！！！", "~~~", "……", "!!", "。。。", "???"))
    if chance(0.08):
        text += pick(EMOJI[label]) * draft.rng.choice((1, 1, 2, 3))
    if chance(0.025):
        text = _insert(draft, text, pick(HTML))
    if chance(0.02):
        text = _insert(draft, text, pick(LOOK_ALIKES))
    if chance(0.02):
        # Some input methods write full-width letters, which are 0xFEE0 above the ASCII ones.
        text += "".join(chr(ord(letter) + 0xFEE0) for letter in pick(WIDE_WORDS))
    if chance(0.02):
        text = text.replace(draft.words.stop, draft.words.stop.strip() + "\n", 1)
    if chance(0.01):
        text = f"  {text}\t"
    return text


def _insert(draft: _Draft, text: str, piece: str) -> str:
    """`text` with `piece` at the start, at the end, or after the first sentence."""
    mark = draft.words.stop
    if mark in text and draft.chance(0.5):
        return text.replace(mark, f"{mark}{piece}", 1)
    return f"{piece}{text}" if draft.chance(0.5) else f"{text} {piece}"


def _typo(draft: _Draft, text: str) -> str:
    """`text` with one typo: a wrong character of the same sound, or two swapped letters."""
    if draft.words is ZH:
        places = [index for index, character in enumerate(text) if character in ZH_TYPOS]
        if not places:
            return text
        at = draft.rng.choice(places)
        return f"{text[:at]}{ZH_TYPOS[text[at]]}{text[at + 1 :]}"
    places = [index for index in range(len(text) - 1) if text[index : index + 2].isalpha()]
    at = draft.rng.choice(places)
    return text[:at] + text[at + 1] + text[at] + text[at + 2 :]
