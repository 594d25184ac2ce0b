"""Keys derived from the domain key, and the sealing of slots and objects.

    domain key      32 random bytes, kept wrapped in key slots (keyslots.py)
    chunk ID        BLAKE3, keyed with HKDF(domain key, "stillframe chunk")
    slot            AES-256-GCM, key HKDF(domain key, "stillframe pack" ‖ kind ‖ sid ‖ u32 n), nonce u32 0 ‖
                    u64 slot, AAD "SFSL" ‖ "main" ‖ kind ‖ sid ‖ u32 n ‖ u32 slot: all of the slot's birth
    sealed object   "SFOB" ‖ u8 version ‖ u8 codec ‖ salt(16) ‖ AES-256-GCM, key HKDF(domain key, salt,
                    "stillframe object"), nonce 0, AAD = these first 22 bytes ‖ the full key name

HKDF is with SHA-256. No nonce can come twice under one key: a session ID is never used again, a
pack's number and a slot's number are counted within it, and each sealed object has a key of its own.
"""

from __future__ import annotations

import secrets
import struct
from functools import lru_cache

import zstandard
from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from stillframe.errors import RepositoryDamaged
from stillframe.repository.layout import DOMAIN, FORMAT_VERSION, PackName, check_version

KEY_BYTES = 32
ID_BYTES = 32
TAG_BYTES = 16
#: First byte of sealed content: as it is, or a zstd frame.
PLAIN, ZSTD = 0, 1

_OBJECT_MAGIC = b"SFOB"
_SALT_BYTES = 16
_OBJECT_HEAD_BYTES = len(_OBJECT_MAGIC) + 2 + _SALT_BYTES
_NO_NONCE = bytes(12)
_SLOT_AAD = struct.Struct("<4s4s1s16sII")
_OBJECT_LIMIT_BYTES = 512 * 1024 * 1024
# Each derivation takes some microseconds; a restore goes from pack to pack and back.
_KEPT_CIPHERS = 4096

Buffer = bytes | bytearray | memoryview


class DomainKey:
    """The key of a domain of trust, and all that is derived from it. For several threads."""

    def __init__(self, secret: bytes) -> None:
        if len(secret) != KEY_BYTES:
            raise ValueError("a domain key has 32 bytes")
        self.secret = secret
        self._chunk_key = self._derive(b"stillframe chunk")
        self._cipher = lru_cache(_KEPT_CIPHERS)(self._new_cipher)

    @staticmethod
    def new() -> DomainKey:
        """Return a new random key."""
        return DomainKey(secrets.token_bytes(KEY_BYTES))

    def chunk_id(self, chunk: Buffer) -> bytes:
        """Return the ID of a whole chunk: 32 bytes. The interpreter's lock is let go of meanwhile."""
        return blake3(chunk, key=self._chunk_key).digest()

    def seal_slot(self, birth: PackName, slot: int, content: Buffer) -> bytes:
        """Return *content* sealed as slot number *slot* of *birth*; once ever for each such pair."""
        return self._cipher(birth).encrypt(_nonce(slot), content, _aad(birth, slot))

    def seal_slot_into(self, birth: PackName, slot: int, content: Buffer, out: memoryview) -> None:
        """Seal like `seal_slot`, into *out*: TAG_BYTES longer than the content. No memory is taken for it."""
        self._cipher(birth).encrypt_into(_nonce(slot), content, _aad(birth, slot), out)

    def open_slot(self, birth: PackName, slot: int, sealed: Buffer) -> bytes:
        """Return what was sealed as that slot. Raises ValueError if this is not it, byte for byte."""
        try:
            return self._cipher(birth).decrypt(_nonce(slot), sealed, _aad(birth, slot))
        except InvalidTag as error:
            raise ValueError(f"slot {slot} of {birth.text} is not what was stored") from error

    def open_slot_into(self, birth: PackName, slot: int, sealed: Buffer, out: memoryview) -> None:
        """Open like `open_slot`, into *out*: TAG_BYTES shorter than what is sealed.

        `decrypt` would fill new memory with zeroes first, and hold the interpreter's lock meanwhile.
        """
        try:
            self._cipher(birth).decrypt_into(_nonce(slot), sealed, _aad(birth, slot), out)
        except InvalidTag as error:
            raise ValueError(f"slot {slot} of {birth.text} is not what was stored") from error

    def seal_object(self, key: str, content: bytes) -> bytes:
        """Return *content* sealed as the object named *key*, compressed if that makes it smaller."""
        codec, body = packed(content)
        head = _OBJECT_MAGIC + bytes((FORMAT_VERSION, codec)) + secrets.token_bytes(_SALT_BYTES)
        return head + self._object_cipher(head).encrypt(_NO_NONCE, body, head + key.encode())

    def open_object(self, key: str, sealed: bytes) -> bytes:
        """Return what was sealed as the object named *key*. Raises RepositoryDamaged, RepositoryNewer."""
        head, body = sealed[:_OBJECT_HEAD_BYTES], sealed[_OBJECT_HEAD_BYTES:]
        if len(head) < _OBJECT_HEAD_BYTES or not head.startswith(_OBJECT_MAGIC):
            raise _damaged(key)
        check_version(head[4], f"{key} is an object")
        try:
            return unpacked(head[5], self._object_cipher(head).decrypt(_NO_NONCE, body, head + key.encode()),
                            _OBJECT_LIMIT_BYTES)
        except (InvalidTag, ValueError) as error:
            raise _damaged(key) from error

    def _derive(self, info: bytes, salt: bytes | None = None) -> bytes:
        return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=salt, info=info).derive(self.secret)

    def _new_cipher(self, birth: PackName) -> AESGCM:
        info = b"stillframe pack" + birth.kind.encode() + birth.sid + struct.pack("<I", birth.number)
        return AESGCM(self._derive(info))

    def _object_cipher(self, head: bytes) -> AESGCM:
        return AESGCM(self._derive(b"stillframe object", salt=head[-_SALT_BYTES:]))


def packed(content: Buffer, compressor: zstandard.ZstdCompressor | None = None) -> tuple[int, Buffer]:
    """Return (codec, body): *content* compressed, or as it is where that is not larger."""
    body = (compressor or zstandard.ZstdCompressor(level=1)).compress(content)
    return (ZSTD, body) if len(body) < len(content) else (PLAIN, content)


def unpacked(
    codec: int, body: Buffer, limit_bytes: int, decompressor: zstandard.ZstdDecompressor | None = None
) -> bytes:
    """Return the content of `packed`. Raises ValueError: unknown codec, no frame, or over *limit_bytes*."""
    if codec == PLAIN:
        return bytes(body)
    if codec != ZSTD:
        raise ValueError(f"unknown codec {codec}")
    try:
        if not 0 <= zstandard.frame_content_size(body) <= limit_bytes:
            raise ValueError("the content is larger than it can be")
        return (decompressor or zstandard.ZstdDecompressor()).decompress(body, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error


def _nonce(slot: int) -> bytes:
    return struct.pack("<IQ", 0, slot)


def _aad(birth: PackName, slot: int) -> bytes:
    return _SLOT_AAD.pack(b"SFSL", DOMAIN.encode(), birth.kind.encode(), birth.sid, birth.number, slot)


def _damaged(key: str) -> RepositoryDamaged:
    return RepositoryDamaged(
        f"The object {key} is not what was stored, or was sealed with another key.",
        "stillframe verify --repo REPO   # names all that is hurt",
    )
