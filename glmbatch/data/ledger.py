"""What is done, and how it becomes public. The output folder is the only memory; nothing here knows of models.

    OUTPUT/<the input's folders>/<file>-<first row>.parquet    published rows
    OUTPUT/_manifest.json                                      what is published; written last
    OUTPUT/_quarantine.parquet                                 rows that failed, with file, row and reason
    OUTPUT/_glmbatch/answers/<answers key>.<digest>.parquet    answers of one step over one fragment
    OUTPUT/_glmbatch/staged/...                                output files that wait for publication

Each file carries its receipt in its footer and appears by one rename, so a kill at any moment leaves it whole or
absent, and running again finds it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
from pydantic import BaseModel, ValidationError

from glmbatch.data.fragments import FileFault, Fragment
from glmbatch.data.parquet import footer_metadata, open_parquet, write_table
from glmbatch.data.storage import PARTIAL, commit, committed, digest_file, partial_beside, writable
from glmbatch.errors import InputError, UnusableFile

DIGEST_CHARS = 32
RECEIPT = "glmbatch.receipt"
MANIFEST = "_manifest.json"
QUARANTINE = "_quarantine.parquet"
ANSWERS = "_glmbatch/answers"
STAGED = "_glmbatch/staged"
RESULTS = "_glmbatch/results"


class AnswersReceipt(BaseModel, frozen=True, extra="forbid"):
    """What became of one step over one fragment. `run` is the run that computed it; seconds are of wall time.

    `computed_rows` went through the model: fewer than `rows` where rows repeat or have no prompt. `unusable` says why
    the fragment's rows cannot be read; then there are no answers.
    """

    key: str
    run: str
    fragment: str
    step: str
    step_key: str
    rows: int
    computed_rows: int = 0
    faults: dict[str, int] = {}
    labels: dict[str, int] = {}
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
    source: str
    source_digest: str
    first_row: int
    rows: int
    faulty_rows: int
    digest: str
    step_keys: dict[str, str]
    answers_keys: tuple[str, ...]


class Manifest(BaseModel, frozen=True, extra="forbid"):
    """What is published: the last thing a run writes. A reader that wants all or nothing waits for it."""

    run: str
    files: tuple[PublishedFile, ...]
    unusable: tuple[FileFault, ...] = ()
    limit: int | None = None


Receipt = TypeVar("Receipt", bound=BaseModel)


class Ledger:
    """The output folder of one job."""

    def __init__(self, output: str | Path) -> None:
        self.root = Path(output)

    def prepare(self) -> None:
        """Make the folder and prove that it can be written; InputError when not."""
        probe = self.root / "_glmbatch" / "writable"
        with committed(probe) as partial, writable(probe):
            partial.write_bytes(b"")
        probe.unlink(missing_ok=True)

    def find_answers(self, key: str) -> tuple[AnswersReceipt, Path] | None:
        """The answers under `key`, when a file holds them whole (its bytes match the digest in its name)."""
        for path in (self.root / ANSWERS).glob(f"{key}.*.parquet"):
            receipt = _receipt(path, AnswersReceipt)
            if receipt is not None and digest_file(path)[:DIGEST_CHARS] == path.name.split(".")[1]:
                return receipt, path
            path.unlink(missing_ok=True)
        return None

    def keep_answers(self, receipt: AnswersReceipt, table: pa.Table) -> None:
        """Commit the answers of one step over one fragment; safe to repeat."""
        folder = self.root / ANSWERS
        with partial_beside(folder / receipt.key) as partial:
            _write(partial, table.schema, iter(table.to_batches()), receipt)
            commit(partial, folder / f"{receipt.key}.{digest_file(partial)[:DIGEST_CHARS]}.parquet")

    def read_answers(self, key: str) -> pa.Table:
        """The answers under `key`; they are known to be there."""
        found = self.find_answers(key)
        if found is None:
            raise UnusableFile(f"{self.root / ANSWERS}: the answers {key} are gone. Run the job again.")
        with open_parquet(found[1]) as file:
            answers: pa.Table = file.read()
        return answers

    def find_output(self, key: str, output_name: str) -> OutputReceipt | None:
        """The output file under `key`, staged or published, with the digest of its bytes."""
        for path in (self.root / STAGED / output_name, self.root / output_name):
            receipt = _receipt(path, OutputReceipt)
            if receipt is not None and receipt.key == key:
                return receipt.model_copy(update={"digest": digest_file(path)})
        return None

    def stage_output(
        self, receipt: OutputReceipt, schema: pa.Schema, batches: Iterator[pa.RecordBatch]
    ) -> OutputReceipt:
        """Commit one output file where no reader looks; returns its receipt with the digest of its bytes."""
        path = self.root / STAGED / receipt.output_name
        with committed(path) as partial:
            _write(partial, schema, batches, receipt)
            digest = digest_file(partial)
        return receipt.model_copy(update={"digest": digest})

    def manifest(self) -> Manifest | None:
        """What is published; None when nothing is."""
        path = self.root / MANIFEST
        if not path.is_file():
            return None
        try:
            return Manifest.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise InputError(
                f"{path}: is not a manifest of glmbatch: {error.errors()[0]['msg']}. Set data.output."
            ) from error

    def publish(self, manifest: Manifest, outputs: Sequence[OutputReceipt], quarantine: pa.Table) -> None:
        """Move what is staged into place, take away what it replaces, write the manifest last; safe to repeat."""
        before = self.manifest()
        for output in outputs:
            staged, public = self.root / STAGED / output.output_name, self.root / output.output_name
            if staged.exists():
                with writable(public):
                    public.parent.mkdir(parents=True, exist_ok=True)
                commit(staged, public)
        with committed(self.root / QUARANTINE) as partial:
            write_table(partial, quarantine.schema, iter(quarantine.to_batches()), {})
        with committed(self.root / MANIFEST) as partial:
            partial.write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
        kept = {file.output_name for file in manifest.files}
        for file in before.files if before else ():
            if file.output_name not in kept:
                (self.root / file.output_name).unlink(missing_ok=True)
        shutil.rmtree(self.root / STAGED, ignore_errors=True)
        self._sweep({key for file in manifest.files for key in file.answers_keys})

    def _sweep(self, kept_keys: set[str]) -> None:
        """Delete answers that nothing published rests on, and what killed runs left half-written."""
        for path in (self.root / ANSWERS).glob("*.parquet"):
            if path.name.split(".")[0] not in kept_keys:
                path.unlink(missing_ok=True)
        for partial in [*self.root.glob(f".*{PARTIAL}"), *(self.root / "_glmbatch").rglob(f".*{PARTIAL}")]:
            partial.unlink(missing_ok=True)


def _write(path: Path, schema: pa.Schema, batches: Iterator[pa.RecordBatch], receipt: BaseModel) -> None:
    with writable(path):
        write_table(path, schema, batches, {RECEIPT: receipt.model_dump_json()})


def _receipt(path: Path, kind: type[Receipt]) -> Receipt | None:
    """The receipt in the footer of `path`; None when there is no sound one."""
    try:
        text = footer_metadata(path, RECEIPT)
        return None if text is None else kind.model_validate_json(text)
    except (UnusableFile, ValidationError):
        return None


def merged_manifest(
    run: str,
    before: Manifest | None,
    outputs: Sequence[OutputReceipt],
    unusable: Sequence[FileFault],
    limit: int | None,
) -> Manifest:
    """What is published once `outputs` are: they replace the earlier files of their sources; other sources stay.

    Of a source that could not be read whole tonight, earlier files stay where no new one covers their rows, so that
    a damaged file loses nothing.
    """
    files = [
        PublishedFile(
            output_name=output.output_name,
            source=output.fragment.source,
            source_digest=output.fragment.digest,
            first_row=output.fragment.first_row,
            rows=output.fragment.rows,
            faulty_rows=output.faulty_rows,
            digest=output.digest,
            step_keys={answers.step: answers.step_key for answers in output.answers},
            answers_keys=tuple(answers.key for answers in output.answers),
        )
        for output in outputs
    ]
    damaged = {fault.source for fault in unusable}

    def replaces(new: PublishedFile, old: PublishedFile) -> bool:
        overlap = new.first_row < old.first_row + old.rows and old.first_row < new.first_row + new.rows
        return new.source == old.source and (new.source not in damaged or overlap or new.output_name == old.output_name)

    by_source: dict[str, list[PublishedFile]] = {}
    for file in files:
        by_source.setdefault(file.source, []).append(file)
    stay = [
        old
        for old in (before.files if before else ())
        if not any(replaces(new, old) for new in by_source.get(old.source, ()))
    ]
    return Manifest(
        run=run,
        files=tuple(sorted([*stay, *files], key=lambda file: file.output_name)),
        unusable=tuple(unusable),
        limit=limit,
    )
