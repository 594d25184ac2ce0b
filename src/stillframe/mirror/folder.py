"""The folder that holds one guest's mirror, and what may be found in it after a crash.

What is there (TARGET is a disk's target, like vda):

    TARGET.img      the disk, raw, sparse        TARGET.map    digests of its blocks (blockmap.py)
    domain.xml      the guest's definition       mirror.json   what all this is (record.py)

An update of a mirror, over all disks of the guest:

1. Stage: TARGET.redo (redo.py) for each disk that has an image, TARGET.img.new for the others;
   TARGET.map.new; domain.xml.new. Room for the redo's data is reserved in the images. All of it
   is fsynced, and the folder. What is there is not changed.
2. Publish: mirror.next.json, written beside and renamed, and the folder fsynced. This is the
   commit: before it the mirror is the old one, after it the new one.
3. Apply: all redo files are read and checked; mirror.next.json is renamed mirror.applying.json
   (fsynced: from here the images change); redo files are written into the images, new images,
   maps and domain.xml renamed into place, images of disks that left the guest renamed
   TARGET.img.removed-GENERATION; all fsynced.
4. End: mirror.json, with the identity (inode, size, time of change) of each image, written beside
   and renamed; mirror.applying.json removed; then what is left of the staging.

So after a crash: no marker: staging files are dropped, the mirror is the old one. A marker: from
3 on again, all of it can be repeated. A damaged redo file before the images were touched: the
update is dropped. After: mirror.json says "damaged", and the next run reads the images in full.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from stillframe.clock import Clock
from stillframe.errors import ApplyFailed, DestinationForeign
from stillframe.mirror import apply
from stillframe.mirror.layout import (
    APPLYING,
    NEXT,
    RECORD,
    foreign_name,
    image_targets,
    read_record,
    staged_names,
)
from stillframe.mirror.place import MirrorPlace
from stillframe.mirror.record import (
    DAMAGED,
    FolderState,
    Inspection,
    MirrorRecord,
    RecordUnreadable,
)
from stillframe.mirror.trouble import destination_errors
from stillframe.mirror.update import Update


@dataclass(frozen=True, slots=True)
class Recovery:
    """What recover() did. `words` is one sentence for people; empty when nothing was to do."""

    words: str = ""
    finished: bool = False
    dropped: bool = False
    damaged: bool = False


class MirrorFolder:
    """DEST/GUEST. Any method may raise DestinationLost, DestinationFull or DestinationUnwritable."""

    def __init__(self, place: MirrorPlace, *, clock: Clock) -> None:
        self.path = str(place)
        self._place = place
        self._clock = clock
        self._files = place.files
        self._update: Update | None = None

    def inspect(self) -> Inspection:
        """Look, without the lock and without changing anything."""
        with destination_errors(self.path):
            return self._inspect()

    @contextlib.contextmanager
    def lock(self, holder: str) -> Iterator[None]:
        """Hold the folder for the length of the block; makes DEST/GUEST if it is not there.

        DEST itself must exist (it may be a share that is not mounted): DestinationUnwritable
        otherwise. Raises DestinationBusy naming the holder, DestinationForeign when the folder
        holds what stillframe did not write (nothing is changed then).
        """
        with destination_errors(self.path), contextlib.ExitStack() as stack:
            self._refuse_foreign()
            self._place.make()
            stack.enter_context(self._place.lock(holder, self._is_hung))
            held = stack.pop_all()
        with held:
            yield

    def recover(self) -> Recovery:
        """Finish a published update, or drop what an unpublished one left. Needs the lock.

        Can be repeated. Raises ApplyFailed when the images can't be written; the update is
        still durable then.
        """
        with destination_errors(self.path):
            names = self._files.names()
            if APPLYING not in names and NEXT not in names:
                return self._drop_staging(names)
        try:
            return self._finish()
        except OSError as error:
            raise ApplyFailed(
                f"The update in {self.path} is durable, but could not be written into the images: "
                f"{error.strerror}.",
                f"df -h {self.path}; then run the command again: it goes on where this one ended",
            ) from error

    def begin(self, guest: str, uuid: str) -> Update:
        """Begin an update. Needs the lock, and recover() called before.

        Raises DestinationForeign when the folder holds a mirror of another guest (UUID).
        """
        found = self.inspect()
        if found.record is not None and found.record.uuid != uuid:
            raise DestinationForeign(
                f"{self.path} holds the mirror of another guest: {found.record.guest}, UUID "
                f"{found.record.uuid} (this one has {uuid}).",
                f"mv {self.path} {self.path}.old   # then run again; or choose another destination",
            )
        self._update = Update(self.path, self._files, self._clock, guest, uuid, found)
        self._update.threads = self._place.threads
        return self._update

    def _inspect(self) -> Inspection:
        try:
            names = self._files.names()
        except FileNotFoundError:
            return Inspection(FolderState.ABSENT)
        foreign = foreign_name(self._files, names)
        if foreign:
            return Inspection(FolderState.FOREIGN, detail=f"{foreign} was not written by stillframe")
        record, detail = self._read(RECORD)
        for marker in (APPLYING, NEXT):
            if marker in names:
                pending, unreadable = self._read(marker)
                return Inspection(FolderState.PENDING, record, pending, unreadable or detail)
        if record is not None:
            state = FolderState.DAMAGED if record.state == DAMAGED else FolderState.WHOLE
            if state is FolderState.WHOLE and staged_names(names):
                state = FolderState.STAGED
            return Inspection(state, record)
        if image_targets(names):
            return Inspection(FolderState.UNREADABLE, detail=detail or f"{RECORD} is missing")
        return Inspection(FolderState.STAGED if staged_names(names) else FolderState.EMPTY, detail=detail)

    def _read(self, name: str) -> tuple[MirrorRecord | None, str]:
        try:
            return read_record(self._files, name), ""
        except RecordUnreadable as error:
            return None, f"{name} can't be read: {error}"

    def _drop_staging(self, names: list[str]) -> Recovery:
        left = staged_names(names)
        if not left:
            return Recovery()
        apply.drop(self._files)
        return Recovery(
            f"removed what an unfinished update left ({', '.join(left)}); {self._what_stands()}",
            dropped=True)

    def _finish(self) -> Recovery:
        try:
            done = apply.finish(self._files, self._clock, _no_tick)
        except apply.Unfinishable as error:
            if error.applying:
                apply.mark_damaged(self._files, error.marker)
                return Recovery(
                    f"DAMAGED: an update was being written into the images, and can't be ended ({error}); "
                    f"the images in {self.path} are of no single moment until the next run, which "
                    "reads them in full", damaged=True)
            apply.drop(self._files)
            return Recovery(
                f"dropped an update that was published but damaged before it was applied ({error}); "
                f"{self._what_stands()}", dropped=True)
        return Recovery(
            f"finished the update of {done.captured_at} that was published but not yet in the images",
            finished=True)

    def _what_stands(self) -> str:
        record, _ = self._read(RECORD)
        return f"the mirror of {record.captured_at} is whole" if record else "there is no earlier mirror"

    def _refuse_foreign(self) -> None:
        found = self._inspect()
        if found.state is FolderState.FOREIGN:
            raise DestinationForeign(
                f"{self.path} is not a mirror folder: {found.detail}.",
                "choose another destination, or move that file away and run again",
            )

    def _is_hung(self) -> bool:
        return self._update is not None and self._update.hung


def _no_tick() -> None:
    pass
