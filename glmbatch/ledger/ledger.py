"""The output folder is the only memory of what is done. Nothing here knows of models.

    OUTPUT/_glmbatch/answers/<answers key>.<digest>.parquet    answers of one step over one fragment
    OUTPUT/_glmbatch/staged/<output key>.<digest>.parquet      output files before publication
    OUTPUT/_glmbatch/lock                                      of the run; in a store lock.<number>

Each file carries its receipt in its footer and appears by one rename. A kill at any moment leaves
it whole or absent, and the next run finds it. What is public lies beside these: see publication.py.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

import pyarrow as pa

from glmbatch.errors import InputError, TransientError, UnusableFile
from glmbatch.ledger.delta import LOG
from glmbatch.ledger.known import AnswerFile
from glmbatch.ledger.manifest import Manifest, PublishedFile, read_manifest
from glmbatch.ledger.quarantine import OWN
from glmbatch.ledger.receipts import (
    AnswersReceipt,
    OutputReceipt,
    Receipt,
    digest_in_name,
    find_whole,
    key_in_name,
    read_receipt,
    read_with_receipt,
    whole_digest,
    write_with_receipt,
)
from glmbatch.ledger.recent import Content, Recent
from glmbatch.store.files import (
    DIGEST_CHARS,
    commit,
    digest_file,
    partial_beside,
    reachable,
    writable,
)
from glmbatch.store.folder import Folder
from glmbatch.store.locks import hold, release
from glmbatch.store.modes import narrow
from glmbatch.store.paths import AnyPath, unlink_all

ANSWERS = "_glmbatch/answers"
STAGED = "_glmbatch/staged"
RESULTS = "_glmbatch/results"
LOCK = "_glmbatch/lock"


class Ledger:
    """The output folder of one job. Safe to use from threads; a run has one in each process."""

    def __init__(self, output: str | Path) -> None:
        self.folder = Folder(output)
        self.root = self.folder.path
        self._committing = threading.Lock()
        self._recent = Recent()

    def open(self, run: str = "") -> None:
        """Make the folder, prove that it can be written, and lock it for `run` until `close`.

        InputError when it cannot be written or another run holds it. The lock of a process that
        died is free; in a store, after some minutes.
        """
        self._refuse_links()
        hold(self.root / LOCK, run)

    def keep_private(self, sources: Iterable[str]) -> None:
        """Let nobody look at what is kept for runs who may not read all of `sources`."""
        narrow(self.root / OWN, sources)

    def _refuse_links(self) -> None:
        """InputError when a folder that is written to without being asked for leads elsewhere."""
        local = self.folder.local
        if local is None:
            return
        own = local / OWN
        with writable(own):
            inside = [*own.iterdir()] if own.is_dir() else []
        for path in (own, *inside, local / LOG):
            if path.is_symlink() and path.is_dir():
                raise InputError(
                    f"{path}: is a link to a folder, and nothing is written or deleted behind one. "
                    "Replace it by a folder, or set data.output."
                )

    def close(self, run: str = "") -> None:
        """Let others write to the folder, if `run` holds it."""
        release(self.root / LOCK, run)

    def results_folder(self) -> Path | None:
        """Where Prefect may keep the results of the run's tasks; None where that is a store."""
        local = self.folder.local
        return None if local is None else local.resolve() / RESULTS

    def manifest(self) -> Manifest | None:
        """What is published; None when nothing is."""
        return read_manifest(self.root)

    def find_answers(
        self, key: str, run: str, earlier: Mapping[str, str] | None = None
    ) -> AnswersReceipt | None:
        """The answers under `key` that `run` may use: whole, and with nothing to ask again.

        Rows on which the model failed are asked again by each new run; those of `run` stand. So are
        rows that had no prompt because of such a failure: `earlier` maps the steps that the prompts
        use to their answers keys.
        """
        whole = self._find(self.root / ANSWERS, key, AnswersReceipt)
        if whole is None:
            return None
        receipt, _, _ = whole
        # A retried task of the same run takes its own failures as they are.
        if "model_failed" in receipt.faults and receipt.run != run:
            return None
        if "earlier_step_failed" in receipt.faults:
            for step, earlier_key in (earlier or {}).items():
                before = self.find_answers(earlier_key, run)
                if before is None or before.run != receipt.earlier.get(step):
                    return None
        return receipt

    def answers_receipt(self, key: str) -> AnswersReceipt:
        """The receipt of the committed answers under `key`. TransientError if there are none."""
        whole = self._find(self.root / ANSWERS, key, AnswersReceipt)
        if whole is None:
            raise self._missing(key)
        return whole[0]

    def read_answers(self, key: str) -> tuple[AnswersReceipt, pa.Table]:
        """The receipt and the table of the answers under `key`. TransientError without any."""
        whole = find_whole(self.root / ANSWERS, key)
        if whole is None:
            raise self._missing(key)
        path, _ = whole
        # Its bytes were digested just now, so what is in memory is what is on disk.
        content = self._recent.find(path.name)
        if content is not None and content.table is not None:
            return cast(AnswersReceipt, content.receipt), content.table
        try:
            read = read_with_receipt(path, AnswersReceipt)
        except UnusableFile:
            if path.exists():
                raise
            return self.read_answers(key)  # another process had committed the same
        if read is None:
            path.unlink(missing_ok=True)
            raise self._missing(key)
        self._recent.keep(path.name, Content(*read))
        return read

    def _missing(self, key: str) -> TransientError:
        # Another machine of a cluster may have just written them, and a shared folder may not show
        # them yet.
        return TransientError(
            f"{self.root / ANSWERS}: the answers {key} are not there. Run the job again."
        )

    def _find(
        self, folder: AnyPath, key: str, kind: type[Receipt]
    ) -> tuple[Receipt, AnyPath, str] | None:
        """The receipt, path and digest of the file under `key` in `folder`, if it is whole."""
        whole = find_whole(folder, key)
        if whole is None:
            return None
        path, digest = whole
        receipt = self._receipt_of(path, kind)
        if receipt is not None and getattr(receipt, "key", None) == key:
            return receipt, path, digest
        if path.exists():
            path.unlink(missing_ok=True)
            return None
        return self._find(folder, key, kind)  # another process had committed the same

    def _receipt_of(self, path: AnyPath, kind: type[Receipt]) -> Receipt | None:
        """The receipt of a file whose bytes match its name; None when it has no sound one."""
        content = self._recent.find(path.name)
        if content is not None:
            return cast(Receipt, content.receipt)
        receipt = read_receipt(path, kind)
        if receipt is not None:
            self._recent.keep(path.name, Content(receipt, None))
        return receipt

    def keep_answers(self, receipt: AnswersReceipt, table: pa.Table) -> AnswerFile:
        """Commit the answers of a step over a fragment, replacing earlier ones; safe to repeat."""
        # Fragments with the same rows have the same key.
        with self._committing, writable(self.root / ANSWERS):
            return self._keep_answers(receipt, table)

    def _keep_answers(self, receipt: AnswersReceipt, table: pa.Table) -> AnswerFile:
        folder = self.root / ANSWERS
        whole = self._find(folder, receipt.key, AnswersReceipt)
        if whole is not None and whole[0].run == receipt.run:
            return AnswerFile(whole[1], receipt.step, digest_in_name(whole[1]))
        with partial_beside(folder / receipt.key) as partial:
            write_with_receipt(partial, table.schema, iter(table.to_batches()), receipt)
            name = _file_name(receipt.key, digest_file(partial))
            commit(partial, folder / name)
        # As the file has it, so that it is the same whether it comes from here or from there.
        written = AnswersReceipt.model_validate_json(receipt.model_dump_json())
        self._recent.keep(name, Content(written, table))
        mine: list[AnyPath] = []
        others: list[AnyPath] = []
        for path in folder.glob(f"{receipt.key}.*.parquet"):
            other = self._receipt_of(path, AnswersReceipt)
            (mine if other is not None and other.run == receipt.run else others).append(path)
        # Another process may commit the same at once: both keep the same one, so that neither
        # deletes the last.
        first = min(mine)
        unlink_all(folder, [path for path in [*others, *mine] if path != first])
        return AnswerFile(first, receipt.step, digest_in_name(first))

    def answer_files(self, step_key: str) -> Iterator[AnswerFile]:
        """Every committed file with answers under `step_key`, the unpublished ones first.

        In this order since a killed publication may have put other bytes in the place of a
        published file.
        """
        for path, receipt in self._unpublished():
            if receipt.step_key == step_key:
                yield AnswerFile(path, receipt.step, digest_in_name(path))
        for file in self._published():
            for step, key in file.step_keys.items():
                if key == step_key:
                    yield AnswerFile(self.root / file.output_name, step, file.digest)

    def unpublished_receipts(self) -> Iterator[AnswersReceipt]:
        """Receipts of committed, unpublished answers, including retries of rows that failed."""
        published = {(receipt.key, receipt.run) for receipt in self.published_receipts()}
        for _, receipt in self._receipts(self._answers(), AnswersReceipt):
            if (receipt.key, receipt.run) not in published:
                yield receipt

    def published_receipts(self) -> Iterator[AnswersReceipt]:
        """The receipts of all published answers, as their files' footers have them."""
        paths = [self.root / file.output_name for file in self._published()]
        for _, receipt in self._receipts(paths, OutputReceipt):
            yield from receipt.answers

    def _unpublished(self) -> Iterator[tuple[AnyPath, AnswersReceipt]]:
        published: set[str] = set()
        for file in self._published():
            published.update(file.answers_keys)
        paths = [path for path in self._answers() if key_in_name(path) not in published]
        yield from self._receipts(paths, AnswersReceipt)

    def _receipts(
        self, paths: Iterable[AnyPath], kind: type[Receipt]
    ) -> Iterator[tuple[AnyPath, Receipt]]:
        """Each of `paths` that holds a sound receipt, with it."""

        def read(path: AnyPath) -> tuple[AnyPath, Receipt | None]:
            # Not digested here: whoever takes the answers themselves proves the file first.
            content = self._recent.find(path.name)
            if content is not None:
                return path, cast(Receipt, content.receipt)
            return path, read_receipt(path, kind)

        for path, receipt in self.folder.map(read, paths):
            if receipt is not None:
                yield path, receipt

    def _answers(self) -> list[AnyPath]:
        with reachable(self.root / ANSWERS):
            paths: list[AnyPath] = [*(self.root / ANSWERS).glob("*.parquet")]
            return sorted(paths)

    def _published(self) -> tuple[PublishedFile, ...]:
        manifest = self.manifest()
        return manifest.files if manifest else ()

    def find_output(self, key: str, answers: Sequence[AnswersReceipt]) -> OutputReceipt | None:
        """The whole output file under `key`, staged or published, with just these `answers`."""
        staged = self._find(self.root / STAGED, key, OutputReceipt)
        if staged is not None:
            receipt, _, digest = staged
        else:
            published = {file.output_key: file for file in self._published()}.get(key)
            if published is None:
                return None
            path = self.root / published.output_name
            read = read_receipt(path, OutputReceipt)
            digest = published.digest
            if read is None or read.key != key or whole_digest(path) != digest:
                return None
            receipt = read
        # The footer cannot hold the digest of the bytes that it is a part of.
        receipt = receipt.model_copy(update={"digest": digest})
        return receipt if receipt.answers == tuple(answers) else None

    def stage_output(
        self,
        receipt: OutputReceipt,
        schema: pa.Schema,
        batches: Iterator[pa.RecordBatch],
        *,
        utc_times: bool = False,
    ) -> OutputReceipt:
        """Commit an output file where no reader looks; returns its receipt, with its digest."""
        folder = self.root / STAGED
        with writable(folder), partial_beside(folder / receipt.key) as partial:
            write_with_receipt(partial, schema, batches, receipt, utc_times=utc_times)
            narrow(partial, [receipt.fragment.path])
            digest = digest_file(partial)
            unlink_all(folder, folder.glob(f"{receipt.key}.*.parquet"))
            receipt = receipt.model_copy(update={"digest": digest})
            commit(partial, folder / staged_name(receipt))
        return receipt

    def output_path(self, output: OutputReceipt) -> AnyPath:
        """Where the file of `output` lies: staged, or published already."""
        staged = self.root / STAGED / staged_name(output)
        return staged if staged.exists() else self.root / output.output_name


def _file_name(key: str, digest: str) -> str:
    return f"{key}.{digest[:DIGEST_CHARS]}.parquet"


def staged_name(output: OutputReceipt) -> str:
    """The name of the file of `output` while it waits for publication."""
    return _file_name(output.key, output.digest)
