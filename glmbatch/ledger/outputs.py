"""The files with rows and answers: staged out of readers' sight, then published.

    OUTPUT/_glmbatch/staged/<output key>.<digest>.parquet      before publication
    OUTPUT/_glmbatch/overwritten/<digest>.parquet              that a publication overwrites
    OUTPUT/_glmbatch/overwritten/<run>.list.parquet            its list of failed rows

Knows how to find them by output key, and how to write those of a bundle together.

A publication that is killed before its manifest has overwritten files that the manifest still
names. The next run may not read their sources, and could not make them again. So it first puts back
what was overwritten.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pyarrow as pa

from glmbatch.errors import InputError
from glmbatch.ledger.committed import CommittedFiles, Content, Recent
from glmbatch.ledger.manifest import Manifest, PublishedFile, read_manifest
from glmbatch.ledger.quarantine import QUARANTINE
from glmbatch.ledger.receipts import (
    AnswersReceipt,
    OutputReceipt,
    file_name,
    has_digest,
    read_receipt,
    write_with_receipt,
)
from glmbatch.store.files import (
    Digests,
    committed,
    digest_file,
    partial_beside,
    sync,
    writable,
)
from glmbatch.store.folder import Folder, Listing, commit_all, remove_tree
from glmbatch.store.modes import narrow
from glmbatch.store.paths import AnyPath

logger = logging.getLogger(__name__)

STAGED = "_glmbatch/staged"
OVERWRITTEN = "_glmbatch/overwritten"


class OutputFiles:
    """The staged and published files of the output folder `root`; `manifest` reads its manifest.

    Safe to use from several threads.
    """

    def __init__(
        self, root: AnyPath, digests: Digests, manifest: Callable[[], Manifest | None]
    ) -> None:
        self._root = root
        self._digests = digests
        self._manifest = manifest
        self._staged = CommittedFiles(root / STAGED, OutputReceipt, digests)
        # One task writes a file. If another process lost it half done, it is written again.
        self._staged.names.alone = True
        self._published_receipts: Recent[OutputReceipt] = Recent()
        self._by_key: tuple[Manifest | None, dict[str, PublishedFile]] = None, {}
        # Whether a file was found that a killed or refused run had staged, or a retried task.
        self.reuses_staged = False

    @property
    def names(self) -> Listing:
        """The listing of the staged files."""
        return self._staged.names

    def forget(self) -> None:
        """Forget which files are published; the next call reads the manifest again."""
        self._by_key = None, {}

    def find(self, key: str, answers: Sequence[AnswersReceipt]) -> OutputReceipt | None:
        """The receipt of a whole file under `key`, staged or published, with exactly `answers`.

        None if there is no such file.
        """
        staged = self._staged.find(key)
        if staged is not None:
            self.reuses_staged = True
            # Filled in here, because a footer cannot contain the digest of its own file.
            receipt = staged.receipt.model_copy(update={"digest": staged.digest})
        else:
            file = self._published_as(key)
            published = None if file is None else self.published(file.output_name, file.digest)
            if published is None or published.key != key:
                return None
            receipt = published
        return receipt if receipt.answers == tuple(answers) else None

    def _published_as(self, key: str) -> PublishedFile | None:
        manifest, by_key = self._by_key
        now = self._manifest()
        if now is not manifest:
            by_key = {file.output_key: file for file in now.files} if now else {}
            self._by_key = now, by_key
        return by_key.get(key)

    def published(self, name: str, digest: str) -> OutputReceipt | None:
        """The receipt of the published file `name` if its SHA-256 is `digest`, else None."""
        path = self._root / name
        if not has_digest(path, digest, self._digests):
            return None
        content = self._published_receipts.find(digest)
        if content is not None:
            return content.receipt
        receipt = read_receipt(path, OutputReceipt)
        if receipt is not None:
            receipt = receipt.model_copy(update={"digest": digest})
            self._published_receipts.keep(digest, Content(receipt, None))
        return receipt

    @contextmanager
    def staging(self) -> Iterator[Staging]:
        """Files to be written in the block, which are committed together when it ends.

        They replace earlier files under the same keys. Safe to repeat. InputError when a file
        cannot be written; a block that fails commits nothing.
        """
        with writable(self._staged.folder), ExitStack() as partials:
            staging = Staging(self._staged, partials)
            yield staging
            staging.commit()

    def path(self, output: OutputReceipt) -> AnyPath:
        """The path of the file of `output`: in the staging folder, or where it is published."""
        staged = self._root / STAGED / staged_name(output)
        return staged if staged.exists() else self._root / output.output_name


class Staging:
    """Output files that are written and not yet committed, as `OutputFiles.staging` gives them."""

    def __init__(self, files: CommittedFiles[OutputReceipt], partials: ExitStack) -> None:
        self._files = files
        self._partials = partials
        self._written: list[tuple[Path, OutputReceipt]] = []

    def write(
        self,
        receipt: OutputReceipt,
        schema: pa.Schema,
        batches: Iterator[pa.RecordBatch],
        *,
        utc_times: bool = False,
    ) -> OutputReceipt:
        """Write a file; return its receipt with the digest.

        Users who may not read the source may not read the file. Errors of `batches` pass through,
        and then the file is not committed.
        """
        partial = self._partials.enter_context(partial_beside(self._files.folder / receipt.key))
        write_with_receipt(partial, schema, batches, receipt, utc_times=utc_times)
        narrow(partial, [receipt.fragment.path])
        staged = receipt.model_copy(update={"digest": digest_file(partial)})
        self._written.append((partial, staged))
        return staged

    def commit(self) -> None:
        """Commit what was written."""
        files = self._files
        for _, receipt in self._written:
            files.remove(files.paths(receipt.key))
        files.commit_all(
            (partial, receipt.key, receipt.digest, Content(receipt, None))
            for partial, receipt in self._written
        )


def staged_name(output: OutputReceipt) -> str:
    """The name of the staged file of `output`."""
    return file_name(output.key, output.digest)


def keep_overwritten(
    root: Folder, before: Manifest | None, outputs: Sequence[OutputReceipt]
) -> None:
    """Keep what publishing `outputs` overwrites of the publication `before`; safe to repeat."""
    if before is None:
        return
    digests = {output.output_name: output.digest for output in outputs}
    seconds = {QUARANTINE: _list_name(before)}
    for file in before.files:
        if digests.get(file.output_name, file.digest) != file.digest:
            seconds[file.output_name] = _name(file)
    # A publication that is tried again has overwritten some of them already.
    kept = _kept(root)
    names = [name for name, second in seconds.items() if second not in kept]
    files = []
    there = root.map(lambda name: (root / name).is_file(), names)
    for name, is_there in zip(names, there, strict=True):
        if is_there:
            files.append((root / name, root / OVERWRITTEN / seconds[name]))
    if root.local is None:
        commit_all(files)  # which copies in a store
    else:
        _link(files, root.local / OVERWRITTEN)


def _link(files: Sequence[tuple[AnyPath, AnyPath]], folder: Path) -> None:
    """Give files second names in `folder`, by links, or by copies on a disk that has none."""
    with writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for path, second in files:
        try:
            os.link(str(path), str(second))
        except OSError:
            with committed(second) as partial:
                shutil.copyfile(str(path), partial)
    sync(folder)


def put_back(root: Folder) -> None:
    """Put back what a killed publication has overwritten; safe to repeat.

    If the manifest is its own, the publication was complete but for its cleaning. The caller holds
    the lock.
    """
    kept = _kept(root)
    if not kept:
        return
    try:
        manifest = read_manifest(root.path)
    except InputError:  # it is damaged, so it does not say what was overwritten
        return
    moves = []
    for file in manifest.files if manifest is not None else ():
        second, path = root / OVERWRITTEN / _name(file), root / file.output_name
        is_kept = second.name in kept and has_digest(second, file.digest)
        if is_kept and not has_digest(path, file.digest):
            logger.warning("%s: is put back, because a publication was not completed", path)
            root.check_places([file.output_name])
            moves.append((second, path))
    if manifest is not None and _list_name(manifest) in kept:
        moves.append((root / OVERWRITTEN / _list_name(manifest), root / QUARANTINE))
    commit_all(moves)
    remove_tree(root / OVERWRITTEN)


def _kept(root: Folder) -> set[str]:
    return {path.name for path in (root / OVERWRITTEN).glob("*.parquet")}


def _list_name(manifest: Manifest) -> str:
    return f"{manifest.run}.list.parquet"


def _name(file: PublishedFile) -> str:
    return f"{file.digest}.parquet"
