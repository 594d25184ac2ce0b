"""What a drill has on this host while it lasts, and removing it, also after a drill that was killed.

    STATE/drills/UUID/made.json    what was made outside of here: written down before it is made
    STATE/drills/UUID/log          what a script printed
    /run/stillframe-drill/UUID/    sockets of the disks' servers, and the console: QEMU's user passes through

Who drills holds the lock of STATE/drills/UUID as long as it lives. What is there without anybody holding the
lock was left behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from stillframe.durable import write_record
from stillframe.errors import StateFolderUnusable
from stillframe.hypervisor.connection import Connection
from stillframe.hypervisor.transient import TransientGuest
from stillframe.repository.manifest import TPM_FOLDER

DRILL_SOCKETS = Path("/run/stillframe-drill")
_FOLDER_MODE = 0o711
_MADE = "made.json"


class Made(msgspec.Struct, frozen=True):
    """A drill's guest, and the *files* that were made for it outside of its folders."""

    uuid: str
    name: str
    uri: str
    files: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DrillPlace:
    """The folders of one drill."""

    folder: Path
    uuid: str

    @staticmethod
    def of(state_folder: Path, uuid: str) -> DrillPlace:
        """Return the place of the drill whose guest has that UUID."""
        return DrillPlace(_drills(state_folder) / uuid, uuid)

    @property
    def run_folder(self) -> Path:
        """Where QEMU finds its sockets."""
        return DRILL_SOCKETS / self.uuid

    @property
    def console(self) -> Path:
        """The file with what the guest prints on its first serial port."""
        return self.run_folder / "console"

    @property
    def script_log(self) -> Path:
        """The file with what the user's script prints."""
        return self.folder / "log"

    def socket_of(self, target: str) -> str:
        """Return the path of a disk's socket."""
        return str(self.run_folder / target)


@contextlib.contextmanager
def drill_place(state_folder: Path, made: Made, connection: Connection) -> Iterator[DrillPlace]:
    """Give the place of a drill for the block; in the end, the guest and all that was made is gone.

    Raises StateFolderUnusable, HypervisorError.
    """
    place = DrillPlace.of(state_folder, made.uuid)
    try:
        place.folder.mkdir(mode=0o700, parents=True)
        lock = _lock(place.folder)
        assert lock is not None
        write_record(place.folder / _MADE, made)
        for folder in (DRILL_SOCKETS, place.run_folder):
            folder.mkdir(exist_ok=True)
            folder.chmod(_FOLDER_MODE)
    except OSError as error:
        raise StateFolderUnusable(
            f"The folders of a drill can't be made: {error}.",
            f"ls -ld {state_folder} {DRILL_SOCKETS}") from error
    try:
        yield place
    finally:
        with contextlib.closing(_Held(lock)):
            _clear(place.folder, made, connection)


def is_drilled(state_folder: Path, uuid: str) -> bool:
    """Return whether a guest is one that a drill of this state folder runs."""
    return (_drills(state_folder) / uuid / _MADE).exists()


def left_drills(state_folder: Path) -> list[Made]:
    """Return the drills that were killed, and have left something. Changes nothing."""
    return [made for made, lock in _left(state_folder) if _let_go(lock)]


def clear_left_drills(state_folder: Path, connection: Connection) -> list[str]:
    """Remove what killed drills left, the guest included; return in words what was done.

    Those of another libvirt are left alone. Raises HypervisorError.
    """
    did = []
    for made, lock in _left(state_folder):
        with contextlib.closing(_Held(lock)):
            if made.uri == connection.uri:
                ended = _clear(_drills(state_folder) / made.uuid, made, connection)
                ran = ", which still ran" if ended else ""
                did.append(f"removed what a killed drill left ({made.name}{ran})")
    return did


@dataclass(frozen=True, slots=True)
class _Held:
    fd: int

    def close(self) -> None:
        os.close(self.fd)


def _clear(folder: Path, made: Made, connection: Connection) -> bool:
    """Remove all of a drill; return whether its guest still ran. The record goes last."""
    ended = TransientGuest(connection, made.uuid, made.name).end()
    for path in made.files:
        with contextlib.suppress(OSError):
            Path(path).unlink(missing_ok=True)
    shutil.rmtree(TPM_FOLDER / made.uuid, ignore_errors=True)
    shutil.rmtree(DRILL_SOCKETS / made.uuid, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    return ended


def _left(state_folder: Path) -> Iterator[tuple[Made, int]]:
    """Yield each drill that nobody holds any more, with the descriptor of its lock, which is taken."""
    for path in sorted(_drills(state_folder).glob(f"*/{_MADE}")):
        try:
            lock = _lock(path.parent)
        except FileNotFoundError:
            continue  # it ended just now
        if lock is None:
            continue
        try:
            yield msgspec.json.decode(path.read_bytes(), type=Made), lock
        except (FileNotFoundError, msgspec.DecodeError):
            # Written before anything was made: without it, there is only the folder.
            shutil.rmtree(path.parent, ignore_errors=True)
            os.close(lock)


def _let_go(lock: int) -> bool:
    os.close(lock)
    return True


def _lock(folder: Path) -> int | None:
    """Take a folder's lock; return its descriptor, None if somebody holds it."""
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


def _drills(state_folder: Path) -> Path:
    return state_folder / "drills"
