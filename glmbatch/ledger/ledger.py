"""The ledger: the output folder as the only record of the work done. Knows no models.

    OUTPUT/_glmbatch/answers/<answers key>.<digest>.parquet    answers of one step over one fragment
    OUTPUT/_glmbatch/staged/<output key>.<digest>.parquet      output files before publication
    OUTPUT/_glmbatch/lock                                      of the run; in a store lock.<number>

Each file has its receipt in its footer and appears by one rename. A kill at any moment leaves the
file complete or absent, and the next run finds it. See publication.py for the published files.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

import pyarrow as pa

from glmbatch.errors import InputError, TransientError, UnusableFile
from glmbatch.ledger.delta.table import LOG
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
    """The output folder of one job. Safe to use from several threads; one per run and process.

    `folder` is the output folder, and `root` its path or address.
    """

    def __init__(self, output: str | Path) -> None:
        self.folder = Folder(output)
        self.root = self.folder.path
        self._committing = threading.Lock()
        self._recent = Recent()

    def open(self, run: str = "") -> None:
        """Create the folder, check that it can be written, and lock it for `run` until `close`.

        The lock of a process that died is free: on a disk at once, in a store after some minutes.
        InputError when the folder cannot be written or another run holds it. TransientError when
        the machine failed.
        """
        self._refuse_links()
        hold(self.root / LOCK, run)

    def keep_private(self, sources: Iterable[str]) -> None:
        """Restrict `_glmbatch` to users who may read all of `sources`; safe to repeat."""
        narrow(self.root / OWN, sources)

    def _refuse_links(self) -> None:
        """InputError when a folder that glmbatch writes to of its own accord is a link."""
        local = self.folder.local
        if local is None:
            return
        own = local / OWN
        with writable(own):
            inside = [*own.iterdir()] if own.is_dir() else []
        for path in (own, *inside, local / LOG):
            if path.is_symlink() and path.is_dir():
                raise InputError(
                    f"{path}: is a link to a folder, and glmbatch never writes or deletes through "
                    "one. Replace it with a folder, or set data.output."
                )

    def close(self, run: str = "") -> None:
        """Release the lock if `run` holds it; safe to repeat."""
        release(self.root / LOCK, run)

    def results_folder(self) -> Path | None:
        """Where Prefect may keep the results of the run's tasks; None if the output is a store."""
        local = self.folder.local
        return None if local is None else local.resolve() / RESULTS

    def manifest(self) -> Manifest | None:
        """What is published; None if nothing is. Raises as `read_manifest`."""
        return read_manifest(self.root)

    def find_answers(
        self, key: str, run: str, earlier: Mapping[str, str] | None = None
    ) -> AnswersReceipt | None:
        """The receipt of the answers under `key`, if they are whole and `run` need not ask again.

        Each new run asks again about rows on which the model failed, and about rows without a
        prompt because of such a failure in an earlier step. `earlier` maps the steps that the
        prompts use to their answers keys. Failures of `run` itself are not asked again.
        """
        whole = self._find(self.root / ANSWERS, key, AnswersReceipt)
        if whole is None:
            return None
        receipt, _, _ = whole
        # A retried task of the same run keeps the failures that it committed.
        if "model_failed" in receipt.faults and receipt.run != run:
            return None
        if "earlier_step_failed" in receipt.faults:
            for step, earlier_key in (earlier or {}).items():
                before = self.find_answers(earlier_key, run)
                if before is None or before.run != receipt.earlier.get(step):
                    return None
        return receipt

    def answers_receipt(self, key: str) -> AnswersReceipt:
        """The receipt of the committed answers under `key`. TransientError when there are none."""
        whole = self._find(self.root / ANSWERS, key, AnswersReceipt)
        if whole is None:
            raise self._missing(key)
        return whole[0]

    def read_answers(self, key: str) -> tuple[AnswersReceipt, pa.Table]:
        """The receipt of the answers under `key`, and their table in the fragment's row order.

        TransientError when there are none.
        """
        whole = find_whole(self.root / ANSWERS, key)
        if whole is None:
            raise self._missing(key)
        path, _ = whole
        # The file was digested just now, so the copy in memory matches it.
        content = self._recent.find(path.name)
        if content is not None and content.table is not None:
            return cast(AnswersReceipt, content.receipt), content.table
        try:
            read = read_with_receipt(path, AnswersReceipt)
        except UnusableFile:
            if path.exists():
                raise
            return self.read_answers(key)  # another process has just replaced it
        if read is None:
            path.unlink(missing_ok=True)
            raise self._missing(key)
        self._recent.keep(path.name, Content(*read))
        return read

    def _missing(self, key: str) -> TransientError:
        # Transient, because a shared folder may show another machine's new files late.
        return TransientError(
            f"{self.root / ANSWERS}: the answers {key} are missing. Run the job again."
        )

    def _find(
        self, folder: AnyPath, key: str, kind: type[Receipt]
    ) -> tuple[Receipt, AnyPath, str] | None:
        """The receipt, path and digest of the file under `key` in `folder`; None without one.

        Deletes a file whose receipt is not valid or has another key.
        """
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
        return self._find(folder, key, kind)  # another process has just replaced it

    def _receipt_of(self, path: AnyPath, kind: type[Receipt]) -> Receipt | None:
        """The receipt of a file whose bytes match its name; None if it has no valid one."""
        content = self._recent.find(path.name)
        if content is not None:
            return cast(Receipt, content.receipt)
        receipt = read_receipt(path, kind)
        if receipt is not None:
            self._recent.keep(path.name, Content(receipt, None))
        return receipt

    def keep_answers(self, receipt: AnswersReceipt, table: pa.Table) -> AnswerFile:
        """Commit the answers of a step over a fragment, in row order, and return their file.

        Replaces the answers of earlier runs under the same key. Safe to repeat: answers that the
        same run has committed stay. InputError when the output cannot be written.
        """
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
        # Through JSON, so that the cached receipt equals the one in the file.
        written = AnswersReceipt.model_validate_json(receipt.model_dump_json())
        self._recent.keep(name, Content(written, table))
        mine: list[AnyPath] = []
        others: list[AnyPath] = []
        for path in folder.glob(f"{receipt.key}.*.parquet"):
            other = self._receipt_of(path, AnswersReceipt)
            (mine if other is not None and other.run == receipt.run else others).append(path)
        # Another process may commit the same answers now. Both keep the first by name, so that
        # neither deletes the other's last file.
        first = min(mine)
        unlink_all(folder, [path for path in [*others, *mine] if path != first])
        return AnswerFile(first, receipt.step, digest_in_name(first))

    def answer_files(self, step_key: str) -> Iterator[AnswerFile]:
        """Every committed file with answers under `step_key`, the unpublished ones first.

        The order matters: a killed publication may have replaced the bytes of a published file.
        """
        for path, receipt in self._unpublished():
            if receipt.step_key == step_key:
                yield AnswerFile(path, receipt.step, digest_in_name(path))
        for file in self._published():
            for step, key in file.step_keys.items():
                if key == step_key:
                    yield AnswerFile(self.root / file.output_name, step, file.digest)

    def unpublished_receipts(self) -> Iterator[AnswersReceipt]:
        """The receipts of committed but unpublished answers, including retries of failed rows."""
        published = {(receipt.key, receipt.run) for receipt in self.published_receipts()}
        for _, receipt in self._receipts(self._answers(), AnswersReceipt):
            if (receipt.key, receipt.run) not in published:
                yield receipt

    def published_receipts(self) -> Iterator[AnswersReceipt]:
        """The receipts of all published answers, from the footers of their files."""
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
        """Each of `paths` that has a valid receipt, with its receipt."""

        def read(path: AnyPath) -> tuple[AnyPath, Receipt | None]:
            # Not digested here: every reader of the answers checks the file first.
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
        """The receipt of a whole file under `key`, staged or published, with exactly `answers`.

        None if there is no such file.
        """
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
        # Filled in here, because a footer cannot contain the digest of its own file.
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
        """Commit an output file out of readers' sight; return its receipt with the digest.

        Replaces an earlier file under the same key; safe to repeat. Users who may not read the
        source may not read the file. InputError when it cannot be written; errors of `batches`
        pass through, and then nothing is committed.
        """
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
        """The path of the file of `output`: in the staging folder, or where it is published."""
        staged = self.root / STAGED / staged_name(output)
        return staged if staged.exists() else self.root / output.output_name


def _file_name(key: str, digest: str) -> str:
    return f"{key}.{digest[:DIGEST_CHARS]}.parquet"


def staged_name(output: OutputReceipt) -> str:
    """The name of the staged file of `output`."""
    return _file_name(output.key, output.digest)
