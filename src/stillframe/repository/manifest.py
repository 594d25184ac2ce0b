"""A snapshot's manifest: canonical JSON in a sealed object, and the tombstone that may lie in its place.

The manifest is the last object that a backup writes; creating it is the commit. Its key says host,
guest, moment and session. A tombstone (``SFTB``, JSON, filled up with spaces to exactly 64 bytes)
at that key says that a collector took the session for dead: the manifest can never come any more.
A manifest is always longer than 64 bytes, so a listing tells one from the other.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from stillframe.block.anchor import Anchor
from stillframe.errors import RepositoryDamaged
from stillframe.repository.crypto import DomainKey
from stillframe.repository.layout import FORMAT_VERSION, PackKind, PackName, check_version
from stillframe.repository.pack import SlotRef

#: What a machine's files are.
NVRAM = "nvram"
TPM = "tpm"
#: Where libvirt keeps the state of TPMs, each in a folder named by the guest's UUID.
TPM_FOLDER = Path("/var/lib/libvirt/swtpm")
TOMBSTONE_BYTES = 64
_TOMBSTONE_MAGIC = b"SFTB"


class Root(msgspec.Struct, frozen=True):
    """Where the root node of a tree is (a slot of a tree pack)."""

    sid: str
    number: int
    slot: int
    offset: int
    stored: int

    @staticmethod
    def of(place: SlotRef | None) -> Root | None:
        """Return the root at *place*; None for a tree that is all zero."""
        if place is None:
            return None
        return Root(place.pack.sid.hex(), place.pack.number, place.slot, place.offset_bytes,
                    place.stored_bytes)

    @property
    def place(self) -> SlotRef:
        """The slot."""
        return SlotRef(PackName(PackKind.TREE.value, bytes.fromhex(self.sid), self.number), self.slot,
                       self.offset, self.stored)


class Content(msgspec.Struct, frozen=True, kw_only=True):
    """Something kept as a tree of chunks. *root* is None when all of it is zero."""

    size_bytes: int
    root: Root | None

    @property
    def place(self) -> SlotRef | None:
        """The root's slot, None when all is zero."""
        return None if self.root is None else self.root.place


class DiskEntry(Content, frozen=True, kw_only=True):
    """A disk of the snapshot.

    *source* and *format* are those of the guest's image (for people, and for restoring alike);
    *method* is how it was captured, *note* why it was read whole although its changes were to be known, ""
    if there is no such reason; the numbers are bytes: read from the image, that are not zero, that
    differed from the parent, and that were stored anew for it (compressed, with what seals them).
    *read_whole_at* is the moment of the last snapshot of this chain for which all of the disk was read,
    RFC 3339, "" if that is not known.
    """

    target: str
    format: str
    source: str
    method: str
    read_bytes: int
    data_bytes: int
    changed_bytes: int
    stored_bytes: int
    note: str = ""
    read_whole_at: str = ""


class FileEntry(Content, frozen=True, kw_only=True):
    """A file that belongs to the machine, NVRAM or a part of the TPM's state, as it was *taken_at* a time."""

    role: str
    path: str
    mode: int
    uid: int
    gid: int
    taken_at: str


class Versions(msgspec.Struct, frozen=True):
    """What ran the guest."""

    libvirt: str
    qemu: str
    machine: str
    stillframe: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """One domain at one moment. Times are RFC 3339 in UTC.

    *parent* is the session ID of the snapshot whose tree was built upon, "" if none. *frozen_s* is how
    long the guest was frozen. *stored_bytes* is all that this snapshot added, trees included. *anchor* is
    what was left in the guest for the next backup to count from, None if nothing was. *generation* is the
    number of the generation that the session went by, None where nobody wrote it down. *origin* is the
    session ID of the snapshot that this one was copied from, in another repository; "" if it was not copied.
    """

    version: int = FORMAT_VERSION
    sid: str
    guest: str
    uuid: str
    host: str
    captured_at: str
    began_at: str
    ended_at: str
    consistency: str
    quiesce: str
    parent: str
    live_xml: str
    inactive_xml: str
    disks: tuple[DiskEntry, ...]
    excluded: tuple[str, ...]
    files: tuple[FileEntry, ...]
    versions: Versions
    warnings: tuple[str, ...]
    frozen_s: float
    stored_bytes: int
    tags: tuple[str, ...] = ()
    anchor: Anchor | None = None
    generation: int | None = None
    origin: str = ""


class _Version(msgspec.Struct):
    version: int = 0


def encode_manifest(manifest: Manifest, key: str, domain_key: DomainKey) -> bytes:
    """Return the manifest as the object named *key*."""
    return domain_key.seal_object(key, msgspec.json.encode(manifest, order="sorted"))


def decode_manifest(content: bytes, key: str, domain_key: DomainKey) -> Manifest:
    """Return the manifest. Raises RepositoryDamaged, RepositoryNewer."""
    plain = domain_key.open_object(key, content)
    try:
        check_version(msgspec.json.decode(plain, type=_Version).version, f"{key} is a manifest")
        return msgspec.json.decode(plain, type=Manifest)
    except msgspec.DecodeError as error:
        raise RepositoryDamaged(f"The manifest {key} is not valid: {error}.",
                                "stillframe verify --repo REPO") from error


def tombstone(sid: str) -> bytes:
    """Return the tombstone of a session."""
    return (_TOMBSTONE_MAGIC + msgspec.json.encode({"sid": sid})).ljust(TOMBSTONE_BYTES)


def is_tombstone(size_bytes: int) -> bool:
    """Return whether the object of this size at a manifest's key is a tombstone."""
    return size_bytes == TOMBSTONE_BYTES
