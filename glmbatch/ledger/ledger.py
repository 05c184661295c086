"""What is done, and how it becomes public. The output folder is the only memory; nothing here knows of models.

    OUTPUT/<the input's folders>/<file>-<first row>.parquet    published rows
    OUTPUT/_manifest.json                                      what is published; written last
    OUTPUT/_quarantine.parquet                                 rows that failed, with file, row and reason
    OUTPUT/_glmbatch/answers/<answers key>.<digest>.parquet    answers of one step over one fragment
    OUTPUT/_glmbatch/staged/<output key>.<digest>.parquet      output files that wait for publication
    OUTPUT/_glmbatch/publishing.json                           files of publications that have not come to their end
    OUTPUT/_glmbatch/refused.parquet                           rows that failed in a run that published nothing
    OUTPUT/_glmbatch/lock                                      held by the run that writes; in a store: lock.<number>

Each file carries its receipt in its footer and appears by one rename, so a kill at any moment leaves it whole or
absent, and running again finds it.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import pyarrow as pa
from pydantic import BaseModel, ValidationError

from glmbatch.errors import InputError, TransientError, UnusableFile
from glmbatch.ledger.delta import commit_table, plan_commit
from glmbatch.ledger.fragments import FileFault, Fragment, Plan
from glmbatch.ledger.known import AnswerFile
from glmbatch.store.files import (
    PARTIAL,
    commit,
    committed,
    digest_file,
    move,
    naming,
    partial_beside,
    remove_tree,
    writable,
)
from glmbatch.store.locks import check_held, hold, release
from glmbatch.store.parquet import footer_metadata, open_parquet, write_table
from glmbatch.store.paths import AnyPath, location, side_by_side, unlink_all

logger = logging.getLogger(__name__)

DIGEST_CHARS = 32
LENGTH_BIN = 8
RECEIPT = "glmbatch.receipt"
MANIFEST = "_manifest.json"
QUARANTINE = "_quarantine.parquet"
ANSWERS = "_glmbatch/answers"
STAGED = "_glmbatch/staged"
PUBLISHING = "_glmbatch/publishing.json"
REFUSED = "_glmbatch/refused.parquet"
RESULTS = "_glmbatch/results"
LOCK = "_glmbatch/lock"
_COMMITTING = threading.Lock()


class AnswersReceipt(BaseModel, frozen=True, extra="forbid"):
    """What became of one step over one fragment. `run` is the run that computed it; seconds are of wall time.

    `computed_rows` are the prompts that went through the model, `known_rows` those whose answers were found under
    their row key; together fewer than `rows` where rows repeat or have no prompt. `earlier` names the runs of the
    answers that the prompts use, by step. `unusable` says why the fragment's rows cannot be read; then there are no
    answers.
    """

    key: str
    run: str
    fragment: str
    step: str
    step_key: str
    model: str = ""  # identity of the weights, tokenizer and numerics behind `step_key`
    earlier: dict[str, str] = {}
    rows: int
    computed_rows: int = 0
    known_rows: int = 0
    faults: dict[str, int] = {}
    labels: dict[str, int] = {}
    finish_reasons: dict[str, int] = {}
    empty_answers: int = 0
    answer_tokens: int = 0  # of all answers, whoever computed them
    prompt_lengths: dict[
        int, int
    ] = {}  # rows by the tokens of their prompt, rounded down to LENGTH_BIN
    prompt_tokens: int = 0
    completion_tokens: int = 0
    began: float = 0.0
    seconds: float = 0.0
    unusable: str | None = None


class OutputReceipt(BaseModel, frozen=True, extra="forbid"):
    """What became of one fragment: its output file, and the answers in it. `digest` is that of the file's bytes."""

    key: str
    run: str
    fragment: Fragment
    output_name: str
    answers: tuple[AnswersReceipt, ...]
    faulty_rows: int = 0
    digest: str = ""
    unusable: str | None = None


class PublishedFile(BaseModel, frozen=True, extra="forbid"):
    """One line of the manifest."""

    output_name: str
    output_key: str
    source: str
    source_digest: str
    first_row: int
    rows: int
    faulty_rows: int
    digest: str
    step_keys: dict[str, str]
    answers_keys: tuple[str, ...]


class StepOrigin(BaseModel, frozen=True, extra="forbid"):
    """What a step key was made of, for people: the step's settings, and the identity of its model."""

    settings: dict[str, Any]
    model: str


class Manifest(BaseModel, frozen=True, extra="forbid"):
    """What is published: the last thing a run writes. A reader that wants all or nothing waits for it.

    Sources are named from the folder `root`. `replaced` files belong to it no more, and are gone unless a run was
    killed. `limit` is that of the run: then these are not all rows. `steps` says what its step keys were made of.
    With the format "delta" the same files are a Delta table, and what was replaced stays for its older versions.
    """

    run: str
    root: str
    files: tuple[PublishedFile, ...]
    replaced: tuple[str, ...] = ()
    unusable: tuple[FileFault, ...] = ()
    limit: int | None = None
    steps: dict[str, StepOrigin] = {}
    format: Literal["parquet", "delta"] = "parquet"


Receipt = TypeVar("Receipt", bound=BaseModel)


class Ledger:
    """The output folder of one job."""

    def __init__(self, output: str | Path) -> None:
        self.root = location(output)

    def open(self, run: str = "") -> None:
        """Make the folder, prove that it can be written, and keep all but `run` from writing to it until `close`.

        InputError when it cannot be written or another run holds it. The lock of a process that died is free; in a
        store, after some minutes.
        """
        hold(self.root / LOCK, run)

    def close(self, run: str = "") -> None:
        """Let others write to the folder, if `run` holds it."""
        release(self.root / LOCK, run)

    def find_answers(
        self, key: str, run: str, earlier: Mapping[str, str] | None = None, *, retry_failed: bool
    ) -> AnswersReceipt | None:
        """The answers under `key` that `run` may use: whole, and with nothing to try again.

        With `retry_failed`, rows on which the model failed are tried again by each new run; those of `run` stand. So
        are rows that had no prompt for it: `earlier` maps the steps that the prompts use to their answers keys.
        """
        found = _whole(self.root / ANSWERS, key, AnswersReceipt)
        if found is None or (
            retry_failed and "model_failed" in found[0].faults and found[0].run != run
        ):
            return None
        if retry_failed and "earlier_step_failed" in found[0].faults:
            for step, earlier_key in (earlier or {}).items():
                before = self.find_answers(earlier_key, run, retry_failed=True)
                if before is None or before.run != found[0].earlier.get(step):
                    return None
        return found[0]

    def answer_files(self, step_key: str) -> Iterator[AnswerFile]:
        """Every committed file with answers under `step_key`: what is in no published file, then what is.

        In this order since a killed publication may have put other bytes in the place of a published file.
        """
        for path, receipt in self._unpublished():
            if receipt.step_key == step_key:
                yield AnswerFile(path, receipt.step, path.name.split(".")[1])
        for file in self._published():
            for step, key in file.step_keys.items():
                if key == step_key:
                    yield AnswerFile(self.root / file.output_name, step, file.digest)

    def unpublished_receipts(self) -> Iterator[AnswersReceipt]:
        """The receipts of committed answers that are in no published file: of this run and of earlier ones.

        Under a published key too, where a later run has asked again about rows that had failed.
        """
        published = {(receipt.key, receipt.run) for receipt in self.published_receipts()}
        for _, receipt in self._receipts(self._answers(), AnswersReceipt):
            if (receipt.key, receipt.run) not in published:
                yield receipt

    def _unpublished(self) -> Iterator[tuple[AnyPath, AnswersReceipt]]:
        kept = {key for file in self._published() for key in file.answers_keys}
        paths = [path for path in self._answers() if path.name.split(".")[0] not in kept]
        yield from self._receipts(paths, AnswersReceipt)

    def _receipts(
        self, paths: Iterable[AnyPath], kind: type[Receipt]
    ) -> Iterator[tuple[AnyPath, Receipt]]:
        """Each of `paths` that holds a sound receipt, with it."""
        for path, receipt in side_by_side(
            self.root, lambda path: (path, _receipt(path, kind)), paths
        ):
            if receipt is not None:
                yield path, receipt

    def _answers(self) -> list[AnyPath]:
        paths: list[AnyPath] = [*(self.root / ANSWERS).glob("*.parquet")]
        return sorted(paths)

    def published_receipts(self) -> Iterator[AnswersReceipt]:
        """The receipts of all published answers, as their files' footers have them."""
        paths = [self.root / file.output_name for file in self._published()]
        for _, receipt in self._receipts(paths, OutputReceipt):
            yield from receipt.answers

    def keep_answers(self, receipt: AnswersReceipt, table: pa.Table) -> AnswerFile:
        """Commit the answers of one step over one fragment in place of earlier ones; safe to repeat."""
        with _COMMITTING:  # fragments with the same rows have the same key
            return self._keep_answers(receipt, table)

    def _keep_answers(self, receipt: AnswersReceipt, table: pa.Table) -> AnswerFile:
        folder = self.root / ANSWERS
        found = _whole(folder, receipt.key, AnswersReceipt)
        if found is not None and found[0].run == receipt.run:
            return AnswerFile(found[1], receipt.step, found[1].name.split(".")[1])
        with partial_beside(folder / receipt.key) as partial:
            _write(partial, table.schema, iter(table.to_batches()), receipt)
            commit(partial, folder / f"{receipt.key}.{digest_file(partial)[:DIGEST_CHARS]}.parquet")
        there = {
            path: _receipt(path, AnswersReceipt) for path in folder.glob(f"{receipt.key}.*.parquet")
        }
        # Another process may commit the same at once: both keep the same one, so that neither takes away the last.
        kept = min(
            path for path, other in there.items() if other is not None and other.run == receipt.run
        )
        for path in there.keys() - {kept}:
            path.unlink(missing_ok=True)
        return AnswerFile(kept, receipt.step, kept.name.split(".")[1])

    def answers_receipt(self, key: str) -> AnswersReceipt:
        """The receipt of the answers under `key`, which the caller knows to be there."""
        return self._kept_answers(key)[0]

    def read_answers(self, key: str) -> tuple[AnswersReceipt, pa.Table]:
        """The receipt and the answers under `key`, which the caller knows to be there."""
        receipt, path = self._kept_answers(key)
        try:
            with open_parquet(path) as file:
                return receipt, file.read()
        except UnusableFile:
            if path.exists():
                raise
            return self.read_answers(key)  # another process had committed the same

    def _kept_answers(self, key: str) -> tuple[AnswersReceipt, AnyPath]:
        found = _whole(self.root / ANSWERS, key, AnswersReceipt)
        if found is None:
            # Or another machine of a cluster has just written them, and a shared folder does not show them yet.
            raise TransientError(
                f"{self.root / ANSWERS}: the answers {key} are not there. Run the job again."
            )
        return found

    def find_output(self, key: str, answers: Sequence[AnswersReceipt]) -> OutputReceipt | None:
        """The output file under `key`, staged or published, whole, and with just these `answers` in it."""
        found = _whole(self.root / STAGED, key, OutputReceipt)
        if found is not None:
            receipt = found[0].model_copy(update={"digest": digest_file(found[1])})
        else:
            published = {file.output_key: file for file in self._published()}.get(key)
            path = self.root / published.output_name if published else None
            read = _receipt(path, OutputReceipt) if path else None
            if (
                published is None
                or read is None
                or path is None
                or digest_file(path) != published.digest
            ):
                return None
            receipt = read.model_copy(update={"digest": published.digest})
        return receipt if receipt.answers == tuple(answers) else None

    def _published(self) -> tuple[PublishedFile, ...]:
        manifest = self.manifest()
        return manifest.files if manifest else ()

    def stage_output(
        self, receipt: OutputReceipt, schema: pa.Schema, batches: Iterator[pa.RecordBatch]
    ) -> OutputReceipt:
        """Commit one output file where no reader looks; returns its receipt with the digest of its bytes."""
        folder = self.root / STAGED
        with partial_beside(folder / receipt.key) as partial:
            _write(partial, schema, batches, receipt)
            digest = digest_file(partial)
            for path in folder.glob(f"{receipt.key}.*.parquet"):
                path.unlink(missing_ok=True)
            receipt = receipt.model_copy(update={"digest": digest})
            commit(partial, folder / _staged_name(receipt))
        return receipt

    def manifest(self) -> Manifest | None:
        """What is published; None when nothing is."""
        path = self.root / MANIFEST
        try:
            with naming("data.output"):
                status = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return _parsed_manifest(path, status.st_mtime_ns, status.st_size, status.st_ino)

    def quarantine(self, sources: Collection[str]) -> list[dict[str, Any]]:
        """The published lines of rows that failed, of the given sources alone."""
        path = self.root / QUARANTINE
        if not path.is_file():
            return []
        try:
            with open_parquet(path) as file:
                return [line for line in file.read().to_pylist() if line["source"] in sources]
        except UnusableFile as error:  # a list for people; the rows themselves carry their reasons
            logger.warning("%s: it is written anew, without the rows of earlier runs", error)
            return []

    def refuse(self, failed: pa.Table) -> AnyPath:
        """Keep the list of failed rows of a run that publishes nothing, until one publishes; its path."""
        _write_list(self.root / REFUSED, failed)
        return self.root / REFUSED

    def publish(
        self, manifest: Manifest, outputs: Sequence[OutputReceipt], quarantine: pa.Table
    ) -> None:
        """Move what is staged into place, write the manifest, take away what was replaced; safe to repeat.

        Killed in between, the next publication finds in the manifest what was still to be taken away.
        """
        check_held(self.root / LOCK)
        names = {file.output_name for file in manifest.files}
        left, staged = self._begun(), {path.name for path in (self.root / STAGED).glob("*.parquet")}
        version = None
        if manifest.format == "delta":
            places = {file.output_name: self.root / file.output_name for file in manifest.files}
            places |= {output.output_name: self.output_path(output) for output in outputs}
            version = plan_commit(self.root, places)
            left -= version.known  # older versions of the table need theirs
        with committed(self.root / PUBLISHING) as partial:
            partial.write_text(
                json.dumps(sorted(left | {output.output_name for output in outputs})),
                encoding="utf-8",
            )
        for _ in side_by_side(self.root, lambda output: self._move_staged(output, staged), outputs):
            pass
        if version is not None:
            commit_table(
                self.root, {file.output_name: file.rows for file in manifest.files}, version
            )
        _write_list(self.root / QUARANTINE, quarantine)
        check_held(self.root / LOCK)
        with committed(self.root / MANIFEST) as partial:
            partial.write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
        unlink_all(self.root, [self.root / name for name in {*manifest.replaced, *left} - names])
        (self.root / PUBLISHING).unlink(missing_ok=True)
        (self.root / REFUSED).unlink(missing_ok=True)
        remove_tree(self.root / STAGED)
        self._sweep({key for file in manifest.files for key in file.answers_keys})

    def _move_staged(self, output: OutputReceipt, staged: Collection[str]) -> None:
        path = self.root / output.output_name
        if _staged_name(output) in staged:
            move(self.root / STAGED / _staged_name(output), path)
            return
        there = (
            _receipt(path, OutputReceipt) if path.is_file() else None
        )  # one of yesterday has the same name
        if there is None or there.key != output.key:
            raise TransientError(f"{path}: its staged file was taken away. Run the job again.")

    def _begun(self) -> set[str]:
        """Names of the files that publications were to move into place which were killed before their manifest."""
        path = self.root / PUBLISHING
        return set(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else set()

    def output_path(self, output: OutputReceipt) -> AnyPath:
        """Where the output file lies that `output` tells of: staged, or published already."""
        staged = self.root / STAGED / _staged_name(output)
        return staged if staged.exists() else self.root / output.output_name

    def _sweep(self, kept_keys: set[str]) -> None:
        """Delete answers that nothing published rests on, and what killed runs left half-written."""
        unlink_all(
            self.root,
            [path for path in self._answers() if path.name.split(".")[0] not in kept_keys],
        )
        partials = [
            *self.root.glob(f".*{PARTIAL}"),
            *(self.root / "_glmbatch").rglob(f".*{PARTIAL}"),
        ]
        unlink_all(self.root, partials)


@lru_cache(maxsize=4)
def _parsed_manifest(path: AnyPath, *stamp: int) -> Manifest:
    """Parsed once for each `stamp`, since every fragment asks."""
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise InputError(
            f"{path}: is not a manifest of glmbatch: {error.errors()[0]['msg']}. Set data.output."
        ) from error


def _staged_name(output: OutputReceipt) -> str:
    return f"{output.key}.{output.digest[:DIGEST_CHARS]}.parquet"


def _write(
    path: Path, schema: pa.Schema, batches: Iterator[pa.RecordBatch], receipt: BaseModel
) -> None:
    with writable(path):
        write_table(path, schema, batches, {RECEIPT: receipt.model_dump_json()})


def _write_list(path: AnyPath, rows: pa.Table) -> None:
    with committed(path) as partial, writable(path):
        write_table(partial, rows.schema, iter(rows.to_batches()), {})


def _receipt(path: AnyPath, kind: type[Receipt]) -> Receipt | None:
    """The receipt in the footer of `path`; None when there is no sound one."""
    try:
        text = footer_metadata(path, RECEIPT)
        return None if text is None else kind.model_validate_json(text)
    except (UnusableFile, ValidationError):
        return None


def _whole(folder: AnyPath, key: str, kind: type[Receipt]) -> tuple[Receipt, AnyPath] | None:
    """The receipt and path of the file under `key` in `folder` whose bytes match the digest in its name.

    One that does not match is deleted: it was damaged after it was committed.
    """
    for path in folder.glob(f"{key}.*.parquet"):
        receipt = _receipt(path, kind)
        try:
            whole = (
                receipt is not None and digest_file(path)[:DIGEST_CHARS] == path.name.split(".")[1]
            )
        except (
            FileNotFoundError
        ):  # replaced by a fragment with the same rows; its answers have the same key
            return _whole(folder, key, kind)
        if whole and receipt is not None:
            return receipt, path
        path.unlink(missing_ok=True)
    return None


def merged_manifest(  # noqa: PLR0913 - five facts about the run and one of the job's choice
    run: str,
    plan: Plan,
    before: Manifest | None,
    outputs: Sequence[OutputReceipt],
    unusable: Sequence[FileFault],
    *,
    keep_missing: bool = True,
    format: Literal["parquet", "delta"] = "parquet",
) -> Manifest:
    """What is published once `outputs` are.

    They replace the earlier files of their sources, and of sources with the same bytes that are there no more, which
    were renamed. Other sources stay, those that are there no more only with `keep_missing`. Of a source that could not
    be read whole tonight, earlier files of the same bytes stay where no new one covers their rows, and all of them
    where nothing of it could be read.
    """
    files = [_published_file(output) for output in outputs]
    earlier = before.files if before and before.limit is None else ()
    by_source: dict[str, list[PublishedFile]] = {}
    for file in files:
        by_source.setdefault(file.source, []).append(file)
    damaged, digests = {fault.source for fault in unusable}, {file.source_digest for file in files}

    def stays(old: PublishedFile) -> bool:
        new = by_source.get(old.source, [])
        if not new:
            renamed = old.source_digest in digests or not keep_missing
            return not renamed or (location(plan.root) / old.source).exists()
        covered = any(
            file.first_row < old.first_row + old.rows and old.first_row < file.first_row + file.rows
            for file in new
        )
        same = old.source_digest == new[0].source_digest and old.step_keys == new[0].step_keys
        return old.source in damaged and same and not covered

    stay = [old for old in earlier if stays(old)]
    kept = {file.output_name for file in [*stay, *files]}
    gone = set(before.replaced) if before else set()
    if (
        before is not None and before.format == "parquet"
    ):  # a Delta table's older versions need their files
        gone |= {file.output_name for file in before.files}
    return Manifest(
        run=run,
        root=plan.root,
        files=tuple(sorted([*stay, *files], key=lambda file: file.output_name)),
        replaced=tuple(sorted(gone - kept)),
        unusable=tuple(unusable),
        limit=plan.limit,
        format=format,
    )


def _published_file(output: OutputReceipt) -> PublishedFile:
    return PublishedFile(
        output_name=output.output_name,
        output_key=output.key,
        source=output.fragment.source,
        source_digest=output.fragment.digest,
        first_row=output.fragment.first_row,
        rows=output.fragment.rows,
        faulty_rows=output.faulty_rows,
        digest=output.digest,
        step_keys={answers.step: answers.step_key for answers in output.answers},
        answers_keys=tuple(answers.key for answers in output.answers),
    )
