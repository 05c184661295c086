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
from itertools import chain
from pathlib import Path

import pyarrow as pa

from glmbatch.errors import InputError, TransientError
from glmbatch.ledger.committed import CommittedFiles, Content, Recent
from glmbatch.ledger.delta.table import LOG
from glmbatch.ledger.known.keeping import StoredKeys
from glmbatch.ledger.known.keys import AnswerFile, keys_of
from glmbatch.ledger.known.stored import KEYS, StoredSegment
from glmbatch.ledger.manifest import Manifest, PublishedFile, read_manifest
from glmbatch.ledger.quarantine import OWN
from glmbatch.ledger.receipts import (
    AnswersReceipt,
    OutputReceipt,
    digest_in_name,
    file_name,
    key_in_name,
    read_receipt,
    whole_digest,
    write_with_receipt,
)
from glmbatch.store.files import Digests, digest_file, partial_beside, writable
from glmbatch.store.folder import Folder
from glmbatch.store.locks import hold, release
from glmbatch.store.modes import narrow
from glmbatch.store.paths import AnyPath

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
        self._digests = Digests()
        self._answers = CommittedFiles(self.root / ANSWERS, AnswersReceipt, self._digests)
        self._staged = CommittedFiles(self.root / STAGED, OutputReceipt, self._digests)
        self._published_receipts: Recent[OutputReceipt] = Recent()
        self._by_key: tuple[Manifest | None, dict[str, PublishedFile]] = None, {}
        local = self.folder.local
        # In a store the index of known answers is in memory alone.
        self._keys = None if local is None else StoredKeys(local / KEYS)
        self._committing = threading.Lock()

    def open(self, run: str = "", *, shared: bool = False) -> None:
        """Create the folder, check that it can be written, and lock it for `run` until `close`.

        `shared`: other processes of the run commit files to it too. The lock of a process that died
        is free: on a disk at once, in a store after some minutes. InputError when the folder cannot
        be written or another run holds it. TransientError when the machine failed.
        """
        self._refuse_links()
        hold(self.root / LOCK, run)
        self._trust_listings(not shared)
        if self._keys is not None:
            self._keys.is_writer = True

    def _trust_listings(self, alone: bool) -> None:
        for files in (self._answers, self._staged):
            files.names.forget()
            files.names.alone = alone

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
        self._trust_listings(False)
        if self._keys is not None:
            self._keys.is_writer = False
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
        whole = self._answers.find(key)
        if whole is None:
            return None
        receipt = whole.receipt
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
        whole = self._answers.find(key)
        if whole is None:
            raise self._missing(key)
        return whole.receipt

    def read_answers(self, key: str) -> tuple[AnswersReceipt, pa.Table]:
        """The receipt of the answers under `key`, and their table in the fragment's row order.

        TransientError when there are none.
        """
        read = self._answers.read(key)
        if read is None:
            raise self._missing(key)
        return read

    def _missing(self, key: str) -> TransientError:
        # Transient, because a shared folder may show another machine's new files late.
        return TransientError(
            f"{self.root / ANSWERS}: the answers {key} are missing. Run the job again."
        )

    def keep_answers(self, receipt: AnswersReceipt, table: pa.Table) -> AnswerFile:
        """Commit the answers of a step over a fragment, in row order, and return their file.

        Replaces the answers of earlier runs under the same key. Safe to repeat: answers that the
        same run has committed stay. InputError when the output cannot be written.
        """
        # Fragments with the same rows have the same key.
        with self._committing, writable(self.root / ANSWERS):
            return self._keep_answers(receipt, table)

    def _keep_answers(self, receipt: AnswersReceipt, table: pa.Table) -> AnswerFile:
        files = self._answers
        whole = files.find(receipt.key)
        if whole is not None and whole.receipt.run == receipt.run:
            return AnswerFile(whole.path, receipt.step, digest_in_name(whole.path))
        with partial_beside(files.folder / receipt.key) as partial:
            write_with_receipt(partial, table.schema, iter(table.to_batches()), receipt)
            # Through JSON, so that the cached receipt equals the one in the file.
            written = AnswersReceipt.model_validate_json(receipt.model_dump_json())
            files.commit(partial, receipt.key, digest_file(partial), Content(written, table))
        mine: list[AnyPath] = []
        others: list[AnyPath] = []
        for path in files.paths(receipt.key):
            other = files.receipt(path)
            (mine if other is not None and other.run == receipt.run else others).append(path)
        # Another process may commit the same answers now. Both keep the first by name, so that
        # neither deletes the other's last file.
        first = min(mine)
        files.remove(path for path in [*others, *mine] if path != first)
        return AnswerFile(first, receipt.step, digest_in_name(first))

    def answer_files(self, step_key: str) -> Iterator[AnswerFile]:
        """Every committed file with answers under `step_key`, the unpublished ones first.

        The order matters: a killed publication may have replaced the bytes of a published file.
        """
        for path, receipt in self._unpublished():
            if receipt.step_key == step_key:
                yield AnswerFile(path, receipt.step, digest_in_name(path))
        yield from self._published_answers(step_key, self._published())

    def _published_answers(
        self, step_key: str, files: Iterable[PublishedFile]
    ) -> Iterator[AnswerFile]:
        for file in files:
            for step, key in file.step_keys.items():
                if key == step_key:
                    path = self.root / file.output_name
                    yield AnswerFile(path, step, file.digest, is_published=True)

    def stored_keys(self, step_key: str, files: Sequence[AnswerFile]) -> list[StoredSegment]:
        """The segments on disk over the published ones of `files`, which have all of a step key."""
        if self._keys is None:
            return []
        return self._keys.cover(step_key, [file for file in files if file.is_published])

    def note_keys(self, output: OutputReceipt, tables: Sequence[pa.Table]) -> None:
        """Note the row keys of a staged file, which has the answers `tables`, for the index."""
        if self._keys is not None:
            for answers, table in zip(output.answers, tables, strict=True):
                keys = keys_of(table, answers.step, output.output_name)
                self._keys.note(answers.step_key, output.digest, keys)

    def index_keys(self, manifest: Manifest) -> None:
        """Write the row keys of what was published just now to the index on disk."""
        self._by_key = None, {}  # takes memory, and is out of date
        if self._keys is None:
            return
        step_keys = set(chain(*(file.step_keys.values() for file in manifest.files)))
        self._keys.write_noted(step_keys)
        if not self._answers.names.alone:  # other processes wrote the files, and noted nothing
            for step_key in step_keys:
                self._keys.cover(step_key, list(self._published_answers(step_key, manifest.files)))

    def unpublished_receipts(self) -> Iterator[AnswersReceipt]:
        """The receipts of committed but unpublished answers, including retries of failed rows."""
        published = {(receipt.key, receipt.run) for receipt in self.published_receipts()}
        for _, receipt in self._receipts(self._answers.paths()):
            if (receipt.key, receipt.run) not in published:
                yield receipt

    def published_receipts(self) -> Iterator[AnswersReceipt]:
        """The receipts of all published answers, from the footers of their files."""
        paths = [self.root / file.output_name for file in self._published()]
        for receipt in self.folder.map(lambda path: read_receipt(path, OutputReceipt), paths):
            if receipt is not None:
                yield from receipt.answers

    def _unpublished(self) -> Iterator[tuple[AnyPath, AnswersReceipt]]:
        published: set[str] = set()
        for file in self._published():
            published.update(file.answers_keys)
        paths = [path for path in self._answers.paths() if key_in_name(path) not in published]
        yield from self._receipts(paths)

    def _receipts(self, paths: Iterable[AnyPath]) -> Iterator[tuple[AnyPath, AnswersReceipt]]:
        """Each of the answers `paths` that has a valid receipt, with its receipt."""
        for path, receipt in self.folder.map(
            lambda path: (path, self._answers.receipt(path)), paths
        ):
            if receipt is not None:
                yield path, receipt

    def _published(self) -> tuple[PublishedFile, ...]:
        manifest = self.manifest()
        return manifest.files if manifest else ()

    def _published_as(self, key: str) -> PublishedFile | None:
        manifest, by_key = self._by_key
        now = self.manifest()
        if now is not manifest:
            by_key = {file.output_key: file for file in now.files} if now else {}
            self._by_key = now, by_key
        return by_key.get(key)

    def find_output(self, key: str, answers: Sequence[AnswersReceipt]) -> OutputReceipt | None:
        """The receipt of a whole file under `key`, staged or published, with exactly `answers`.

        None if there is no such file.
        """
        staged = self._staged.find(key)
        if staged is not None:
            # Filled in here, because a footer cannot contain the digest of its own file.
            receipt = staged.receipt.model_copy(update={"digest": staged.digest})
        else:
            file = self._published_as(key)
            published = None if file is None else self.published(file.output_name, file.digest)
            if published is None or published.key != key:
                return None
            receipt = published
        return receipt if receipt.answers == tuple(answers) else None

    def published(self, name: str, digest: str) -> OutputReceipt | None:
        """The receipt of the published file `name` if its SHA-256 is `digest`, else None."""
        path = self.root / name
        try:
            if whole_digest(path, self._digests) != digest:
                return None
        except FileNotFoundError:
            return None
        content = self._published_receipts.find(digest)
        if content is not None:
            return content.receipt
        receipt = read_receipt(path, OutputReceipt)
        if receipt is not None:
            receipt = receipt.model_copy(update={"digest": digest})
            self._published_receipts.keep(digest, Content(receipt, None))
        return receipt

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
        files = self._staged
        with writable(files.folder), partial_beside(files.folder / receipt.key) as partial:
            write_with_receipt(partial, schema, batches, receipt, utc_times=utc_times)
            narrow(partial, [receipt.fragment.path])
            digest = digest_file(partial)
            files.remove(files.paths(receipt.key))
            files.commit(partial, receipt.key, digest, Content(receipt, None))
        return receipt.model_copy(update={"digest": digest})

    def output_path(self, output: OutputReceipt) -> AnyPath:
        """The path of the file of `output`: in the staging folder, or where it is published."""
        staged = self.root / STAGED / staged_name(output)
        return staged if staged.exists() else self.root / output.output_name


def staged_name(output: OutputReceipt) -> str:
    """The name of the staged file of `output`."""
    return file_name(output.key, output.digest)
