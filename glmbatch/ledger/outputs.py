"""The files with rows and answers: staged out of readers' sight, then published.

    OUTPUT/_glmbatch/staged/<output key>.<digest>.parquet      before publication

Knows how to find them by output key, and how to write those of a bundle together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pyarrow as pa

from glmbatch.ledger.committed import CommittedFiles, Content, Recent
from glmbatch.ledger.manifest import Manifest, PublishedFile
from glmbatch.ledger.receipts import (
    AnswersReceipt,
    OutputReceipt,
    file_name,
    read_receipt,
    whole_digest,
    write_with_receipt,
)
from glmbatch.store.files import Digests, digest_file, partial_beside, writable
from glmbatch.store.folder import Listing
from glmbatch.store.modes import narrow
from glmbatch.store.paths import AnyPath

STAGED = "_glmbatch/staged"


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
        self._published_receipts: Recent[OutputReceipt] = Recent()
        self._by_key: tuple[Manifest | None, dict[str, PublishedFile]] = None, {}

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
