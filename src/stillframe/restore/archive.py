"""Archives of a guest's files: taken from the appliance piece by piece, looked at, and handed on.

A tar archive from a hostile guest is input like any other: it may name paths outside of where it is
unpacked, go through links, or bring programs that run as root. GNU tar, which unpacks, only gets
what has passed here.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO

from stillframe import process
from stillframe.errors import ArchiveRefused, DestinationUnwritable, TargetExists

_PRIVILEGED = stat.S_ISUID | stat.S_ISGID | stat.S_ISVTX
_TAR_TIMEOUT_S = 600.0
_LOG_BYTES = 2000
#: What an unpacked file keeps of vendors' headers: the rest gives rights, or is the guest's policy.
_HARMLESS = ("SCHILY.xattr.user.", "SCHILY.acl.")
_UNWANTED = ("path", "linkpath", "hdrcharset")


@dataclass
class Rules:
    """What becomes of an archive's members.

    *unpacked*: they become files of this host, so devices and what gives rights stay out.
    """

    unpacked: bool
    left_out: list[str] = field(default_factory=list)
    members: int = 0
    content_bytes: int = 0


def hand_on(
    source: IO[bytes], name: str, sink: tarfile.TarFile, rules: Rules, report: Callable[[], None],
) -> None:
    """Write the members of the archive *source* into *sink*, its root called *name*.

    Raises ArchiveRefused for what no honest archive of a folder has.
    """
    order = _Order()
    try:
        with tarfile.open(fileobj=source, mode="r|") as archive:
            for member in archive:
                inner = _inner(member.name)
                order.check(inner, member)
                if _is_wanted(member, rules):
                    member.name = _joined(name, inner)
                    if member.islnk():
                        member.linkname = _joined(name, _inner(member.linkname))
                    member.pax_headers = _headers(member, rules)
                    sink.addfile(member, archive.extractfile(member) if member.isreg() else None)
                    rules.members += 1
                    rules.content_bytes += member.size if member.isreg() else 0
                report()
                # Both would keep all of them until the end.
                vars(archive)["members"], vars(sink)["members"] = [], []
        while source.read(tarfile.RECORDSIZE):
            pass
    except (tarfile.TarError, ValueError) as error:
        raise ArchiveRefused(f"What came of {name} is no proper archive: {error}",
                             "run the same command again") from error


def _is_wanted(member: tarfile.TarInfo, rules: Rules) -> bool:
    """Return whether a member is handed on; take rights from one that becomes a file of this host."""
    if not rules.unpacked:
        return True
    if not (member.isreg() or member.isdir() or member.issym() or member.islnk()):
        rules.left_out.append(member.name)
        return False
    # A program of a guest's root would run as this host's.
    member.mode &= ~_PRIVILEGED
    return True


def _headers(member: tarfile.TarInfo, rules: Rules) -> dict[str, str]:
    return {key: value for key, value in member.pax_headers.items()
            if key not in _UNWANTED
            and (not rules.unpacked or "." not in key or key.startswith(_HARMLESS))}


class _Order:
    """The order in which tar writes a folder: each folder before what is in it, the root first."""

    def __init__(self) -> None:
        self._folders: set[PurePosixPath] = set()
        self._links: set[PurePosixPath] = set()

    def check(self, inner: PurePosixPath, member: tarfile.TarInfo) -> None:
        """Refuse a member that would be reached by a link, or that takes a folder's place."""
        if inner.parts and inner.parent not in self._folders:
            raise _hostile(f"{member.name!a} in what is no folder of it")
        if (inner in self._links) if member.isdir() else (inner in self._folders):
            raise _hostile(f"{member.name!a} both as a folder and as something else")
        if member.isdir():
            self._folders.add(inner)
        elif member.issym():
            self._links.add(inner)


def _inner(name: str) -> PurePosixPath:
    """Return a member's path below the root of its archive. Raises ArchiveRefused."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise _hostile(f"a path that leads out of it: {name!a}")
    return path


def _hostile(what: str) -> ArchiveRefused:
    return ArchiveRefused(
        f"The archive that came from the appliance has {what}. No honest one has: the guest may be hostile.",
        "take it as a .tar, and look at that with `tar -t` before anything else")


def _joined(name: str, inner: PurePosixPath) -> str:
    return str(PurePosixPath(name) / inner)


@contextlib.contextmanager
def tar_file(path: Path) -> Iterator[IO[bytes]]:
    """Give a new file, which is removed if the block fails. Raises TargetExists, DestinationUnwritable."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        check_absent(path)
        raise DestinationUnwritable(f"{path} can't be made: {error.strerror}.",
                                    f"ls -ld {path.parent}") from error
    try:
        with os.fdopen(fd, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise DestinationUnwritable(f"{path} can't be written: {error.strerror}.",
                                        f"df -h {path.parent}") from error
        raise


def check_absent(path: Path) -> None:
    """Raise TargetExists if there is something at *path*."""
    if os.path.lexists(path):
        raise TargetExists(f"{path} exists.", "choose another place, or remove it")


@contextlib.contextmanager
def unpacking(folder: Path, names: list[str]) -> Iterator[IO[bytes]]:
    """Give a sink for an archive that GNU tar unpacks into *folder*.

    What is called as *names* say in the end is removed from there if the block fails. Raises
    TargetExists, DestinationUnwritable.
    """
    is_new = _make_folder(folder)
    done = False
    try:
        with _gnu_tar(folder) as sink:
            yield sink
        done = True
    finally:
        if not done:
            for name in names:
                _remove(folder / name)
            if is_new:
                with contextlib.suppress(OSError):
                    folder.rmdir()


@contextlib.contextmanager
def _gnu_tar(folder: Path) -> Iterator[IO[bytes]]:
    source, sink = os.pipe()
    command = ["tar", "--extract", f"--file=/dev/fd/{source}", f"--directory={folder}", "--keep-old-files",
               "--same-permissions", "--numeric-owner", "--acls", "--xattrs", "--xattrs-include=user.*",
               "--delay-directory-restore", "--same-owner" if os.geteuid() == 0 else "--no-same-owner"]
    try:
        with process.running(command, passing=(source,)) as tar:
            os.close(source)
            source = -1
            try:
                with os.fdopen(sink, "wb") as file:
                    yield file
            except BrokenPipeError:
                pass  # it says why below
            assert tar.stdout is not None
            said = tar.stdout.read(_LOG_BYTES).decode(errors="replace").strip()
            if tar.wait(_TAR_TIMEOUT_S) != 0:
                raise DestinationUnwritable(f"Files can't be written to {folder}: {said}", f"df -h {folder}")
    finally:
        if source >= 0:
            os.close(source)


def _make_folder(folder: Path) -> bool:
    """Make the folder if it is absent, and return whether it was."""
    try:
        is_new = not folder.exists()
        folder.mkdir(mode=0o700, exist_ok=True)
        return is_new
    except FileExistsError as error:
        raise TargetExists(f"{folder} is no folder.", "choose a folder, or FILE.tar") from error
    except OSError as error:
        raise DestinationUnwritable(f"The folder {folder} can't be made: {error.strerror}.",
                                    f"ls -ld {folder.parent}") from error


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
