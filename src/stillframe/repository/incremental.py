"""Writing a disk by what changed since its parent: cheap where that is safe, and never a wrong byte.

    audit              a sample of what is said to be unchanged: one difference, and the disk is read whole
    reused unseen?     the generation or the parent's own session says so, and no slot is known to be bad
    no: look beneath   all nodes of the parent are read; what may not be referred to is read from the disk
    write              changed chunks are read; leaves and nodes above them are written, all else inherited

A node that is needed and can't be read sends it back to looking beneath, and at last to reading the disk
whole. What was stored by then is found again by its ID.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

from stillframe.block.reader import DiskReader
from stillframe.errors import SlotDamaged
from stillframe.repository.audit import Audit, Audited, audited
from stillframe.repository.beneath import look_beneath
from stillframe.repository.changes import Changes
from stillframe.repository.disk_write import DiskWrite, Progress, Upon, Written
from stillframe.repository.manifest import DiskEntry, Manifest
from stillframe.repository.stages import Stages
from stillframe.repository.tree import Tree


@dataclass(frozen=True, slots=True)
class Since:
    """Says that a parent is the very snapshot from which the reader's `changed` counts.

    *sid* is the snapshot's, *generation* what its session went by, None if nobody wrote it down;
    *data_bytes* of its disk are not zero.
    """

    sid: str
    generation: int | None
    data_bytes: int

    @classmethod
    def of(cls, manifest: Manifest, disk: DiskEntry) -> Self:
        """Return it for a disk of a snapshot."""
        return cls(manifest.sid, manifest.generation, disk.data_bytes)


class DiskWriting:
    """One disk being written, whole or by what changed: `run` is called once."""

    def __init__(
        self, stages: Stages, source: DiskReader, parent: Tree | None, since: Since | None, audit: Audit,
        report: Callable[[Progress], None],
    ) -> None:
        self._stages = stages
        self._source = source
        self._parent = parent
        self._since = since
        self._audit = audit
        self._report = report
        self._stored_before = stages.stored_bytes
        #: Of writes that were given up.
        self._read_bytes = self._new_chunks = 0

    def run(self) -> Written:
        """Write it. Raises CopyFailed, StorageError, and the reason to stop."""
        if self._parent is None or self._since is None:
            return self._written(None)
        extents = self._source.changed()
        if extents is None:
            return self._written(None)
        if self._parent.size_bytes != self._source.size_bytes:
            return self._whole("its size changed")
        changes = Changes.of(extents, self._source.size_bytes, self._stages.parameters)
        found = audited(
            self._parent, changes, self._since.data_bytes, self._source, self._stages, self._audit)
        if found.mismatch_offset_bytes is None:
            written = self._incremental(self._parent, changes, self._since, found)
        else:
            written = self._whole(
                f"at {found.mismatch_offset_bytes} it had changed, and nothing had recorded that")
        return replace(written, audited_chunks=found.chunks,
                       mismatch_offset_bytes=found.mismatch_offset_bytes)

    def _incremental(self, parent: Tree, changes: Changes, since: Since, found: Audited) -> Written:
        if self._stages.known.may_reuse_unseen(since.sid, since.generation) and not found.damaged:
            try:
                return self._written(Upon(changes, since.data_bytes, looked=False))
            except SlotDamaged:
                pass  # now it is worth while to look at all of the tree
        beneath = look_beneath(parent, self._stages.known, self._stages.ask_stop)
        try:
            return self._written(Upon(changes.and_read(beneath.unusable), beneath.data_bytes, looked=True))
        except SlotDamaged as damage:
            return self._whole(f"what its parent's index says can't be read: {damage.message}")

    def _whole(self, why: str) -> Written:
        return replace(self._written(None), why_whole=why)

    def _written(self, upon: Upon | None) -> Written:
        write = DiskWrite(self._stages, self._source, self._parent, self._report, upon)
        try:
            written = write.run()
        except SlotDamaged:
            self._read_bytes += write.read_bytes
            self._new_chunks += write.new_chunks
            raise
        return replace(
            written, read_bytes=written.read_bytes + self._read_bytes,
            stored_bytes=self._stages.stored_bytes - self._stored_before,
            new_chunks=written.new_chunks + self._new_chunks,
            known_chunks=max(0, written.known_chunks - self._new_chunks))
