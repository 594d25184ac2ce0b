"""In the worker: from disks to the guest's tree of files, inside the appliance.

Everything here is asked of libguestfs; nothing of the guest is opened by this process.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from typing import Any

from stillframe.errors import FilesystemLocked, FilesystemUnknown, PathUnknown
from stillframe.restore.appliance_wire import Drive, FileSystem, Found

#: What holds no files that could be mounted.
_NO_FILES = ("swap", "unknown", "")
_ENCRYPTED = ("crypto_LUKS", "BitLocker")
_CASELESS = ("ntfs", "vfat", "exfat", "msdos")
#: Where the usual way fails: with a journal that can't be replayed.
_WITHOUT_JOURNAL = {"ext3": "ro,noload", "ext4": "ro,noload", "xfs": "ro,norecovery,nouuid"}
_DRIVE_LETTER = re.compile(r"([A-Za-z]):(?=[\\/]|$)")

_ADVICE = re.compile(r"This usually means|To see full error messages|Do: export ")

#: Asks for a key for a device; whether the last one was wrong.
Asker = Callable[[str, bool], str | None]


class GuestRoot:
    """The file systems of some disks. *handle* is a launched libguestfs."""

    def __init__(self, handle: Any, drives: tuple[Drive, ...], warn: Callable[[str], None]) -> None:
        self._handle = handle
        self._drives = drives
        self._warn = warn
        self._caseless = False
        self._mounted: str | None = None
        # What takes seconds to find out, and changes only when something is unlocked.
        self._filesystems: dict[str, str] | None = None
        self._roots: list[str] | None = None

    def _known(self) -> dict[str, str]:
        """Return the type of each file system, by its device."""
        if self._filesystems is None:
            found: dict[str, str] = self._handle.list_filesystems()
            # It leaves out what is encrypted.
            for device in {*self._handle.list_partitions(), *self._handle.list_devices(),
                           *self._handle.lvs()} - found.keys():
                with contextlib.suppress(RuntimeError):
                    if (kind := self._handle.vfs_type(device)) in _ENCRYPTED:
                        found[device] = kind
            self._filesystems = found
        return self._filesystems

    def _inspected(self) -> list[str]:
        """Return the devices that operating systems have their root on."""
        if self._roots is None:
            roots: list[str] = self._handle.inspect_os()
            self._roots = roots
            self._mounted = None  # it mounts things, and unmounts all
        return self._roots

    def unlock(self, keys: tuple[str, ...], ask: Asker) -> None:
        """Open what is encrypted as far as there are keys. Raises FilesystemLocked if keys are wrong."""
        for device in self._locked():
            self._unlock(device, keys, ask)

    def _unlock(self, device: str, keys: tuple[str, ...], ask: Asker) -> None:
        opened = any(self._opens(device, key) for key in keys)
        typed: str | None = ""
        tried = False
        while not keys and not opened and typed is not None:
            typed = ask(device, tried)
            opened = typed is not None and self._opens(device, typed)
            tried = True
        if not opened and keys:
            raise FilesystemLocked(f"No key that was given opens {self._named(device)}, which is encrypted.",
                                   "name a file with its passphrase: --luks-key-file FILE")
        if opened:
            # There may be a volume group in there; the appliance alone sees it.
            self._handle.lvm_scan(True)
            self._filesystems = self._roots = None

    def _opens(self, device: str, key: str) -> bool:
        # For writing: a journal is replayed into the overlay, which is thrown away.
        try:
            self._handle.cryptsetup_open(device, key, _opened_name(device))
        except RuntimeError:
            return False
        return True

    def found(self) -> Found:
        """Return all file systems, and the operating systems on them."""
        mounted: dict[str, str] = {}
        systems = []
        for root in self._inspected():
            places = self._handle.inspect_get_mountpoints(root)
            mounted |= {device: place for place, device in places.items()}
            systems.append(f"{self._handle.inspect_get_product_name(root)} on {root}")
        return Found(tuple(
            FileSystem(device, self._disk_of(device), kind, self._label(device), self._size(device),
                       mounted.get(device, ""))
            for device, kind in self._known().items()), tuple(systems))

    def is_mounted_at_once(self, device: str) -> bool:
        """Mount a named file system without a look at what else there is; return whether that worked.

        To list all takes a third of a launch. What keeps it from being mounted is for `mount` to find.
        """
        if not device or self._mounted == device:
            return bool(device)
        try:
            self._handle.umount_all()
            self._caseless, self._mounted = False, None
            self._mount(device, "/")
        except (RuntimeError, FilesystemUnknown):
            return False
        self._mounted = device
        return True

    def mount(self, device: str) -> None:
        """Mount one file system, or what inspection finds to be the guest's. Raises FilesystemUnknown."""
        if self._mounted == device:
            return
        self._handle.umount_all()
        self._caseless, self._mounted = False, None
        self._mount_all(device)
        self._mounted = device

    def _mount_all(self, device: str) -> None:
        known = self._known()
        if device:
            if device not in known:
                raise FilesystemUnknown(f"There is no file system {device}; there are {_enumerated(known)}.",
                                        "choose one of them: --filesystem DEVICE")
            self._mount(device, "/")
            return
        if len(_usable(known)) == 1 and not self._locked():
            self._mount(_usable(known)[0], "/")  # there is no other place for it: inspection takes long
            return
        roots = self._inspected()
        if len(roots) > 1:
            raise FilesystemUnknown(f"There are {len(roots)} operating systems: {_enumerated(roots)}.",
                                    "choose a file system: --filesystem DEVICE")
        if roots:
            self._mount_system(roots[0])
        else:
            self._mount(self._only(known), "/")

    def path(self, text: str) -> str:
        """Return a path as libguestfs takes it. Raises PathUnknown."""
        if self._caseless:
            letter = _DRIVE_LETTER.match(text)
            text = text[letter.end() if letter else 0:].replace("\\", "/") or "/"
        if not text.startswith("/"):
            raise PathUnknown(f"{text} does not begin with a slash: paths are from the guest's root.",
                              f"name it in full: /{text}")
        if self._caseless:
            with contextlib.suppress(RuntimeError):  # what it says will be said again, by what uses it
                text = str(self._handle.case_sensitive_path(text))
        return text

    def _only(self, known: dict[str, str]) -> str:
        usable, locked = _usable(known), self._locked()
        if not usable and locked:
            raise FilesystemLocked(
                f"{_enumerated(locked)} is encrypted, and no key was given.",
                "add --luks-key-file FILE, or run the command at a terminal, where the key is asked for")
        if not usable:
            raise FilesystemUnknown(
                "No file system was found" + (f": there is {_enumerated(known)}" if known else "")
                + ". It may be damaged, or of a kind that the appliance does not know.",
                "stillframe restore SNAPSHOT --to DIR/ --repo REPO   # the disk as it is")
        if len(usable) > 1:
            raise FilesystemUnknown(f"No operating system was found, and several file systems: "
                                    f"{_enumerated(usable)}.", "choose one: --filesystem DEVICE")
        return usable[0]

    def _locked(self) -> list[str]:
        """Return the encrypted devices that no key has opened."""
        encrypted = [device for device, kind in self._known().items() if kind in _ENCRYPTED]
        opened = set(self._handle.list_dm_devices()) if encrypted else set()
        return [device for device in encrypted if f"/dev/mapper/{_opened_name(device)}" not in opened]

    def _mount_system(self, root: str) -> None:
        places = self._handle.inspect_get_mountpoints(root)
        for place in sorted(places, key=len):
            try:
                self._mount(places[place], place)
            except FilesystemUnknown as error:
                if place == "/":
                    raise
                self._warn(f"{place} is left out: {error.message}")

    def _mount(self, device: str, place: str) -> None:
        # Not for reading alone below: the journal of a guest that ran is replayed, into the overlay.
        kind = self._handle.vfs_type(device)
        try:
            self._handle.mount_ro(device, place)
        except RuntimeError as error:
            try:
                if kind not in _WITHOUT_JOURNAL:
                    raise
                self._handle.mount_options(_WITHOUT_JOURNAL[kind], device, place)
                self._warn(f"{device} was mounted without its journal: its last changes may be missing")
            except RuntimeError:
                raise FilesystemUnknown(
                    f"{self._named(device)} can't be mounted: {said(error)}",
                    "stillframe restore SNAPSHOT --to DIR/ --repo REPO   # the disk as it is") from error
        self._caseless = self._caseless or (place == "/" and kind in _CASELESS)

    def _named(self, device: str) -> str:
        disk = self._disk_of(device)
        return f"{device} (of {disk})" if disk else device

    def _disk_of(self, device: str) -> str:
        with contextlib.suppress(RuntimeError, IndexError):
            whole = device if device in self._handle.list_devices() else self._handle.part_to_dev(device)
            return self._drives[int(self._handle.device_index(whole))].target
        return ""

    def _label(self, device: str) -> str:
        with contextlib.suppress(RuntimeError, UnicodeError):
            return str(self._handle.vfs_label(device))
        return ""

    def _size(self, device: str) -> int:
        with contextlib.suppress(RuntimeError):
            return int(self._handle.blockdev_getsize64(device))
        return 0


def _usable(known: dict[str, str]) -> list[str]:
    return [device for device, kind in known.items() if kind not in (*_NO_FILES, *_ENCRYPTED)]


def _opened_name(device: str) -> str:
    """Return what an encrypted device is called once it is open."""
    return "stillframe-" + device.rpartition("/")[2]


def said(error: RuntimeError) -> str:
    """Return what libguestfs said, in one line, without its advice to look for what it did not say."""
    return _ADVICE.split(" ".join(str(error).split()))[0].strip()[:600]


def _enumerated(devices: dict[str, str] | list[str]) -> str:
    if isinstance(devices, dict):
        return ", ".join(f"{device} ({kind})" for device, kind in devices.items())
    return ", ".join(devices)
