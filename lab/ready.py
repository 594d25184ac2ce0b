"""The usual database guest, going on from a moment in which it had booted and wrote.

An emulated boot takes six times as much of a processor as to read the memory of a guest that has booted. So
the first test that wants such a guest boots one, writes down memory, disk and console of a moment, and keeps
them in the lab's cache; the guests of all other tests begin there. libvirt restores a guest only under the
name and UUID that it was saved with: those are in the head of the file, as XML, and are replaced there.
"""

from __future__ import annotations

import fcntl
import hashlib
import inspect
import shutil
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

import libvirt

from lab.daemons import LibvirtDaemons
from lab.dbguest import DbGuest
from lab.disks import DiskSpec
from lab.enter import IMAGES_DIR, cache_dir
from lab.images import run
from lab.initramfs import boot_files

#: Longer than any test's guest is called, so that there is room for its name.
_SAVED_NAME = "ready-" + "-" * 60
#: The lab's own copy: each guest's name is written into it.
_OWN_DIR = Path("/var/lib/libvirt/ready")
_EMULATOR = Path("/usr/bin/qemu-system-x86_64")
# libvirt's src/qemu/qemu_saveimage.h: magic, version, length of what follows up to QEMU's own data, whether
# it ran, compression, where the cookie begins in it.
_HEAD = struct.Struct("=16s5I56x")
_MAGIC, _VERSION = b"LibvirtQemudSave", 2


@dataclass(frozen=True)
class Moment:
    """What is known of a guest at one moment."""

    memory: Path
    #: How *memory* begins, as libvirt saved it.
    head: Path
    disk: Path
    console: Path

    @property
    def disks(self) -> list[DiskSpec]:
        """Return the disk of a guest that is to go on from here."""
        return [DiskSpec(size_bytes=self.disk.stat().st_size, content=self.disk)]

    def resume(self, guest: DbGuest) -> None:
        """Let a guest that is defined, and has these disks, go on from here."""
        shutil.copy(self.console, guest.console_path)
        with self.memory.open("r+b") as file:
            file.write(_renamed(self.head.read_bytes(), guest.name, guest.domain().UUIDString()))
        guest.daemons.connect().restoreFlags(str(self.memory), None, libvirt.VIR_DOMAIN_SAVE_RUNNING)


def usual_moment(daemons: LibvirtDaemons) -> Moment:
    """Return the moment at which the usual guest had booted, made now if the cache has none."""
    if not _OWN_DIR.exists():
        kept = cache_dir() / f"ready-{_recipe(daemons)}"
        with (cache_dir() / "ready.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # other labs wait rather than boot one, too
            if not kept.exists():
                _keep(daemons, kept)
        part = _OWN_DIR.with_suffix(".part")
        run("cp", "--recursive", "--no-target-directory", "--sparse=always", kept, part)
        part.rename(_OWN_DIR)
    return Moment(*(_OWN_DIR / what for what in ("memory", "head", "disk", "console")))


def _recipe(daemons: LibvirtDaemons) -> str:
    """Return a hash of all that a saved guest depends on."""
    boot, emulator = boot_files(), _EMULATOR.stat()
    facts = (boot.kernel.name, boot.initrd.name, emulator.st_size, emulator.st_mtime_ns,
             daemons.connect().getLibVersion(), Path(__file__).read_bytes(),
             Path(inspect.getfile(DbGuest)).read_bytes())
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _keep(daemons: LibvirtDaemons, kept: Path) -> None:
    """Boot the guest whose moment is kept, and write the moment down."""
    guest = DbGuest(daemons, IMAGES_DIR, _SAVED_NAME)
    part = Path(tempfile.mkdtemp(prefix="part.", dir=cache_dir()))
    try:
        guest.define()
        guest.start()
        guest.wait_ready()
        guest.domain().save(str(part / "memory"))
        with (part / "memory").open("rb") as file:
            begin = file.read(_HEAD.size)
            (part / "head").write_bytes(begin + file.read(_HEAD.unpack(begin)[2]))
        guest.read_disk("vda", part / "disk")
        shutil.copy(guest.console_path, part / "console")
        part.rename(kept)
    finally:
        guest.remove()
        shutil.rmtree(part, ignore_errors=True)


def _renamed(head: bytes, name: str, uuid: str) -> bytes:
    """Return the head of what libvirt saved with another name and UUID, as long as it was."""
    magic, version, length, ran, compression, cookie_at = _HEAD.unpack_from(head)
    assert (magic, version) == (_MAGIC, _VERSION), "saved by a libvirt that the lab does not know"
    texts = head[_HEAD.size:]
    xml, cookie = texts[:cookie_at].rstrip(b"\0").decode(), texts[cookie_at:].rstrip(b"\0")
    xml = xml.replace(ET.fromstring(xml).findtext("uuid", ""), uuid).replace(_SAVED_NAME, name)
    now = xml.encode() + b"\0"
    assert len(now + cookie) <= length, f"{name}: too long a name"
    packed = _HEAD.pack(magic, version, length, ran, compression, len(now))
    return packed + (now + cookie).ljust(length, b"\0")
