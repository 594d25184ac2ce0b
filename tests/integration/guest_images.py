"""A guest's disks with many kinds of file systems, made once and kept in the lab's cache.

vda  root (ext4), LVM with /data (ext4) and /opt (btrfs), /boot/efi (FAT), /windows (NTFS), an encrypted one
vdb  /srv (XFS), on the whole disk
vdc  nothing that anybody knows
vdd  ext4, its superblock overwritten with rubbish, but for what it is known by
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import guestfs

from lab.enter import cache_dir
from lab.images import run
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
_PLACES = {"/data": "/dev/guest/data", "/opt": "/dev/guest/opt", "/boot/efi": "/dev/sda3",
           "/windows": "/dev/sda4", "/srv": "/dev/sdb"}
_SECTOR_BYTES = 512
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
    sizes_mib = {"vda": sum(_PARTS_MIB) + 2, "vdb": 300, "vdc": 1, "vdd": 8}
    for target, size_mib in sizes_mib.items():
        with (folder / target).open("wb") as file:
            file.truncate(size_mib * MIB)
    (folder / "vdc").write_bytes(noise(MIB, 9))
    run("mkfs.xfs", "-q", "-L", "srv", folder / "vdb")
    run("mkfs.ext4", "-q", "-F", "-O", "^metadata_csum", folder / "vdd")
    with (folder / "vdd").open("r+b") as file:
        for at, length in ((1024, 56), (1024 + 58, 1024 - 58)):  # but for the two bytes of its magic
            file.seek(at)
            file.write(noise(length, at))
    handle = guestfs.GuestFS(python_return_dict=True)
    handle.set_backend("direct")
    for target in ("vda", "vdb"):
        handle.add_drive(str(folder / target), format="raw")
    handle.launch()
    _make_filesystems(handle)
    _write_files(handle)
    handle.umount_all()
    _make_vault(handle)
    handle.shutdown()
    handle.close()


def _make_filesystems(handle: Any) -> None:
    handle.part_init("/dev/sda", "gpt")
    at = MIB // _SECTOR_BYTES
    for size_mib in _PARTS_MIB:
        length = size_mib * MIB // _SECTOR_BYTES
        handle.part_add("/dev/sda", "p", at, at + length - 1)
        at += length
    handle.pvcreate("/dev/sda2")
    handle.vgcreate("guest", ["/dev/sda2"])
    handle.lvcreate("data", "guest", 32)
    handle.lvcreate("opt", "guest", 128)
    handle.mkfs("ext4", "/dev/sda1", label="root")
    handle.mkfs("ext4", "/dev/guest/data")
    handle.mkfs("btrfs", "/dev/guest/opt", label="opt")
    handle.mkfs("vfat", "/dev/sda3", label="EFI")
    handle.mkfs("ntfs", "/dev/sda4", label="windows")


def _write_files(handle: Any) -> None:
    handle.mount("/dev/sda1", "/")
    for folder in ("/bin", "/usr", "/etc", "/home/alice/empty"):
        handle.mkdir_p(folder)
    for place, device in _PLACES.items():
        handle.mkdir_p(place)
        handle.mount(device, place)
    for path, written in FILES.items():
        handle.mkdir_p(path.rpartition("/")[0] or "/")
        handle.write(path, written.content)
        if not path.startswith(("/boot/efi", "/windows")):
            handle.chown(written.uid, written.gid, path)
            handle.chmod(written.mode, path)
    home = "/home/alice/"
    handle.ln_s("notes.txt", f"{home}link")
    handle.ln_s("/etc/hostname", f"{home}absolute")
    handle.ln(f"{home}notes.txt", f"{home}zz-hard")
    handle.mkfifo(0o600, f"{home}pipe")
    handle.setxattr("user.color", "blue", 4, f"{home}notes.txt")
    handle.acl_set_file(f"{home}notes.txt", "access", ACL)
    for path in [*FILES, f"{home}empty", "/home/alice"]:
        handle.utimens(path, MODIFIED_S, MODIFIED_NS, MODIFIED_S, MODIFIED_NS)


def _make_vault(handle: Any) -> None:
    # Not luks_format: its argon2id takes many minutes of a processor that is emulated.
    cheap = "--type luks2 --pbkdf pbkdf2 --pbkdf-force-iterations 1000"
    handle.debug("sh", [f"printf '{LUKS_PASSPHRASE}' | cryptsetup luksFormat -q {cheap} /dev/sda5 -"])
    handle.cryptsetup_open("/dev/sda5", LUKS_PASSPHRASE, "vault")
    handle.mkfs("ext4", "/dev/mapper/vault", label="vault")
    handle.mount("/dev/mapper/vault", "/")
    handle.write("/vault.bin", VAULT)
    handle.umount_all()
    handle.cryptsetup_close("/dev/mapper/vault")
