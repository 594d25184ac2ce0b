"""Archives of a guest's files: what an honest one keeps, and what a hostile one can't do."""

from __future__ import annotations

import io
import os
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from stillframe.errors import ArchiveRefused, DestinationUnwritable, TargetExists
from stillframe.restore.archive import Rules, hand_on, tar_file, unpacking

Member = tuple[str, bytes, str]  # name, tarfile's type, content or where it links to
FOLDER, FILE, LINK, HARD = tarfile.DIRTYPE, tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE
ROOT: Member = ("./", FOLDER, "")


def archive(*members: Member, change: Callable[[tarfile.TarInfo], None] = lambda _: None) -> io.BytesIO:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as made:
        for name, kind, text in members:
            info = tarfile.TarInfo(name)
            info.type, info.mode = kind, 0o755 if kind == FOLDER else 0o644
            if kind in (LINK, HARD):
                info.linkname = text
            else:
                info.size = len(text)
            info.uid, info.gid = os.getuid(), os.getgid()
            change(info)
            made.addfile(info, io.BytesIO(text.encode()) if kind == FILE else None)
    out.seek(0)
    return out


def unpack(source: io.BytesIO, folder: Path) -> Rules:
    rules = Rules(unpacked=True)
    with unpacking(folder, ["tree"]) as sink, tarfile.open(fileobj=sink, mode="w|") as to:
        hand_on(source, "tree", to, rules, lambda: None)
    return rules


def handed_on(source: io.BytesIO, *, unpacked: bool) -> dict[str, tarfile.TarInfo]:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as to:
        hand_on(source, "tree", to, Rules(unpacked), lambda: None)
    out.seek(0)
    with tarfile.open(fileobj=out) as read:
        return {each.name: each for each in read}


def test_a_tree_becomes_files(tmp_path: Path) -> None:
    rules = unpack(archive(ROOT, ("./a", FOLDER, ""), ("./a/one", FILE, "content"), ("./a/link", LINK, "one"),
                           ("./a/out", LINK, "/etc/passwd"), ("./a/same", HARD, "./a/one")), tmp_path / "new")
    tree = tmp_path / "new/tree/a"
    assert (tree / "one").read_text() == "content"
    assert ((tree / "link").readlink(), (tree / "out").readlink()) == (Path("one"), Path("/etc/passwd"))
    assert (tree / "same").stat().st_ino == (tree / "one").stat().st_ino
    assert (rules.members, rules.content_bytes) == (6, 7)


@pytest.mark.parametrize("members", [
    [ROOT, ("../out", FILE, "x")],
    [ROOT, ("/tmp/out", FILE, "x")],
    [ROOT, ("./a/../../out", FILE, "x")],
    [ROOT, ("./same", HARD, "../../out")],
    [ROOT, ("./same", HARD, "/etc/passwd")],
    [ROOT, ("./a", LINK, "/etc"), ("./a/out", FILE, "x")],
    [ROOT, ("./a", LINK, "/etc"), ("./a", FOLDER, ""), ("./a/out", FILE, "x")],
    [ROOT, ("./a", FOLDER, ""), ("./a", LINK, "/etc"), ("./a/out", FILE, "x")],
    [ROOT, ("./a", FILE, "x"), ("./a/out", FILE, "x")],
    [ROOT, ("./none/out", FILE, "x")],
    [("./out", FILE, "x")],
])
def test_what_no_honest_archive_has_is_refused(tmp_path: Path, members: list[Member]) -> None:
    with pytest.raises(ArchiveRefused):
        unpack(archive(*members), tmp_path / "new")
    assert list(tmp_path.rglob("*")) == [], "something was left"


def test_files_get_no_rights_on_this_host() -> None:
    def give_rights(info: tarfile.TarInfo) -> None:
        if info.isreg():
            info.mode = 0o7755
            info.pax_headers = {
                "SCHILY.xattr.security.capability": "x", "SCHILY.xattr.trusted.x": "x", "mtime": "7.5",
                "SCHILY.xattr.user.color": "blue", "SCHILY.acl.access": "user::rw-",
                "RHT.security.selinux": "x"}

    source = archive(ROOT, ("./tool", FILE, "x"), ("./disk", tarfile.BLKTYPE, ""), change=give_rights)
    members = handed_on(source, unpacked=True)
    assert set(members) == {"tree", "tree/tool"}
    assert members["tree/tool"].mode == 0o755
    assert set(members["tree/tool"].pax_headers) == {"mtime", "SCHILY.xattr.user.color", "SCHILY.acl.access"}
    source.seek(0)
    kept = handed_on(source, unpacked=False)
    assert set(kept) == {"tree", "tree/tool", "tree/disk"}
    assert stat.S_IMODE(kept["tree/tool"].mode) == 0o7755
    assert len(kept["tree/tool"].pax_headers) == 6


def test_attributes_that_are_no_text_are_kept() -> None:
    value = b"\xff\x00\n\xfe".decode("utf-8", "surrogateescape")

    def give(info: tarfile.TarInfo) -> None:
        info.pax_headers = {"SCHILY.xattr.user.raw": value} if info.isreg() else {}

    members = handed_on(archive(ROOT, ("./a", FILE, "x"), change=give), unpacked=True)
    assert members["tree/a"].pax_headers["SCHILY.xattr.user.raw"] == value


@pytest.mark.parametrize("cut_at", [100, 1100, 1600])
def test_an_archive_that_ends_early_is_refused(tmp_path: Path, cut_at: int) -> None:
    """Within a member: that none is missing at the end is known by what the worker says behind the data."""
    whole = archive(ROOT, ("./a", FILE, "x" * 1000)).getvalue()
    with pytest.raises(ArchiveRefused):
        unpack(io.BytesIO(whole[:cut_at]), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/a").write_text("mine")
    with pytest.raises(DestinationUnwritable), unpacking(tmp_path, []) as sink, \
            tarfile.open(fileobj=sink, mode="w|") as to:
        hand_on(archive(ROOT, ("./a", FILE, "theirs")), "tree", to, Rules(unpacked=True), lambda: None)
    assert (tmp_path / "tree/a").read_text() == "mine"


def test_a_tar_file_is_whole_or_absent(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), tar_file(tmp_path / "a.tar") as file:
        file.write(bytes(1 // 0))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a.tar").touch()
    with pytest.raises(TargetExists), tar_file(tmp_path / "a.tar"):
        pass
