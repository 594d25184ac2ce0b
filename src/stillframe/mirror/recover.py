"""Looking at a mirror folder and clearing up in it, when the destination may hang for ever."""

from __future__ import annotations

from stillframe.capture.watched import Stop, Watched
from stillframe.clock import Clock
from stillframe.mirror.folder import MirrorFolder, Recovery
from stillframe.mirror.place import MirrorPlace
from stillframe.mirror.record import FolderState, Inspection

_LOOK_TIMEOUT_S = 15.0
_RECOVER_TIMEOUT_S = 24 * 3600.0


def inspect_folder(place: MirrorPlace, *, clock: Clock) -> Inspection:
    """Return what the mirror folder holds. Raises DestinationLost if it does not answer in 15 s."""
    look = Watched(lambda _watch: MirrorFolder(place, clock=clock).inspect(), clock, "inspect")
    return look.result(lambda: None, stall_timeout_s=_LOOK_TIMEOUT_S, grace_s=0.0)


def recover_folder(place: MirrorPlace, *, clock: Clock, stop: Stop) -> Recovery:
    """Finish or drop what an earlier update left in the folder; nothing if the folder is not there.

    *stop* is asked all the while, so that a person can end the wait for a destination that
    hangs. Raises what MirrorFolder.lock and MirrorFolder.recover raise, and what *stop* returns.
    """

    def work() -> Recovery:
        folder = MirrorFolder(place, clock=clock)
        if folder.inspect().state is FolderState.ABSENT:
            return Recovery()
        with folder.lock("recover"):
            return folder.recover()

    return Watched(lambda _watch: work(), clock, "recover").result(stop, stall_timeout_s=_RECOVER_TIMEOUT_S)
