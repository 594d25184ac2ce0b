"""Key slots: the domain key, wrapped by secrets that people keep.

    main/keys/<id>    canonical JSON: version, id, kind, label, created_at, kdf, wrapped, digest

`wrapped` is AES-256-GCM of the 32 bytes of the domain key under argon2id(secret), nonce 0 (each slot
has a salt of its own, therefore a key of its own), AAD = the canonical JSON of all other fields but the
digest. `digest` is BLAKE3 of the slot without it: so a slot whose secret is not at hand can be checked, too.
Any slot opens the repository. The secret is a passphrase, the content of a key file, or a recovery key on
paper.
"""

from __future__ import annotations

import base64
import enum
import secrets
from dataclasses import dataclass, field

import msgspec
from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from stillframe.errors import KeyWrong, RepositoryDamaged
from stillframe.repository.crypto import KEY_BYTES, DomainKey
from stillframe.repository.layout import FORMAT_VERSION, KEY_SLOTS, check_version

_NO_NONCE = bytes(12)
_SALT_BYTES = 16
_ID_BYTES = 4
_RECOVERY_GROUP = 4
# Whoever can write to the storage chooses these numbers: a slot must not take all memory.
_MEMORY_LIMIT_KIB = 4 * 1024 * 1024
_ITERATIONS_LIMIT = 1000
_LANES_LIMIT = 64


class SlotKind(enum.Enum):
    """What kind of secret opens a slot."""

    PASSPHRASE = "passphrase"  # noqa: S105 -- the word itself
    KEY_FILE = "key-file"
    RECOVERY = "recovery"


class Kdf(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Cost of argon2id, and the salt in hex. RFC 9106's second choice, 64 MiB, unless set."""

    salt: str
    name: str = "argon2id"
    memory_kib: int = 64 * 1024
    iterations: int = 3
    lanes: int = 4


class KeySlot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One wrapped key."""

    id: str
    kind: SlotKind
    label: str
    created_at: str
    kdf: Kdf
    wrapped: str = ""
    digest: str | msgspec.UnsetType = msgspec.UNSET  # the first slots had none
    version: int = FORMAT_VERSION

    @property
    def key(self) -> str:
        """The object's name."""
        return KEY_SLOTS + self.id

    def encode(self) -> bytes:
        """Return the slot as an object."""
        return msgspec.json.encode(self, order="sorted")

    def right_digest(self) -> str:
        """Return the digest that the slot should have."""
        return blake3(msgspec.structs.replace(self, digest=msgspec.UNSET).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class DamagedSlot:
    """An object in the place of a key slot that can't be read; *why* is for people."""

    key: str
    content: bytes = field(repr=False)
    why: str

    @property
    def id(self) -> str:
        """What it is called: by its object."""
        return self.key.removeprefix(KEY_SLOTS)

    def encode(self) -> bytes:
        """Return the object as it is."""
        return self.content


class _Version(msgspec.Struct):
    version: int = 0


def wrap(
    domain_key: DomainKey, secret: bytes, kind: SlotKind, label: str, created_at: str,
    costs: Kdf | None = None,
) -> KeySlot:
    """Return a new slot that *secret* opens. *costs* sets other costs than the usual ones, but no salt."""
    salt = secrets.token_hex(_SALT_BYTES)
    kdf = msgspec.structs.replace(costs, salt=salt) if costs else Kdf(salt)
    slot = KeySlot(secrets.token_hex(_ID_BYTES), kind, label, created_at, kdf)
    sealed = AESGCM(_derive(secret, kdf)).encrypt(_NO_NONCE, domain_key.secret, slot.encode())
    slot = msgspec.structs.replace(slot, wrapped=base64.b64encode(sealed).decode())
    return msgspec.structs.replace(slot, digest=slot.right_digest())


def unwrap(slot: KeySlot, secret: bytes) -> DomainKey:
    """Return the domain key. Raises KeyWrong, RepositoryDamaged."""
    bare = msgspec.structs.replace(slot, wrapped="", digest=msgspec.UNSET)
    try:
        sealed = base64.b64decode(slot.wrapped, validate=True)
        return DomainKey(AESGCM(_derive(secret, slot.kdf)).decrypt(_NO_NONCE, sealed, bare.encode()))
    except InvalidTag as error:
        raise KeyWrong(f"The secret does not open key slot {slot.id}.",
                       "stillframe key list --repo REPO   # names the slots there are") from error
    except ValueError as error:
        raise _damaged(slot.key, str(error)) from error


def decode_slot(key: str, content: bytes) -> KeySlot:
    """Return the slot of an object. Raises RepositoryDamaged, RepositoryNewer."""
    try:
        check_version(msgspec.json.decode(content, type=_Version).version, f"{key} is a key slot")
        slot = msgspec.json.decode(content, type=KeySlot)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _damaged(key, str(error)) from error
    if slot.digest is not msgspec.UNSET and slot.digest != slot.right_digest():
        raise _damaged(key, "it is not what was stored")
    return slot


def new_recovery_key() -> str:
    """Return a new recovery key for people to print: 52 letters and digits in groups of four."""
    text = base64.b32encode(secrets.token_bytes(KEY_BYTES)).decode().rstrip("=")
    return "-".join(text[at : at + _RECOVERY_GROUP] for at in range(0, len(text), _RECOVERY_GROUP))


def recovery_secret(text: str) -> bytes:
    """Return the secret of a recovery key as a person typed it.

    Case, spaces and dashes don't matter, nor do 0, 1 and 8 for O, I and B: base 32 has no such digits.
    """
    letters = text.upper().translate(str.maketrans("018", "OIB"))
    return "".join(letter for letter in letters if letter.isascii() and letter.isalnum()).encode()


def _derive(secret: bytes, kdf: Kdf) -> bytes:
    if kdf.name != "argon2id" or not (
        0 < kdf.memory_kib <= _MEMORY_LIMIT_KIB and 0 < kdf.iterations <= _ITERATIONS_LIMIT
        and 0 < kdf.lanes <= _LANES_LIMIT
    ):
        raise ValueError("its costs are out of bounds")
    return Argon2id(salt=bytes.fromhex(kdf.salt), length=KEY_BYTES, iterations=kdf.iterations,
                    lanes=kdf.lanes, memory_cost=kdf.memory_kib).derive(secret)


def _damaged(key: str, why: str) -> RepositoryDamaged:
    return RepositoryDamaged(f"The key slot {key} can't be read: {why}.",
                             "stillframe key list --repo REPO   # any other slot opens the repository too")
