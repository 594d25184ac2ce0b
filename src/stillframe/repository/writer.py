"""Writing disks into a repository: the session's one writer.

    read, test for zeroes, hash      threads, in units of a mebibyte           scan.py
    known?                           one thread, in the order of the disk      known.py, disk_write.py
    compress                         threads, in slots of 16 chunks            pipeline.py
    seal, append to the pack         one thread, in order                      pipeline.py
    upload                           threads, two packs at a time              pipeline.py
    leaves, tree                     one thread, in order                      disk_write.py, tree.py

One thread decides and hands out jobs, and takes no more of them than a fixed number at a time; so
memory does not grow with the disk. A leaf waits until its chunks' slots have their places. Where it is
known what changed since the parent, only that is read: incremental.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from stillframe.block.reader import DiskReader
from stillframe.errors import StillframeError
from stillframe.repository.audit import Audit
from stillframe.repository.disk_write import Progress, Written
from stillframe.repository.hints import ChunkHints
from stillframe.repository.incremental import DiskWriting, Since
from stillframe.repository.known import Bad
from stillframe.repository.manifest import Content
from stillframe.repository.nodes import ChunkRef
from stillframe.repository.opened import Repository
from stillframe.repository.places import Places
from stillframe.repository.scan import BytesSource
from stillframe.repository.session import Session
from stillframe.repository.stages import Stages
from stillframe.repository.tree import Tree

__all__ = ["Audit", "Progress", "Since", "SnapshotWriter", "Written"]


class SnapshotWriter:
    """Writes the contents of one snapshot; a session has one writer only. For one thread.

    *places* reads the parents' trees; *bad* slots are referred to no more; *audit* is made of each disk
    of which only the changes are read. After an error nothing more can be written; no thread is left, and
    what was uploaded is rubbish for the next collector. Leaving the block without `finish` is the same.
    """

    def __init__(
        self, repository: Repository, session: Session, places: Places, *, bad: Bad, hints: ChunkHints,
        threads: int = 2, audit: Audit | None = None,
    ) -> None:
        self._audit = audit or Audit()
        self._places = places
        self._stages = Stages(repository, session, bad, hints, threads)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def healed(self) -> dict[bytes, ChunkRef]:
        """Where chunks are now that were in bad slots. Complete after `finish`; for `write_heals`."""
        return self._stages.known.healed

    def write(
        self, source: DiskReader, parent: Content | None = None, *, since: Since | None = None,
        stop: Callable[[], StillframeError | None] = lambda: None,
        report: Callable[[Progress], None] = lambda _: None,
    ) -> Written:
        """Write a disk as it stands in *source*; unchanged chunks and nodes are referred to in *parent*.

        *parent* is of a manifest that was listed after the session was opened. With *since*, which says that
        it is the snapshot that `source.changed()` counts from, only what changed is read, unless there is a
        reason to read it whole: an audit that found a difference, another size, or too much damage in the
        parent; the result says which. Either way it is the content of *source*. *stop* and *report* are
        called about once for each mebibyte that is read, *stop* also while a read or an upload takes
        long; an error that *stop* returns ends the run and is raised. Raises CopyFailed, StorageError.
        """
        self._check_open()
        tree = None if parent is None else Tree(self._places, parent.size_bytes, parent.place)
        self._stages.stop = stop
        try:
            return DiskWriting(self._stages, source, tree, since, self._audit, report).run()
        except BaseException:
            self.close()
            raise

    def write_bytes(self, content: bytes, parent: Content | None = None) -> Written:
        """Write a small file. Raises StorageError."""
        return self.write(BytesSource(content), parent)

    def finish(self, stop: Callable[[], StillframeError | None] = lambda: None) -> int:
        """Make all packs durable in the storage; return what they take there. Nothing may be written after.

        Raises StorageError, and what *stop* returns meanwhile.
        """
        self._check_open()
        self._stages.stop = stop
        try:
            return self._stages.finish()
        finally:
            self.close()

    def close(self) -> None:
        """End all threads, and give up what is not finished.

        An upload that the storage does not end is left alone after ten seconds.
        """
        self._stages.close()

    def _check_open(self) -> None:
        if self._stages.closed:
            raise ValueError("this writer is closed")
