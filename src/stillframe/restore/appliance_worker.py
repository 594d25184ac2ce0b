"""The worker of `files`: the one process that has libguestfs, and does what one task says.

    python appliance_worker.py FD     # FD: its end of the socket (appliance_wire.py)

A process of its own, since a call of libguestfs can't be ended from within, and since libguestfs
reads what an appliance says that a hostile disk may have taken over.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import socket
import stat
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from tarfile import PAX_FORMAT, REGTYPE, SYMTYPE, TarInfo
from typing import Any

import guestfs

from stillframe import process
from stillframe.errors import ApplianceFailed, ArchiveRefused, FilesystemUnknown, PathUnknown, StillframeError
from stillframe.restore.appliance_wire import (
    Begun,
    Done,
    Entry,
    Failed,
    Key,
    Launched,
    Listed,
    Locked,
    Mounted,
    Setup,
    Task,
    Warned,
    Wire,
    batches,
)
from stillframe.restore.guest_root import GuestRoot, said
from stillframe.units import GIB, MIB

#: What QEMU may write into one file: an overlay that is thrown away. The appliance's own root has 4 GiB.
_FILE_LIMIT_BYTES = 8 * GIB
_LISTING_LIMIT_BYTES = 64 * MIB
_NOBODY = "nobody"
_TAR_BLOCK_BYTES = 512
_HELP_TIMEOUT_S = 30.0
#: Of what libguestfs, QEMU and the appliance's console say, in case it does not start.
_LINES_KEPT = 200


def main() -> None:
    """Do tasks until no more come."""
    wire = Wire(socket.socket(fileno=int(sys.argv[1])))
    setup = wire.hear()
    assert isinstance(setup, Setup)
    try:
        with _launched(setup) as handle, contextlib.suppress(EOFError, ConnectionError):
            wire.say(Launched())
            root = GuestRoot(handle, setup.drives, lambda text: wire.say(Warned(text)))
            while isinstance(task := wire.hear(), Task):
                _do(Worker(handle, root, task, wire, can_ask=setup.can_ask), wire)
    except ApplianceFailed as error:
        wire.say(Failed(error.code, error.message, error.next_command))


def _do(worker: Worker, wire: Wire) -> None:
    try:
        worker.work()
        wire.say(Done())
    except StillframeError as error:
        wire.say(Failed(error.code, error.message, error.next_command))


@contextlib.contextmanager
def _launched(setup: Setup) -> Iterator[Any]:
    """Give a libguestfs whose appliance runs with the disks. Raises ApplianceFailed."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (_FILE_LIMIT_BYTES, _FILE_LIMIT_BYTES))
    handle = guestfs.GuestFS(python_return_dict=True)
    heard = deque[str](maxlen=_LINES_KEPT)
    listener = handle.set_event_callback(
        lambda _event, _handle, text, _numbers: heard.append(text),
        guestfs.EVENT_APPLIANCE | guestfs.EVENT_LIBRARY | guestfs.EVENT_WARNING)
    try:
        # Not by libvirt: it would be one more daemon to count on, with rights of its own on the sockets.
        handle.set_backend("direct")
        handle.set_tmpdir(setup.folder)
        if os.geteuid() == 0:
            handle.config(*_as_nobody(handle.get_hv()))
        for drive in setup.drives:
            # For reading alone: libguestfs puts an overlay above, which takes what the appliance writes.
            handle.add_drive(drive.target, readonly=True, format="raw", protocol="nbd",
                             server=[f"unix:{drive.socket}"])
        handle.launch()
        handle.delete_event_callback(listener)
    except RuntimeError as error:
        print("".join(heard), file=sys.stderr, flush=True)  # noqa: T201 - the log of this process
        raise ApplianceFailed(f"The appliance did not start: {said(error)}",
                              "libguestfs-test-tool   # apt-get install libguestfs-tools (Debian)") from error
    try:
        yield handle
    finally:
        handle.close()


def _as_nobody(hypervisor: str) -> tuple[str, str]:
    """Return the option by which QEMU, which has opened everything by then, gives root's rights up."""
    # QEMU 9.1 has another option for it, and means to drop the old one.
    known = process.run([hypervisor, "-help"], timeout_s=_HELP_TIMEOUT_S).stdout
    is_new = re.search(r"-run-with .*\buser=", known)
    return ("-run-with", f"user={_NOBODY}") if is_new else ("-runas", _NOBODY)


class Worker:
    """Does a task with a launched libguestfs."""

    def __init__(self, handle: Any, root: GuestRoot, task: Task, wire: Wire, *, can_ask: bool) -> None:
        self._handle = handle
        self._root = root
        self._can_ask = can_ask
        self._task = task
        self._wire = wire

    def work(self) -> None:
        """Do it. Raises what the parent is to raise."""
        try:
            is_listing = self._task.verb == "filesystems"
            if is_listing or not self._root.is_mounted_at_once(self._task.filesystem):
                self._root.unlock(self._task.keys, self._ask)
                if is_listing:
                    self._wire.say(self._root.found())
                    return
                self._root.mount(self._task.filesystem)
        except RuntimeError as error:
            raise FilesystemUnknown(f"The disks can't be looked into: {said(error)}",
                                    "stillframe verify --repo REPO   # is it what was stored?") from error
        self._wire.say(Mounted())
        for path in map(self._root.path, self._task.paths):
            {"list": self._list, "cat": self._cat, "get": self._get}[self._task.verb](path)

    def _ask(self, device: str, wrong: bool) -> str | None:
        if not self._can_ask:
            return None
        self._wire.say(Locked(device, wrong))
        answer = self._wire.hear()
        return answer.text if isinstance(answer, Key) else None

    def _list(self, path: str) -> None:
        facts = self._facts(path)
        if not self._is_folder(path, facts):
            self._wire.say(Listed("", (self._entry(path, facts),)))
            return
        waiting = [path]
        while waiting:
            folder = waiting.pop()
            entries = self._entries(folder)
            for part in batches(entries) if entries else [()]:
                self._wire.say(Listed(folder, part))
            if self._task.recursive:
                waiting += [entry.path for entry in reversed(entries) if stat.S_ISDIR(entry.mode)]

    def _entries(self, folder: str) -> list[Entry]:
        content = bytearray()

        def keep(part: memoryview) -> None:
            if len(content) > _LISTING_LIMIT_BYTES:
                raise ArchiveRefused(f"{folder} has too many files to be listed.", "get it as a whole")
            content.extend(part)

        self._streamed(folder, lambda to: self._handle.ls0(folder, to), keep)
        names = sorted(name.decode(errors="surrogateescape") for name in content.split(b"\0") if name)
        # libguestfs takes and gives names as text alone: the others are known by name only.
        plain = [name for name in names if name.isprintable() or _is_text(name)]
        base = folder.rstrip("/") + "/"
        found = self._asked(folder, lambda: self._handle.lstatnslist(folder, plain))
        facts = dict(zip(plain, found, strict=True))
        return [self._entry(base + name, facts[name]) if name in facts else Entry(_shown(base + name))
                for name in names]

    def _entry(self, path: str, facts: dict[str, int]) -> Entry:
        if facts["st_ino"] < 0:  # so libguestfs says that it could not be looked at
            return Entry(path)
        target = ""
        if stat.S_ISLNK(facts["st_mode"]):
            with contextlib.suppress(RuntimeError, UnicodeDecodeError):
                target = self._handle.readlink(path)
        return Entry(path, facts["st_mode"], facts["st_uid"], facts["st_gid"], facts["st_size"],
                     facts["st_mtime_sec"] * 10**9 + facts["st_mtime_nsec"], target)

    def _cat(self, path: str) -> None:
        if self._is_folder(path, self._facts(path)):
            raise PathUnknown(f"{path} is a folder.", "stillframe files get SNAPSHOT PATH --to DIR")
        facts = self._asked(path, lambda: self._handle.statns(path))
        if not stat.S_ISREG(facts["st_mode"]):
            raise PathUnknown(f"{path} is no file with content.", "stillframe files ls -l SNAPSHOT PATH")
        self._begin(path, facts["st_size"])
        self._send_file(path, facts["st_size"])
        self._wire.send(b"")

    def _get(self, path: str) -> None:
        facts = self._facts(path)
        if stat.S_ISDIR(facts["st_mode"]):
            # tar in the appliance would follow a link in the folder's path out of the guest's root.
            real = self._asked(path, lambda: self._handle.realpath(path))
            self._begin(path, None)
            self._streamed(path, lambda to: self._handle.tar_out(
                real, to, numericowner=True, xattrs=True, selinux=True, acls=True), self._wire.send)
        else:
            member = self._member(path, facts)
            self._begin(path, member.size)
            self._wire.send(member.tobuf(PAX_FORMAT))
            if member.isreg():
                self._send_file(path, member.size)
                self._wire.send(bytes(-member.size % _TAR_BLOCK_BYTES + 2 * _TAR_BLOCK_BYTES))
        self._wire.send(b"")

    def _begin(self, path: str, size_bytes: int | None) -> None:
        self._wire.say(Begun(path, size_bytes))

    def _member(self, path: str, facts: dict[str, int]) -> TarInfo:
        """Return the head of an archive's member for what is no folder, as tar in the appliance makes it."""
        member = TarInfo(".")
        member.mode = stat.S_IMODE(facts["st_mode"])
        member.uid, member.gid = facts["st_uid"], facts["st_gid"]
        headers = {"mtime": f"{facts['st_mtime_sec']}.{facts['st_mtime_nsec']:09d}"}
        if stat.S_ISREG(facts["st_mode"]):
            member.type, member.size = REGTYPE, facts["st_size"]
        elif stat.S_ISLNK(facts["st_mode"]):
            member.type, member.linkname = SYMTYPE, self._asked(path, lambda: self._handle.readlink(path))
        else:
            raise PathUnknown(f"{path} is a device, a socket or a pipe: it has no content.",
                              "get the folder that it is in as a .tar, to have it")
        with contextlib.suppress(RuntimeError):  # a file system without such attributes
            for each in self._handle.lgetxattrs(path):
                name, value = each["attrname"], each["attrval"]
                if not name.startswith("system.posix_acl_"):
                    headers[f"SCHILY.xattr.{name}"] = value.decode("utf-8", "surrogateescape")
                elif name == "system.posix_acl_access":
                    acl = self._handle.acl_get_file(path, "access")
                    headers["SCHILY.acl.access"] = acl
        member.pax_headers = headers
        return member

    def _send_file(self, path: str, size_bytes: int) -> None:
        sent = 0

        def count(part: memoryview) -> None:
            nonlocal sent
            sent += len(part)
            if sent <= size_bytes:
                self._wire.send(part)

        self._streamed(path, lambda to: self._handle.download(path, to), count)
        if sent != size_bytes:
            raise ArchiveRefused(f"{path} is to have {size_bytes} bytes, but {sent} could be read.",
                                 "the guest's file system is damaged; take another snapshot")

    def _streamed(self, path: str, call: Callable[[str], None], take: Callable[[memoryview], None]) -> None:
        """Have a call of libguestfs write into a pipe and *take* what comes. Raises as _asked."""
        source, sink = os.pipe()
        failed: list[BaseException] = []

        def pump() -> None:
            buffer = memoryview(bytearray(MIB))
            with open(source, "rb", buffering=0) as pipe:
                while got := pipe.readinto(buffer):
                    try:
                        if not failed:
                            take(buffer[:got])
                    except (OSError, StillframeError) as error:
                        failed.append(error)
                        self._handle.user_cancel()

        thread = threading.Thread(target=pump)
        thread.start()
        try:
            with _closing(sink):
                call(f"/dev/fd/{sink}")
        except RuntimeError as error:
            if not failed:
                raise self._translated(path, error) from error
        finally:
            thread.join()
        if failed:
            raise failed[0]

    def _facts(self, path: str) -> dict[str, int]:
        facts: dict[str, int] = self._asked(path, lambda: self._handle.lstatns(path))
        return facts

    def _is_folder(self, path: str, facts: dict[str, int]) -> bool:
        """Return whether it is a folder, or a link to one."""
        if not stat.S_ISLNK(facts["st_mode"]):
            return stat.S_ISDIR(facts["st_mode"])
        return bool(self._asked(path, lambda: self._handle.is_dir(path, followsymlinks=True)))

    def _asked(self, path: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except RuntimeError as error:
            raise self._translated(path, error) from error
        except UnicodeError as error:
            raise PathUnknown(f"{_shown(path)} is not UTF-8: libguestfs takes no such names.",
                              "get the folder that it is in") from error

    def _translated(self, path: str, error: RuntimeError) -> StillframeError:
        if str(error).endswith(("No such file or directory", "Not a directory")):
            return PathUnknown(f"There is no {path} in the guest.", "stillframe files ls SNAPSHOT /")
        return ArchiveRefused(f"{path} can't be read: {said(error)}",
                              "stillframe verify --repo REPO   # is it what was stored?")


@contextlib.contextmanager
def _closing(fd: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.close(fd)


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(path: str) -> str:
    """Return a path with what is no text in it escaped."""
    return path.encode(errors="surrogateescape").decode(errors="backslashreplace")


if __name__ == "__main__":
    main()
