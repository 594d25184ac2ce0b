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

#: Asks for a key for a device; whether the last one was wrong.
Asker = Callable[[str, bool], str | None]


class GuestRoot:
    """The file systems of some disks. *handle* is a launched libguestfs."""

    def __init__(self, handle: Any, drives: tuple[Drive, ...], warn: Callable[[str], None]) -> None:
        self._handle = handle
        self._drives = drives
        self._warn = warn
        self._caseless = False

    def unlock(self, keys: tuple[str, ...], ask: Asker) -> None:
        """Open what is encrypted as far as there are keys. Raises FilesystemLocked if keys are wrong."""
        for device, kind in self._handle.list_filesystems().items():
            if kind in _ENCRYPTED and not self._is_open(device):
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

    def _opens(self, device: str, key: str) -> bool:
        # For writing: a journal is replayed into the overlay, which is thrown away.
        name = "stillframe-" + device.rpartition("/")[2]
        try:
            self._handle.cryptsetup_open(device, key, name)
        except RuntimeError:
            return False
        return True

    def found(self) -> Found:
        """Return all file systems, and the operating systems on them."""
        mounted: dict[str, str] = {}
        systems = []
        for root in self._handle.inspect_os():
            places = self._handle.inspect_get_mountpoints(root)
            mounted |= {device: place for place, device in places.items()}
            systems.append(f"{self._handle.inspect_get_product_name(root)} on {root}")
        return Found(tuple(
            FileSystem(device, self._disk_of(device), kind, self._label(device), self._size(device),
                       mounted.get(device, ""))
            for device, kind in self._handle.list_filesystems().items()), tuple(systems))

    def mount(self, device: str) -> None:
        """Mount one file system, or what inspection finds to be the guest's. Raises FilesystemUnknown."""
        self._handle.umount_all()
        self._caseless = False
        known = self._handle.list_filesystems()
        if device:
            if device not in known:
                raise FilesystemUnknown(f"There is no file system {device}; there are {_enumerated(known)}.",
                                        "choose one of them: --filesystem DEVICE")
            self._mount(device, "/")
            return
        roots = self._handle.inspect_os()
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
        usable = [device for device, kind in known.items() if kind not in (*_NO_FILES, *_ENCRYPTED)]
        locked = [device for device, kind in known.items()
                  if kind in _ENCRYPTED and not self._is_open(device)]
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

    def _is_open(self, device: str) -> bool:
        opened: list[str] = self._handle.list_dm_devices()
        return "/dev/mapper/stillframe-" + device.rpartition("/")[2] in opened

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
        with contextlib.suppress(RuntimeError):
            return str(self._handle.vfs_label(device))
        return ""

    def _size(self, device: str) -> int:
        with contextlib.suppress(RuntimeError):
            return int(self._handle.blockdev_getsize64(device))
        return 0


def said(error: RuntimeError) -> str:
    """Return what libguestfs said, in one line."""
    return " ".join(str(error).split())[:600]


def _enumerated(devices: dict[str, str] | list[str]) -> str:
    if isinstance(devices, dict):
        return ", ".join(f"{device} ({kind})" for device, kind in devices.items())
    return ", ".join(devices)
