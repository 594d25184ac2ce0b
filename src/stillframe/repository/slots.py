"""What is inside a slot: up to 16 chunks, or one node of a tree.

    data slot   u8 codec ‖ u8 count ‖ count x chunk ID(32) ‖ body: the chunks, one behind the other
    tree slot   u8 codec ‖ body: one node (nodes.py)

Codec 0: the body as it is; 1: as one zstd frame. All of it is sealed (crypto.py), the IDs too, so
a chunk cannot be taken for another.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import zstandard

from stillframe.repository.crypto import ID_BYTES, TAG_BYTES, Buffer, DomainKey, packed, unpacked
from stillframe.repository.layout import PackName, Parameters

_NODE_LIMIT_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Chunks:
    """The chunks of one opened slot, in their order."""

    ids: tuple[bytes, ...]
    body: memoryview
    chunk_bytes: int

    def chunk(self, position: int) -> memoryview:
        """Return the chunk at *position*."""
        return self.body[position * self.chunk_bytes : (position + 1) * self.chunk_bytes]


class SlotCodec:
    """Seals and opens slots. For several threads: each has compressors of its own."""

    def __init__(self, key: DomainKey, parameters: Parameters, level: int = 1) -> None:
        self.key = key
        self._chunk_bytes = parameters.chunk_bytes
        self._most = parameters.slot_chunks
        self._level = level
        self._own = threading.local()

    def seal_chunks(self, birth: PackName, slot: int, ids: Sequence[bytes], body: Buffer) -> bytes:
        """Return the sealed slot of chunks with these *ids*; *body* is the chunks back to back."""
        return self.key.seal_slot(birth, slot, self.chunks_content(ids, body))

    def chunks_content(self, ids: Sequence[bytes], body: Buffer) -> bytes:
        """Return what `seal_chunks` seals: all of the work but the sealing, and for any slot."""
        codec, stored = packed(body, self._compressor())
        return b"".join((bytes((codec, len(ids))), *ids, stored))

    def open_chunks(self, birth: PackName, slot: int, sealed: Buffer) -> Chunks:
        """Return the chunks of a sealed slot. Raises ValueError if it is not what was stored."""
        size = len(sealed) - TAG_BYTES
        scratch = self._scratch()
        if not 2 <= size <= len(scratch):
            raise ValueError(f"slot {slot} of {birth.text} does not hold what it says: no slot has that size")
        content = memoryview(scratch)[:size]
        self.key.open_slot_into(birth, slot, sealed, content)
        codec, count = content[0], content[1]
        begin = 2 + count * ID_BYTES
        # Either way it is a copy: the next slot that this thread opens comes into the same memory.
        body = memoryview(unpacked(codec, content[begin:], self._most * self._chunk_bytes,
                                   self._decompressor()))
        if not 1 <= count <= self._most or len(body) != count * self._chunk_bytes:
            raise ValueError(f"slot {slot} of {birth.text} does not hold what it says")
        ids = tuple(bytes(content[at : at + ID_BYTES]) for at in range(2, begin, ID_BYTES))
        return Chunks(ids, body, self._chunk_bytes)

    def seal_node(self, birth: PackName, slot: int, node: bytes) -> bytes:
        """Return the sealed slot of a node."""
        return self.key.seal_slot(birth, slot, self.node_content(node))

    def node_content(self, node: bytes) -> bytes:
        """Return what `seal_node` seals, for any slot."""
        codec, stored = packed(node, self._compressor())
        return bytes((codec,)) + bytes(stored)

    def open_node(self, birth: PackName, slot: int, sealed: Buffer) -> bytes:
        """Return the node of a sealed slot. Raises ValueError if it is not what was stored."""
        content = self.key.open_slot(birth, slot, sealed)
        return unpacked(content[0], memoryview(content)[1:], _NODE_LIMIT_BYTES, self._decompressor())

    def _scratch(self) -> bytearray:
        if not hasattr(self._own, "scratch"):
            self._own.scratch = bytearray(2 + self._most * (ID_BYTES + self._chunk_bytes))
        scratch: bytearray = self._own.scratch
        return scratch

    def _compressor(self) -> zstandard.ZstdCompressor:
        if not hasattr(self._own, "compressor"):
            self._own.compressor = zstandard.ZstdCompressor(level=self._level)
        compressor: zstandard.ZstdCompressor = self._own.compressor
        return compressor

    def _decompressor(self) -> zstandard.ZstdDecompressor:
        if not hasattr(self._own, "decompressor"):
            self._own.decompressor = zstandard.ZstdDecompressor()
        decompressor: zstandard.ZstdDecompressor = self._own.decompressor
        return decompressor
