"""The ledger: the output folder as the only record of the work done. Knows no models.

    OUTPUT/_glmbatch/answers/<bundle key>.<digest>.parquet     answers of one step over one bundle
    OUTPUT/_glmbatch/staged/<output key>.<digest>.parquet      output files, see outputs.py
    OUTPUT/_glmbatch/lock                                      of the run; in a store lock.<number>

Each file has its receipt in its footer and appears by one rename. A kill leaves the file complete
or absent, and the next run finds it. See publication.py for the published files.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

import pyarrow as pa

from glmbatch.errors import GlmbatchError, InputError, TransientError
from glmbatch.ledger.committed import CommittedFiles, Content
from glmbatch.ledger.known.keeping import StoredKeys
from glmbatch.ledger.known.keys import AnswerFile, keys_of
from glmbatch.ledger.known.stored import KEYS, StoredSegment
from glmbatch.ledger.manifest import COPY, MANIFEST, Manifest, PublishedFile, read_manifest
from glmbatch.ledger.outputs import STAGED, OutputFiles, put_back
from glmbatch.ledger.quarantine import OWN, QUARANTINE
from glmbatch.ledger.receipts import (
    AnswersReceipt,
    BundleReceipt,
    OutputReceipt,
    digest_in_name,
    read_receipt,
    write_with_receipt,
)
from glmbatch.ledger.tables.iceberg import METADATA
from glmbatch.store.files import (
    Digests,
    digest_file,
    modified,
    partial_beside,
    reachable,
    writable,
)
from glmbatch.store.folder import Folder, remove_tree, times_written
from glmbatch.store.locks import guard, hold, release
from glmbatch.store.modes import narrow
from glmbatch.store.paths import AnyPath
from glmbatch.store.tables.delta import LOG

logger = logging.getLogger(__name__)

ANSWERS = "_glmbatch/answers"
RESULTS = "_glmbatch/results"
LOCK = "_glmbatch/lock"
PUBLISHING = "_glmbatch/publishing.json"
# Written by the holder of the lock alone.
GUARDED = (MANIFEST, COPY, QUARANTINE, PUBLISHING)


class Ledger:
    """The output folder of one job. Safe to use from several threads; one per run and process.

    `folder` is the output folder, `root` its path or address, and `outputs` the files for readers.
    """

    def __init__(self, output: str | Path) -> None:
        self.folder = Folder(output)
        self.root = self.folder.path
        self._digests = Digests()
        self._answers = CommittedFiles(self.root / ANSWERS, BundleReceipt, self._digests)
        self.outputs = OutputFiles(self.root, self._digests, self.manifest)
        self._keys = StoredKeys(self.root / KEYS)
        self._committing = threading.Lock()

    def open(self, run: str = "", *, shared: bool = False) -> None:
        """Create the folder, lock it for `run` until `close`, and undo a killed publication.

        `shared`: other processes of the run commit files too. A dead process's lock is free, in a
        store after some minutes. InputError when the folder cannot be written or another run holds
        it. TransientError when the machine failed.
        """
        self._refuse_links()
        may_live = hold(self.root / LOCK, run)
        try:
            if may_live:
                # What a stalled holder has staged, it could still copy into place.
                remove_tree(self.root / STAGED)
            put_back(self.folder)
            guard(self.root / name for name in GUARDED)
        except BaseException:
            self.close(run)
            raise
        self._trust_listings(not shared)
        self._keys.is_writer = True

    def _trust_listings(self, alone: bool) -> None:
        self.outputs.names.forget()
        self._answers.names.forget()
        self._answers.names.alone = alone

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
        for path in (own, *inside, local / LOG, local / METADATA):
            if path.is_symlink() and path.is_dir():
                raise InputError(
                    f"{path}: is a link to a folder, and glmbatch never writes or deletes through "
                    "one. Replace it with a folder, or set data.output."
                )

    def close(self, run: str = "") -> None:
        """Release the lock if `run` holds it; safe to repeat."""
        self._trust_listings(False)
        self._keys.is_writer = False
        release(self.root / LOCK, run)

    def results_folder(self) -> Path | None:
        """Where Prefect may keep the results of the run's tasks; None if the output is a store."""
        return None if self.folder.local is None else self.folder.local.resolve() / RESULTS

    def manifest(self) -> Manifest | None:
        """What is published; None if nothing is. Raises as `read_manifest`."""
        return read_manifest(self.root)

    def find_answers(
        self,
        key: str,
        run: str,
        earlier: Mapping[str, str] | None = None,
        parts: Collection[str] = (),
        *,
        by_failures: bool = False,
    ) -> BundleReceipt | None:
        """The receipt of the answers under `key`, if they are whole and `run` need not ask again.

        `parts` are the answers keys that the file must have. Each new run asks again about rows on
        which the model failed, and about rows without a prompt because of such a failure in an
        earlier step. `earlier` maps the steps that the prompts use to the keys of their answers
        files. With `by_failures`, their failures decide which rows are asked, so answers are out of
        date if an earlier step was asked again. Failures of `run` itself are not asked again.
        """
        whole = self._answers.find(key)
        if whole is None:
            return None
        receipt = whole.receipt
        faults = set(chain(*(part.faults for part in receipt.parts)))
        # A retried task of the same run keeps the failures that it committed.
        if "model_failed" in faults and receipt.run != run:
            return None
        if not {part.key for part in receipt.parts}.issuperset(parts):
            return None
        if by_failures or "earlier_step_failed" in faults:
            for step, earlier_key in (earlier or {}).items():
                before = self.find_answers(earlier_key, run)
                # All parts have been answered together.
                if before is None or before.run != receipt.parts[0].earlier.get(step):
                    return None
        return receipt

    def answers_receipt(self, key: str) -> BundleReceipt:
        """The receipt of the committed answers under `key`. TransientError when there are none."""
        whole = self._answers.find(key)
        if whole is None:
            raise self._missing(key)
        return whole.receipt

    def read_answers(self, key: str) -> tuple[BundleReceipt, pa.Table]:
        """The receipt of the answers under `key`, and their table in the receipt's row order.

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

    def keep_answers(self, receipt: BundleReceipt, table: pa.Table) -> AnswerFile:
        """Commit the answers of a step over a bundle, in row order, and return their file.

        Replaces the answers of earlier runs under the same key. Safe to repeat: answers that the
        same run has committed stay, if they have all parts. InputError when the output cannot be
        written.
        """
        # Bundles with the same rows have the same key.
        with self._committing, writable(self.root / ANSWERS):
            return self._keep_answers(receipt, table)

    def _keep_answers(self, receipt: BundleReceipt, table: pa.Table) -> AnswerFile:
        files = self._answers
        whole = files.find(receipt.key)
        if whole is not None and _covers(whole.receipt, receipt):
            return AnswerFile(whole.path, receipt.step, digest_in_name(whole.path))
        with partial_beside(files.folder / receipt.key) as partial:
            write_with_receipt(partial, table.schema, iter(table.to_batches()), receipt)
            content = Content(receipt, table)
            files.commit_all([(partial, receipt.key, digest_file(partial), content)])
        mine: list[AnyPath] = []
        others: list[AnyPath] = []
        for path in files.paths(receipt.key):
            other = files.receipt(path)
            (mine if other is not None and _covers(other, receipt) else others).append(path)
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
            for (step, key), spare in zip(file.step_keys.items(), file.answers_keys, strict=False):
                if key == step_key:
                    path = self.root / file.output_name
                    yield AnswerFile(path, step, file.digest, is_published=True, spare_key=spare)

    def find_spare(self, file: AnswerFile) -> AnswerFile | None:
        """The committed file that has the answers of a published one too; None without one.

        Deletes nothing, because a preview calls it without the lock.
        """
        sound = self._answers.find_sound(file.spare_key) if file.spare_key else None
        if sound is None or sound[1].step != file.step:
            return None
        path = sound[0]
        return AnswerFile(path, file.step, digest_in_name(path))

    def stored_keys(self, step_key: str, files: Sequence[AnswerFile]) -> list[StoredSegment]:
        """The segments on disk over the published ones of `files`, which have all of a step key."""
        return self._keys.cover(step_key, [file for file in files if file.is_published])

    def note_keys(self, output: OutputReceipt, tables: Sequence[pa.Table]) -> None:
        """Note the row keys of a staged file, which has the answers `tables`, for the index."""
        for answers, table in zip(output.answers, tables, strict=True):
            keys = keys_of(table, answers.step, output.output_name)
            self._keys.note(answers.step_key, output.digest, keys)

    def index_keys(self, manifest: Manifest) -> None:
        """Write the row keys of what was published just now to the index on disk.

        An error is logged: the publication is complete, and the next run reads the files.
        """
        self.outputs.forget()  # takes memory, and is out of date
        step_keys = set(chain(*(file.step_keys.values() for file in manifest.files)))
        # Other processes, or an earlier run, wrote some of the files, and noted nothing here.
        noted_all = self._answers.names.alone and not self.outputs.reuses_staged
        try:
            self._keys.write_noted(step_keys)
            for step_key in () if noted_all else step_keys:
                self._keys.cover(step_key, list(self._published_answers(step_key, manifest.files)))
        except (GlmbatchError, OSError) as error:
            logger.warning("%s: the index of known answers is not complete: %s", self.root, error)

    def unpublished_receipts(self) -> Iterator[AnswersReceipt]:
        """The receipts of committed but unpublished answers, including retries of failed rows."""
        published = {(receipt.key, receipt.run) for receipt in self.published_receipts()}
        for _, receipt in self._receipts(self._answers.paths()):
            for part in receipt.parts:
                if (part.key, part.run) not in published:
                    yield part

    def published_receipts(self) -> Iterator[AnswersReceipt]:
        """The receipts of all published answers, from the footers of their files."""
        paths = [self.root / file.output_name for file in self._published()]
        for receipt in self.folder.map(lambda path: read_receipt(path, OutputReceipt), paths):
            if receipt is not None:
                yield from receipt.answers

    def newest(self, outputs: Sequence[OutputReceipt], run: str) -> list[OutputReceipt]:
        """The receipts of `outputs` as on disk, because a task's cache may hold older ones.

        Those that `run` made are newest. TransientError when answers are missing.
        """
        answers = chain(*(output.answers for output in outputs if output.unusable is None))
        files = sorted({receipt.file_key for receipt in answers})
        parts = {}
        for receipt in self.folder.map(self.answers_receipt, files):
            for part in receipt.parts:
                parts[receipt.key, part.key] = part

        def as_on_disk(output: OutputReceipt) -> OutputReceipt:
            if output.unusable is not None:
                return output
            own = tuple(parts.get((part.file_key, part.key), part) for part in output.answers)
            found = None if output.run == run else self.outputs.find(output.key, own)
            return found or output.model_copy(update={"answers": own})

        return list(self.folder.map(as_on_disk, outputs))

    def _unpublished(self) -> Iterator[tuple[AnyPath, BundleReceipt]]:
        """The committed answers that no published file has, with their receipts.

        A run that retries failed rows replaces answers under a published key. If it was killed, its
        file is known by its time, which is not before the manifest's.
        """
        published: set[str] = set()
        for file in self._published():
            published.update(file.answers_keys)
        folder = self.root / ANSWERS
        with reachable(folder):
            times = sorted(times_written(folder, ".parquet").items())
            since = modified(self.root / MANIFEST) if published else 0.0
        new = [name for name, at in times if at >= since or name.split(".")[0] not in published]
        yield from self._receipts(folder / name for name in new)

    def _receipts(self, paths: Iterable[AnyPath]) -> Iterator[tuple[AnyPath, BundleReceipt]]:
        """Each of the answers `paths` that has a valid receipt, with its receipt."""
        for path, receipt in self.folder.map(
            lambda path: (path, self._answers.receipt(path)), paths
        ):
            if receipt is not None:
                yield path, receipt

    def _published(self) -> tuple[PublishedFile, ...]:
        manifest = self.manifest()
        return manifest.files if manifest else ()


def _covers(committed: BundleReceipt, receipt: BundleReceipt) -> bool:
    """Whether a committed file has all that `receipt` is about, from the same run."""
    held = {part.key for part in committed.parts}
    return committed.run == receipt.run and held.issuperset(part.key for part in receipt.parts)
