"""Where an image is, in words that QEMU understands.

An ImagePlace names one image: the protocol (file, block device, NBD, RBD or any
other that QEMU has) and the format on top of it (raw, qcow2). Opening a qcow2 by
its place opens its backing chain too, as the image itself records it.
"""

from __future__ import annotations

import enum
import json
import os
import stat
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote

from stillframe.errors import GuestUnfit


class ImageKind(enum.Enum):
    """The protocol by which QEMU reaches an image."""

    FILE = "file"
    BLOCK = "block"
    NBD = "nbd"
    RBD = "rbd"
    OTHER = "other"

    @property
    def is_local(self) -> bool:
        """Whether the image is a path on this host."""
        return self in (ImageKind.FILE, ImageKind.BLOCK)


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """What tells a file from another, and from itself before a change.

    For a block device `size_bytes` is 0 and `mtime_ns` belongs to its node in /dev: only
    `device` and `inode` (and the node's own numbers in `special`) mean anything.
    """

    device: int
    inode: int
    size_bytes: int
    mtime_ns: int
    special: int = 0

    def same_file(self, other: FileIdentity) -> bool:
        """Return whether both are the same file or device, changed or not."""
        return (self.device, self.inode, self.special) == (other.device, other.inode, other.special)


def file_identity(path: str) -> FileIdentity:
    """Return the identity of the file or device at *path* (links are followed). Raises OSError."""
    found = os.stat(path)
    special = found.st_rdev if stat.S_ISBLK(found.st_mode) else 0
    return FileIdentity(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, special)


@dataclass(frozen=True, slots=True)
class ImagePlace:
    """One image that QEMU can open. Make it with the functions below, not by hand.

    `driver` is the format ("raw", "qcow2"). `path` is set for files and block devices. For all
    else `protocol_json` is the protocol layer in QEMU's blockdev words, as JSON text (so that a
    place can be compared, hashed and kept in a journal). `beneath` is the image below, where the
    image's own record is not to be gone by.
    """

    kind: ImageKind
    driver: str
    path: str = ""
    protocol_json: str = ""
    beneath: ImagePlace | None = None

    def qemu_options(self) -> dict[str, Any]:
        """Return the image as blockdev options: the format driver with its protocol below it."""
        below = {} if self.beneath is None else {"backing": self.beneath.qemu_options()}
        return {"driver": self.driver, "file": self._protocol(), **below}

    def alone(self) -> ImagePlace:
        """Return the image without a word about what is below it."""
        return replace(self, beneath=None)

    @property
    def asks_who(self) -> bool:
        """Whether the image, or one below it that is named, opens only for a user."""
        return self.beneath is not None or bool(self.protocol_json and "user" in self._protocol())

    def json_name(self) -> str:
        """Return the image as a ``json:{...}`` file name that every QEMU program takes."""
        return "json:" + json.dumps(self.qemu_options(), sort_keys=True, separators=(",", ":"))

    def backing_text(self) -> str:
        """Return what to write into a qcow2 header to name this image as the backing file.

        A plain path, an NBD or RBD name, or (for other protocols) the json: name of the
        protocol layer. The format goes beside it, as the backing format.
        """
        if self.kind.is_local:
            return self.path
        options = self._protocol()
        if self.kind is ImageKind.NBD:
            return _nbd_uri(options)
        if self.kind is ImageKind.RBD:
            return _rbd_name(options)
        return "json:" + json.dumps(options, sort_keys=True, separators=(",", ":"))

    def is_named(self, backing: str) -> bool:
        """Return whether a qcow2 header's text *backing* names this image.

        Where libvirt writes the name of a network image itself (after a commit), it spells it its own way,
        and leaves out for whom the image opens.
        """
        if backing == self.backing_text():
            return True
        if self.kind.is_local or not backing.startswith("json:"):
            return False
        try:
            named = json.loads(backing.removeprefix("json:"))
        except ValueError:
            return False
        wanted = _image_named(self._protocol())
        return wanted in (_image_named(named), _image_named(named.get("file")))

    def identity(self) -> FileIdentity | None:
        """Return the identity of the file or device; None for network images. Raises OSError."""
        return file_identity(self.path) if self.kind.is_local else None

    def text(self) -> str:
        """Return the image for a person."""
        return self.backing_text()

    def _protocol(self) -> dict[str, Any]:
        if self.kind is ImageKind.FILE:
            return {"driver": "file", "filename": self.path}
        if self.kind is ImageKind.BLOCK:
            return {"driver": "host_device", "filename": self.path}
        options: dict[str, Any] = json.loads(self.protocol_json)
        return options


def file_place(path: str, driver: str) -> ImagePlace:
    """Return the place of an image in a file; *path* must be absolute."""
    return ImagePlace(ImageKind.FILE, driver, path=_absolute(path))


def block_place(path: str, driver: str) -> ImagePlace:
    """Return the place of an image on a block device; *path* must be absolute."""
    return ImagePlace(ImageKind.BLOCK, driver, path=_absolute(path))


def overlay_place(path: str, base: ImagePlace) -> ImagePlace:
    """Return the place of the qcow2 overlay at *path*, which stands on *base*.

    A base that opens only for a user is named outright: libvirt leaves the user out of an overlay's header.
    """
    return replace(file_place(path, "qcow2"), beneath=base if base.asks_who else None)


def local_place(path: str, driver: str) -> ImagePlace:
    """Return the place of the image at *path*, file or block device, by looking. Raises OSError."""
    is_device = stat.S_ISBLK(os.stat(path).st_mode)
    return block_place(path, driver) if is_device else file_place(path, driver)


def nbd_place(
    driver: str, *, socket: str = "", host: str = "", port: int = 10809, export: str = ""
) -> ImagePlace:
    """Return the place of an NBD export, by unix *socket* or by TCP *host* and *port*."""
    server = {"type": "unix", "path": socket} if socket else {
        "type": "inet", "host": host, "port": str(port)}
    return protocol_place(driver, {"driver": "nbd", "server": server, "export": export})


def rbd_place(  # noqa: PLR0913 -- Ceph needs this many words to name an image
    driver: str, *, pool: str, image: str, namespace: str = "", snapshot: str = "", conf: str = "",
    user: str = "", hosts: tuple[tuple[str, int], ...] = (),
) -> ImagePlace:
    """Return the place of a Ceph RBD image. *user* is the Ceph ID without ``client.``."""
    given = {"pool": pool, "image": image, "namespace": namespace, "snapshot": snapshot, "conf": conf,
             "user": user}
    options: dict[str, Any] = {"driver": "rbd"} | {key: value for key, value in given.items() if value}
    if hosts:
        options["server"] = [{"host": host, "port": str(port)} for host, port in hosts]
    return protocol_place(driver, options)


def protocol_place(driver: str, options: dict[str, Any]) -> ImagePlace:
    """Return the place of an image behind any protocol layer, given in blockdev words."""
    kinds = {"file": ImageKind.FILE, "host_device": ImageKind.BLOCK, "nbd": ImageKind.NBD,
             "rbd": ImageKind.RBD}
    kind = kinds.get(str(options.get("driver")), ImageKind.OTHER)
    if kind.is_local:
        return ImagePlace(kind, driver, path=_absolute(str(options["filename"])))
    return ImagePlace(kind, driver, protocol_json=json.dumps(options, sort_keys=True))


def _absolute(path: str) -> str:
    if not path.startswith("/"):
        raise GuestUnfit(
            f"The image path {path!r} is not absolute, so its place is not certain.",
            "virsh edit GUEST, and write the disk's source with its whole path",
        )
    return path


def _image_named(options: Any) -> dict[str, str]:
    """Return the options that say which image it is: all but the user."""
    return {key: value for key, value in _flat(options).items() if key != "user"}


def _flat(options: Any, prefix: str = "") -> dict[str, str]:
    """Return nested blockdev options as one flat mapping, so that two spellings compare."""
    if not isinstance(options, dict):
        return {prefix: str(options)}
    flat: dict[str, str] = {}
    for key, value in options.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _nbd_uri(options: dict[str, Any]) -> str:
    server = options["server"]
    export = quote(options.get("export", ""), safe="")
    if server["type"] == "unix":
        return f"nbd+unix:///{export}?socket={quote(server['path'], safe='/')}"
    return f"nbd://{_address(server)}/{export}"


def _address(server: dict[str, str]) -> str:
    host = f"[{server['host']}]" if ":" in server["host"] else server["host"]
    return f"{host}:{server['port']}"


def _rbd_name(options: dict[str, Any]) -> str:
    def escaped(text: str) -> str:
        return "".join("\\" + letter if letter in ":@=\\/" else letter for letter in text)

    middle = f"{escaped(options['namespace'])}/" if options.get("namespace") else ""
    name = f"rbd:{escaped(options['pool'])}/{middle}{escaped(options['image'])}"
    if options.get("snapshot"):
        name += "@" + escaped(options["snapshot"])
    if options.get("user"):
        name += ":id=" + escaped(options["user"])
    if options.get("server"):
        hosts = ";".join(_address(server) for server in options["server"])
        name += ":mon_host=" + escaped(hosts)
    if options.get("conf"):
        name += ":conf=" + options["conf"].replace("\\", "\\\\").replace(":", "\\:")
    return name
