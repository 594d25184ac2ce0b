"""A reader of repositories, written from docs/FORMAT.md alone: it imports nothing of stillframe.

    python tests/format/reader.py FOLDER PASSPHRASE            list the snapshots
    python tests/format/reader.py FOLDER PASSPHRASE SID DISK   write the disk to standard output

Whoever has a repository, this page of code and the passphrase has the data.
"""

from __future__ import annotations

import base64
import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import zstandard
from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

NO_NONCE = bytes(12)
NOTHING = 0xFFFF


class Damaged(Exception):
    """Something is not what was stored."""


class Place(NamedTuple):
    """A slot: the pack and number of its birth, and where it is in that pack."""

    kind: str
    sid: bytes
    number: int
    slot: int
    offset: int
    stored: int


class Repository:
    """A repository in a folder, opened with a passphrase."""

    def __init__(self, folder: Path, passphrase: str) -> None:
        self.folder = folder
        self.last: tuple[Place, list[tuple[bytes, bytes]]] | None = None
        self.sizes = json.loads((folder / "repo.json").read_bytes())
        if self.sizes["format"] != "stillframe-repository" or self.sizes["version"] != 1:
            raise Damaged("not a repository of format 1")
        self.domain_key = self._unwrap(passphrase.encode())
        self.moved = self._moved()
        self.healed = dict(self._healed())

    # --- keys and sealing ---

    def _unwrap(self, secret: bytes) -> bytes:
        for path in (self.folder / "main/keys").iterdir():
            slot = json.loads(path.read_bytes())
            kdf, wrapped = slot["kdf"], base64.b64decode(slot["wrapped"])
            key = Argon2id(salt=bytes.fromhex(kdf["salt"]), length=32, iterations=kdf["iterations"],
                           lanes=kdf["lanes"], memory_cost=kdf["memory_kib"]).derive(secret)
            slot.pop("digest", None)
            bare = json.dumps({**slot, "wrapped": ""}, sort_keys=True, separators=(",", ":"),
                              ensure_ascii=False).encode()
            try:
                return AESGCM(key).decrypt(NO_NONCE, wrapped, bare)
            except InvalidTag:
                continue
        raise Damaged("the passphrase opens no key slot")

    def _derived(self, info: bytes, salt: bytes | None = None) -> bytes:
        return HKDF(algorithm=SHA256(), length=32, salt=salt, info=info).derive(self.domain_key)

    def opened(self, name: str) -> bytes:
        """Return the content of a sealed object."""
        sealed = (self.folder / name).read_bytes()
        head = sealed[:22]
        if head[:5] != b"SFOB\x01":
            raise Damaged(f"{name} is no sealed object of version 1")
        key = self._derived(b"stillframe object", salt=head[6:])
        return unpacked(head[5], AESGCM(key).decrypt(NO_NONCE, sealed[22:], head + name.encode()))

    # --- slots ---

    def _moved(self) -> dict[tuple[str, bytes, int], list[tuple[str, int]]]:
        numbers = sorted((self.folder / "main/g").glob("[0-9]*"))
        if not numbers:
            return {}
        body = json.loads(self.opened(f"main/g/{numbers[-1].name}"))
        if body["version"] != 1:
            raise Damaged("a generation of another version")
        found = {}
        for birth, homes in body["moved"].items():
            kind, sid, number = birth.split("/")
            found[kind, bytes.fromhex(sid), int(number)] = [(home, int(slots, 16)) for home, slots in homes]
        return found

    def _stored(self, place: Place) -> bytes:
        """Return the bytes of a slot, from where it is now."""
        for home, slots in self.moved.get(place[:3], ()):
            if slots >> place.slot & 1:
                pack = (self.folder / "main" / home).read_bytes()
                for sid, number, slot, offset, stored, _plain, digest in footer(pack):
                    if (sid, number, slot) == (place.sid, place.number, place.slot):
                        content = pack[offset : offset + stored]
                        if blake3(content).digest() != digest:
                            raise Damaged("a stored slot was changed")
                        return content
        with (self.folder / "main" / place.kind / place.sid.hex() / f"{place.number:08d}").open("rb") as file:
            file.seek(place.offset)
            return file.read(place.stored)

    def slot(self, place: Place) -> bytes:
        """Return what is in a slot."""
        kind = place.kind.encode()
        key = self._derived(b"stillframe pack" + kind + place.sid + struct.pack("<I", place.number))
        aad = b"SFSL" + b"main" + kind + place.sid + struct.pack("<II", place.number, place.slot)
        nonce = struct.pack("<IQ", 0, place.slot)
        try:
            return AESGCM(key).decrypt(nonce, self._stored(place), aad)
        except InvalidTag as error:
            raise Damaged(f"slot {place} can't be opened") from error

    def _healed(self) -> Iterator[tuple[bytes, tuple[Place, int]]]:
        """Yield (chunk ID, (slot, position)) of chunks that were damaged and stored again."""
        for path in (self.folder / "main/v/heal").glob("*"):
            body = json.loads(self.opened(f"main/v/heal/{path.name}"))
            if body["version"] != 1:
                raise Damaged("a heal of another version")
            for chunk_id, pack, slot, offset, stored, position in body["heals"]:
                kind, sid, number = pack.split("/")
                place = Place(kind, bytes.fromhex(sid), int(number), slot, offset, stored)
                yield base64.b64decode(chunk_id), (place, position)

    # --- trees ---

    def _node(self, place: Place) -> bytes:
        content = self.slot(place)
        return unpacked(content[0], content[1:])

    def _leaves(self, place: Place | None, level: int, index: int) -> Iterator[tuple[int, bytes]]:
        """Yield (index, leaf) of all leaves below a node."""
        if place is None:
            return
        node = self._node(place)
        if level == 0:
            yield index, node
            return
        sort, found, packs, _, count = struct.unpack_from("<BBHHH", node)
        if (sort, found, count) != (1, level, self.sizes["inner_nodes"]):
            raise Damaged("not the inner node that was expected")
        names, at = pack_list(node, packs, "t")
        for child in range(count):
            pack, slot, offset, stored = struct.unpack_from("<HIII", node, at + 14 * child)
            if pack != NOTHING:
                yield from self._leaves(Place(*names[int(pack)], slot, offset, stored), level - 1,
                                        index * count + child)

    def chunks(self, size: int, root: dict[str, Any] | None) -> Iterator[tuple[int, bytes]]:
        """Yield (index, content) of each chunk of a disk that is not zero, in order."""
        width, level = self.sizes["leaf_chunks"], 0
        span = width
        while span < -(-size // self.sizes["chunk_bytes"]):
            level, span = level + 1, span * self.sizes["inner_nodes"]
        place = None if root is None else Place("t", bytes.fromhex(root["sid"]), root["number"], root["slot"],
                                                root["offset"], root["stored"])
        for index, leaf in self._leaves(place, level, 0):
            for number, (chunk_id, at, position) in self._entries(leaf):
                try:
                    found, content = self._open_chunks(at)[position]
                except Damaged:
                    if chunk_id not in self.healed:
                        raise
                    healed, place_there = self.healed[chunk_id]
                    found, content = self._open_chunks(healed)[place_there]
                if found != chunk_id:
                    raise Damaged(f"chunk {number} is another one")
                yield index * width + number, content

    def _entries(self, leaf: bytes) -> Iterator[tuple[int, tuple[bytes, Place, int]]]:
        sort, level, packs, slots, count = struct.unpack_from("<BBHHH", leaf)
        if (sort, level, count) != (0, 0, self.sizes["leaf_chunks"]):
            raise Damaged("not the leaf that was expected")
        names, at = pack_list(leaf, packs, "p")
        places = [struct.unpack_from("<HIII", leaf, at + 14 * row) for row in range(slots)]
        at += 14 * slots
        which = struct.unpack_from(f"<{count}H", leaf, at)
        positions = leaf[at + 2 * count : at + 3 * count]
        at += 3 * count
        for number in range(count):
            if which[number] != NOTHING:
                pack, slot, offset, stored = places[which[number]]
                place = Place(*names[int(pack)], slot, offset, stored)
                yield number, (leaf[at : at + 32], place, positions[number])
                at += 32

    def _open_chunks(self, place: Place) -> list[tuple[bytes, bytes]]:
        """Return (ID, content) of each chunk of a slot; IDs are computed anew and compared."""
        if self.last is not None and self.last[0] == place:
            return self.last[1]
        content = self.slot(place)
        codec, count, size = content[0], content[1], self.sizes["chunk_bytes"]
        body = unpacked(codec, content[2 + 32 * count :])
        key = self._derived(b"stillframe chunk")
        found = []
        for number in range(count):
            chunk_id = content[2 + 32 * number : 34 + 32 * number]
            chunk = body[number * size : (number + 1) * size]
            if blake3(chunk, key=key).digest() != chunk_id:
                raise Damaged("a chunk is not what its ID says")
            found.append((chunk_id, chunk))
        self.last = place, found
        return found

    # --- snapshots ---

    def manifests(self) -> Iterator[dict[str, Any]]:
        """Yield the manifests of all snapshots."""
        for path in sorted((self.folder / "main/m").glob("*/*/*")):
            if path.stat().st_size != 64:
                manifest = json.loads(self.opened(str(path.relative_to(self.folder))))
                if manifest["version"] != 1:
                    raise Damaged("a manifest of another version")
                yield manifest

    def read_disk(self, sid: str, target: str) -> bytes:
        """Return a whole disk of a snapshot."""
        manifest = next(each for each in self.manifests() if each["sid"] == sid)
        disk = next(each for each in manifest["disks"] if each["target"] == target)
        size = self.sizes["chunk_bytes"]
        image = bytearray(-(-disk["size_bytes"] // size) * size)
        for index, content in self.chunks(disk["size_bytes"], disk["root"]):
            image[index * size : (index + 1) * size] = content
        return bytes(image[: disk["size_bytes"]])


def unpacked(codec: int, body: bytes) -> bytes:
    """Return a body as it was before it was compressed."""
    if codec == 0:
        return body
    if codec != 1:
        raise Damaged(f"unknown codec {codec}")
    return zstandard.ZstdDecompressor().decompress(body)


def pack_list(node: bytes, count: int, kind: str) -> tuple[list[tuple[str, bytes, int]], int]:
    """Return the packs that a node lists, and where the list ends."""
    rows = (struct.unpack_from("<16sI", node, 8 + 20 * row) for row in range(count))
    return [(kind, sid, number) for sid, number in rows], 8 + 20 * count


def footer(pack: bytes) -> Iterator[tuple[bytes, int, int, int, int, int, bytes]]:
    """Yield the rows of a pack's footer, once it is seen to be whole."""
    (count,) = struct.unpack_from("<I", pack, len(pack) - 40)
    rows = pack[len(pack) - 40 - 68 * count : len(pack) - 40]
    if pack[:5] != b"SFPK\x01" or pack[-4:] != b"SFPE":
        raise Damaged("not a pack of version 1")
    if blake3(pack[:28] + rows + pack[-40:-36]).digest() != pack[-36:-4]:
        raise Damaged("a pack's footer was changed")
    yield from struct.iter_unpack("<16sIIIII32s", rows)


if __name__ == "__main__":
    repository = Repository(Path(sys.argv[1]), sys.argv[2])
    if len(sys.argv) == 5:
        sys.stdout.buffer.write(repository.read_disk(sys.argv[3], sys.argv[4]))
    else:
        for each in repository.manifests():
            print(each["sid"], each["guest"], each["captured_at"], [disk["target"] for disk in each["disks"]])
