"""A guest's disks with many kinds of file systems, made once and kept in the lab's cache.

vda  root (ext4), LVM with /data (ext4) and /opt (btrfs), /boot/efi (FAT), /windows (NTFS), an encrypted one
vdb  /srv (XFS), on the whole disk
vdc  nothing that anybody knows
vdd  ext4, its superblock overwritten with rubbish, but for what it is known by
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lab.enter import cache_dir
from lab.images import run
from lab.lvm import lvm
from lab.waiting import PATIENCE_S, wait_for
from stillframe.units import KIB, MIB
from tests.unit.repository_disks import noise

LUKS_PASSPHRASE = "correct horse"
MODIFIED_S, MODIFIED_NS = 1_700_000_000, 123_456_789
ACL = "user::rw-\nuser:1234:r--\ngroup::r--\nmask::r--\nother::---\n"
DISKS = ("vda", "vdb", "vdc", "vdd")
_FSTAB = """\
LABEL=root / ext4 defaults 0 1
/dev/guest/data /data ext4 defaults 0 2
LABEL=opt /opt btrfs defaults 0 2
LABEL=EFI /boot/efi vfat defaults 0 2
LABEL=windows /windows ntfs-3g defaults 0 2
LABEL=srv /srv xfs defaults 0 2
"""
#: Where file systems are mounted in the guest, but for the root.
_PLACES = ("/data", "/opt", "/boot/efi", "/windows", "/srv")
_MODIFIED = MODIFIED_S * 10**9 + MODIFIED_NS
#: LVM writes down what there is, and asks no device-mapper.
_INACTIVE = ("--driverloaded", "n")
#: What QEMU puts before the content: a head for each of eight keys.
_LUKS_HEAD_MIB = 4
#: Partitions of vda, in MiB: root, LVM, EFI, windows, encrypted.
_PARTS_MIB = (48, 192, 36, 16, 48)


@dataclass(frozen=True)
class Written:
    """A file that was written: its content, owner and mode."""

    content: bytes
    uid: int = 0
    gid: int = 0
    mode: int = 0o644


FILES = {
    "/etc/fstab": Written(_FSTAB.encode()),
    "/etc/hostname": Written(b"web\n"),
    "/etc/os-release": Written(b'NAME="Debian"\nID=debian\nVERSION_ID="12"\nPRETTY_NAME="Debian of tests"\n'),
    "/home/alice/notes.txt": Written(noise(100_003, 1), 1000, 1001, 0o640),
    "/home/alice/size\u00e4 1.txt": Written(b"umlaut\n", 1000, 1000, 0o600),
    "/home/alice/tool": Written(b"#!/bin/sh\n", 0, 0, 0o4755),
    "/data/rows.db": Written(noise(300 * KIB + 7, 2), 33, 33, 0o600),
    "/opt/app.bin": Written(noise(70_000, 3), 5, 6, 0o755),
    "/boot/efi/EFI/grub.cfg": Written(b"set timeout=5\n"),
    "/windows/Users/Me/report.doc": Written(noise(40_000, 4)),
    "/srv/big.bin": Written(noise(2 * MIB + 1, 5), 7, 8, 0o644),
}
VAULT = noise(20_000, 6)


def guest_images() -> dict[str, Path]:
    """Return the raw image of each disk, made now if the cache has none."""
    recipe = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    folder = cache_dir() / f"guest-images-{recipe}"
    if not folder.exists():
        part = Path(tempfile.mkdtemp(dir=cache_dir()))
        try:
            _make(part)
            part.rename(folder)
        except OSError:
            if not folder.exists():  # else another lab was first
                raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return {target: folder / target for target in DISKS}


def _make(folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as place:
        parts = _make_parts(Path(place))
        _assemble(folder / "vda", parts)
        _make_xfs(folder / "vdb", Path(place))
    (folder / "vdc").write_bytes(noise(MIB, 9))
    _make_empty(folder / "vdd", 8)
    run("mkfs.ext4", "-q", "-F", "-O", "^metadata_csum", folder / "vdd")
    with (folder / "vdd").open("r+b") as file:
        for at, length in ((1024, 56), (1024 + 58, 1024 - 58)):  # but for the two bytes of its magic
            file.seek(at)
            file.write(noise(length, at))


def _make_parts(place: Path) -> list[Path]:
    """Make what is in each partition of vda, in files."""
    root, volumes, efi, windows, vault = parts = [place / f"part-{number}" for number in range(1, 6)]
    for part, size_mib in zip(parts, _PARTS_MIB, strict=True):
        _make_empty(part, size_mib)
    run("mkfs.ext4", "-q", "-L", "root", root)
    with _mounted(root) as mounted:
        _fill_root(mounted)
    _make_volumes(volumes, place)
    run("mkfs.vfat", "-n", "EFI", efi)
    run("mcopy", "-s", "-i", efi, *_filled(place / "efi", "/boot/efi").iterdir(), "::")
    run("mkfs.ntfs", "-q", "-F", "-Q", "-L", "windows", windows)
    with _mounted_ntfs(windows) as mounted:
        _filled(mounted, "/windows")
    _make_vault(vault, place)
    return parts


def _make_empty(image: Path, size_mib: int) -> None:
    with image.open("wb") as file:
        file.truncate(size_mib * MIB)


@contextlib.contextmanager
def _mounted(image: Path) -> Iterator[Path]:
    """Mount an image of an ext4 file system for the length of the block."""
    with tempfile.TemporaryDirectory() as place:
        run("mount", "-t", "ext4", "-o", "loop", image, place)
        try:
            yield Path(place)
        finally:
            run("umount", place)


@contextlib.contextmanager
def _mounted_ntfs(image: Path) -> Iterator[Path]:
    with (
        tempfile.TemporaryDirectory() as place,
        # In the foreground: all is in the image once it has ended, not yet when it is unmounted.
        subprocess.Popen(["ntfs-3g", "-o", "no_detach", image, place], stderr=subprocess.DEVNULL),
    ):
        try:
            wait_for("NTFS is mounted", lambda: os.path.ismount(place), PATIENCE_S)
            yield Path(place)
        finally:
            run("umount", place)


def _filled(folder: Path, place: str) -> Path:
    """Write the files that are below *place* in the guest into a folder."""
    for path, written in FILES.items():
        if path.startswith(f"{place}/") and _place_of(path) == place:
            _write(folder / path.removeprefix(f"{place}/"), written)
    return folder


def _place_of(path: str) -> str:
    return next((place for place in _PLACES if path.startswith(f"{place}/")), "")


def _write(to: Path, written: Written) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_bytes(written.content)
    os.chown(to, written.uid, written.gid)
    to.chmod(written.mode)
    os.utime(to, ns=(_MODIFIED, _MODIFIED))


def _fill_root(root: Path) -> None:
    for folder in ("bin", "usr", "home/alice/empty", *_PLACES):
        (root / folder.lstrip("/")).mkdir(parents=True)
    _filled(root, "")
    home = root / "home/alice"
    (home / "link").symlink_to("notes.txt")
    (home / "absolute").symlink_to("/etc/hostname")
    (home / "zz-hard").hardlink_to(home / "notes.txt")
    os.mkfifo(home / "pipe", 0o600)
    os.setxattr(home / "notes.txt", "user.color", b"blue")
    run("setfacl", "--set", ACL.strip().replace("\n", ","), home / "notes.txt")
    for path in (home / "empty", home):
        os.utime(path, ns=(_MODIFIED, _MODIFIED))


def _make_volumes(image: Path, place: Path) -> None:
    """Make a volume group with two file systems. No volume is active: the kernel may lack device-mapper."""
    data, opt = place / "data", place / "opt"
    for volume, size_mib in ((data, 32), (opt, 128)):
        _make_empty(volume, size_mib)
    run("mkfs.ext4", "-q", data)
    with _mounted(data) as mounted:
        _filled(mounted, "/data")
    run("mkfs.btrfs", "-q", "-L", "opt", "--rootdir", _filled(place / "opt-files", "/opt"), opt)
    device = run("losetup", "--find", "--show", image).strip()
    try:
        lvm(device, "vgcreate", *_INACTIVE, "guest", device)
        for volume in (data, opt):
            size = f"{volume.stat().st_size}b"
            lvm(device, "lvcreate", *_INACTIVE, "--activate", "n", "--zero", "n", "--wipesignatures", "n",
                "--name", volume.name, "--size", size, "guest")
        found = lvm(device, "pvs", *_INACTIVE, "--noheadings", "--units", "b", "--nosuffix",
                    "--options", "lv_name,pe_start,vg_extent_size,pvseg_start")
    finally:
        run("losetup", "--detach", device)
    for name, *numbers in (words for line in found.splitlines() if len(words := line.split()) == 4):
        begin_bytes, extent_bytes, first = map(int, numbers)
        _put(place / name, image, begin_bytes + first * extent_bytes)


def _put(content: Path, image: Path, at_bytes: int) -> None:
    run("dd", f"if={content}", f"of={image}", "bs=1M", f"seek={at_bytes}", "oflag=seek_bytes",
        "conv=notrunc,sparse", "status=none")


def _make_vault(image: Path, place: Path) -> None:
    """Make an encrypted file system; the kernel need not be able to open it."""
    plain, secret = place / "plain", place / "secret"
    _make_empty(plain, image.stat().st_size // MIB - _LUKS_HEAD_MIB)
    run("mkfs.ext4", "-q", "-L", "vault", plain)
    with _mounted(plain) as mounted:
        (mounted / "vault.bin").write_bytes(VAULT)
    secret.write_text(LUKS_PASSPHRASE)
    # iter-time: what it costs to guess the passphrase would cost an emulated appliance many times as much.
    run("qemu-img", "convert", "--object", f"secret,id=key,file={secret}", "-f", "raw", "-O", "luks",
        "-o", "key-secret=key,iter-time=1", plain, image)


def _make_xfs(image: Path, place: Path) -> None:
    _make_empty(image, 300)
    lines = ["nothing-to-boot", "0 0", "d--755 0 0"]
    files = _filled(place / "srv", "/srv")
    for path in files.iterdir():
        facts = path.stat()
        lines.append(f"{path.name} ---{facts.st_mode & 0o777:o} {facts.st_uid} {facts.st_gid} {path}")
    (place / "protofile").write_text("\n".join([*lines, "$", ""]))
    run("mkfs.xfs", "-q", "-L", "srv", "-p", place / "protofile", image)


def _assemble(image: Path, parts: Sequence[Path]) -> None:
    """Put the partitions into a disk."""
    _make_empty(image, sum(_PARTS_MIB) + 2)
    at_mib, lines = 1, ["label: gpt"]
    for part, size_mib in zip(parts, _PARTS_MIB, strict=True):
        lines.append(f"start={at_mib}MiB, size={size_mib}MiB")
        _put(part, image, at_mib * MIB)
        at_mib += size_mib
    subprocess.run(["sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", image], input="\n".join(lines),
                   text=True, check=True, capture_output=True)
