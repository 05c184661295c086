"""Sources that did not change since they were published. Opens no file.

A source is unchanged if its stamp is the one recorded with its digest (see `version_stamp`), or if
its bytes are, and if its published files still have their stamps. It makes no fragment: its files
stay published. Whether they were also made under the present settings is known only when the models
are: see `basis_of`. An empty stamp says that a later write might leave it as it is, so that the
source is digested again.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from glmbatch.ledger.fragments import Plan
from glmbatch.ledger.manifest import Manifest, PublishedFile
from glmbatch.ledger.receipts import AnswerCounts, AnswersReceipt, OutputReceipt
from glmbatch.store.files import is_settled, version_stamp
from glmbatch.store.folder import Folder
from glmbatch.store.modes import narrow
from glmbatch.store.paths import AnyPath

# Raise it when the same source under the same settings would be written in another way.
LAYOUT = 1
# The key of receipts that stand for many published files.
UNCHANGED = "unchanged"


@dataclass(frozen=True, slots=True)
class PublishedSource:
    """What the manifest records about one source: the digest of its bytes, its stamp, its filter.

    `where` is the condition that chose its rows, as in `Fragment`.
    """

    digest: str
    stamp: tuple[int, ...]
    where: str = ""


def published_sources(output: Folder, manifest: Manifest | None) -> dict[str, PublishedSource]:
    """The sources whose published files are in `output` as recorded, by name."""
    if manifest is None or manifest.limit is not None:
        return {}
    sources: dict[str, PublishedSource] = {}
    lost: set[str] = set()
    places = output.stamps([file.output_name for file in manifest.files], len(manifest.files))
    for file, place in zip(manifest.files, places, strict=True):
        if file.stamp is None or not file.basis or place is None or place != file.place:
            lost.add(file.source)
        else:
            sources[file.source] = PublishedSource(file.source_digest, file.stamp, file.where)
    return {name: source for name, source in sources.items() if name not in lost}


@dataclass(frozen=True, slots=True)
class Look:
    """A source's stamp, and whether any later write must change it."""

    stamp: tuple[int, ...]
    settled: bool

    @property
    def recorded(self) -> tuple[int, ...]:
        """The stamp to record: empty unless it is settled."""
        return self.stamp if self.settled else ()


def look_at(path: AnyPath) -> Look:
    """The stamp of a source now. OSError when it cannot be read."""
    looked_ns = time.time_ns()
    stamp = version_stamp(path)
    return Look(stamp, is_settled(stamp, looked_ns))


def is_sampled(name: str, seed: str, share: float) -> bool:
    """Whether the source `name` is among the `share` to be digested again in the run `seed`."""
    drawn = int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest())
    return drawn < share * 2**64


def basis_of(parts: object) -> str:
    """The digest of everything but the source that decides what is published for it."""
    text = json.dumps([LAYOUT, parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def with_stamps(
    output: Folder, manifest: Manifest, outputs: Sequence[OutputReceipt], plan: Plan, basis: str
) -> Manifest:
    """The manifest with what lets the next run leave sources alone; all files are in their places.

    A source gets no stamp if a part of it was left out, if the model failed on one of its rows,
    since those are asked again, or if its files depend on other sources: on the unit of their INT96
    times, or on a Delta table's types. A source that was touched gets its new stamp, and its files
    lose the rights that it lost.
    """
    receipts = {published.output_name: published for published in outputs}
    again = {fault.source for fault in manifest.unusable}
    again |= {published.fragment.source for published in outputs if _is_asked_again(published)}
    fresh: dict[str, dict[str, Any]] = {}
    for file in manifest.files:
        receipt = receipts.get(file.output_name)
        stamp = plan.unchanged.get(file.source)
        if receipt is not None:
            fresh[file.output_name] = {
                "basis": basis,
                "stamp": None if file.source in again else plan.stamps.get(file.source),
                "counts": {answers.step: counts_of(answers) for answers in receipt.answers},
            }
        elif stamp is not None and (not stamp or stamp != file.stamp):
            narrow(output / file.output_name, [Folder(plan.root) / file.source])
            fresh[file.output_name] = {"stamp": stamp or file.stamp}
    names = [file.output_name for file in manifest.files if file.output_name in fresh]
    for name, place in zip(names, output.stamps(names, len(manifest.files)), strict=True):
        fresh[name]["place"] = place
    files = []
    for file in manifest.files:
        update = fresh.get(file.output_name)
        files.append(replace(file, **update) if update else file)
    return manifest.model_copy(update={"files": tuple(files)})


def _is_asked_again(output: OutputReceipt) -> bool:
    """Whether the next run must look at the source of `output` although it did not change."""
    failed = any("model_failed" in answers.faults for answers in output.answers)
    return failed or bool(output.fragment.int96 or output.fragment.typed)


def counts_of(answers: AnswersReceipt) -> AnswerCounts:
    """The part of a receipt that the manifest keeps."""
    return AnswerCounts.model_validate(answers.model_dump(include=set(AnswerCounts.model_fields)))


def receipts_of(files: Iterable[PublishedFile]) -> list[AnswersReceipt]:
    """One receipt for each step that stands for all answers in `files`, from their counts."""
    sums: dict[str, Counter[str]] = defaultdict(Counter)
    kinds: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    unlabelled: dict[str, list[int | None]] = defaultdict(list)
    for file in files:
        for step, counts in file.counts.items():
            sums[step].update(
                rows=counts.rows,
                not_asked=counts.not_asked,
                abstained=counts.abstained,
                empty_answers=counts.empty_answers,
                answer_tokens=counts.answer_tokens,
            )
            unlabelled[step].append(counts.unlabelled)
            for name in ("faults", "labels", "finish_reasons"):
                kinds[step][name].update(getattr(counts, name))
    receipts = []
    for step, total in sums.items():
        receipts.append(
            AnswersReceipt(
                key=UNCHANGED,
                run=UNCHANGED,
                fragment=UNCHANGED,
                step=step,
                step_key=UNCHANGED,
                unlabelled=None if None in unlabelled[step] else sum(unlabelled[step]),
                **total,
                **{name: dict(counter) for name, counter in kinds[step].items()},
            )
        )
    return receipts
