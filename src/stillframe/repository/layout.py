"""The names of a repository's objects, and its parameters.

    repo.json                        what this is: version, sizes (`Parameters`)
    main/init                        only while it is made: by whom, 16 random bytes    (opened.py)
    main/keys/<id>                   key slots                                    (keyslots.py)
    main/s/<sid>                     live sessions                                (session.py)
    main/p/<sid>/<n>                 data packs                                   (pack.py, slots.py)
    main/t/<sid>/<n>                 tree packs                                   (pack.py, nodes.py)
    main/m/<host>/<vm>/<utc>-<sid>   manifests and tombstones                     (manifest.py)
    main/d/<host>/<vm>/<utc>-<sid>-<verdict>   drills                            (drills.py)
    main/g/<n>                       generations of the collector                 (generation.py)
    main/pins/<sid>                  pinned snapshots                             (pins.py)
    main/v/...                       what verifying found and what healed         (heal.py, verify.py)

`main` is the domain of trust: one key, one deduplication, one collector. All objects but a
session and what is under ``v/`` are created once and never changed.
"""

from __future__ import annotations

import enum
import re
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from urllib.parse import quote, unquote

import msgspec
from blake3 import blake3

from stillframe.errors import RepositoryDamaged, RepositoryNewer, RepositoryUnknown

DOMAIN = "main"
REPOSITORY_KEY = "repo.json"
FORMAT_NAME = "stillframe-repository"
FORMAT_VERSION = 1
SID_BYTES = 16

_UTC = "%Y%m%dT%H%M%S"
_MANIFEST = re.compile(rf"{DOMAIN}/m/([^/]+)/([^/]+)/(\d{{8}}T\d{{6}})(\.\d{{6}})?Z-([0-9a-f]{{32}})")
_PACK = re.compile(rf"{DOMAIN}/([pt])/([0-9a-f]{{32}})/(\d{{8,10}})")
_SESSION = re.compile(rf"{DOMAIN}/s/([0-9a-f]{{32}})")
_GENERATION_DIGITS = 12
_GENERATION = re.compile(rf"{DOMAIN}/g/(\d{{{_GENERATION_DIGITS}}})")
MAX_GENERATION = 10**_GENERATION_DIGITS - 1


class Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`repo.json`. Sizes are powers of two and never change in the life of a repository.

    A slot holds at most *slot_chunks* chunks, a leaf *leaf_chunks* entries, an inner node
    *inner_nodes* children; a pack is closed at about *pack_bytes*. *digest* is
    the BLAKE3 in hex of the canonical JSON in which it is empty: no key seals this object, and it
    must not rot unseen.
    """

    id: str
    created_at: str
    format: str = FORMAT_NAME
    version: int = FORMAT_VERSION
    chunk_bytes: int = 64 * 1024
    slot_chunks: int = 16
    leaf_chunks: int = 64
    inner_nodes: int = 64
    pack_bytes: int = 32 * 1024 * 1024
    digest: str = ""

    def chunks(self, size_bytes: int) -> int:
        """Return how many chunks a disk of *size_bytes* has; the last one may be partly padding."""
        return -(-size_bytes // self.chunk_bytes)

    def height(self, size_bytes: int) -> int:
        """Return the level of the root of a disk's tree; 0 when the root is a leaf."""
        height, span = 0, self.leaf_chunks
        while span < self.chunks(size_bytes):
            height, span = height + 1, span * self.inner_nodes
        return height

    def encode(self) -> bytes:
        """Return the content of `repo.json`: canonical JSON, with *digest* set."""
        bare = msgspec.structs.replace(self, digest="")
        digest = blake3(msgspec.json.encode(bare, order="sorted")).hexdigest()
        return msgspec.json.encode(msgspec.structs.replace(self, digest=digest), order="sorted")

    def problem(self) -> str:
        """Return what is impossible about these parameters, "" if nothing."""
        if self.encode() != msgspec.json.encode(self, order="sorted"):
            return "it is not what was stored"
        bounds = {
            "chunk_bytes": (4096, 4 * 1024 * 1024), "slot_chunks": (1, 128), "leaf_chunks": (4, 1024),
            "inner_nodes": (4, 1024), "pack_bytes": (64 * 1024, 1024 * 1024 * 1024),
        }
        for name, (least, most) in bounds.items():
            value = getattr(self, name)
            if not least <= value <= most or value & (value - 1):
                return f"{name} is {value}, not a power of two from {least} to {most}"
        return ""


class _Version(msgspec.Struct):
    format: str = ""
    version: int = 0


def decode_parameters(content: bytes, address: str) -> Parameters:
    """Return what `repo.json` says. Raises RepositoryUnknown, RepositoryNewer, RepositoryDamaged."""
    try:
        head = msgspec.json.decode(content, type=_Version)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RepositoryDamaged(
            f"{address}/{REPOSITORY_KEY} can't be read: {error}.",
            f"restore {REPOSITORY_KEY} from a copy of the repository",
        ) from error
    if head.format != FORMAT_NAME:
        raise RepositoryUnknown(f"{address} is not a repository of stillframe.",
                                f"ls -la {address}   # is it the right folder?")
    check_version(head.version, f"{address} is a repository")
    try:
        parameters = msgspec.json.decode(content, type=Parameters)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RepositoryDamaged(f"{address}/{REPOSITORY_KEY} is not valid: {error}.",
                                f"restore {REPOSITORY_KEY} from a copy of the repository") from error
    if problem := parameters.problem():
        raise RepositoryDamaged(f"{address}/{REPOSITORY_KEY} is not valid: {problem}.",
                                f"restore {REPOSITORY_KEY} from a copy of the repository")
    return parameters


def check_version(version: int, what: str) -> None:
    """Raise RepositoryNewer if *version* of *what* is not the one that is known here."""
    if version != FORMAT_VERSION:
        raise RepositoryNewer(
            f"{what} of format {version}; this stillframe knows format {FORMAT_VERSION}.",
            "install a newer stillframe",
        )


class PackKind(enum.Enum):
    """What a pack's slots hold."""

    DATA = "p"
    TREE = "t"


class PackName(msgspec.Struct, frozen=True, order=True, gc=False):
    """A pack's name: the session that wrote it, and its number there."""

    kind: str
    sid: bytes
    number: int

    @property
    def key(self) -> str:
        """The object's name."""
        return f"{DOMAIN}/{self.text}"

    @property
    def text(self) -> str:
        """The name as generations and reports write it: ``p/<sid>/<n>``."""
        return f"{self.kind}/{self.sid.hex()}/{self.number:08d}"


def pack_name(text: str) -> PackName:
    """Return the pack of a key or of `PackName.text`. Raises ValueError."""
    match = _PACK.fullmatch(text if text.startswith(DOMAIN) else f"{DOMAIN}/{text}")
    if match is None:
        raise ValueError(f"not a pack's name: {text!r}")
    return PackName(match[1], bytes.fromhex(match[2]), int(match[3]))


def packs_prefix(kind: PackKind) -> str:
    """Return what the keys of all packs of a kind begin with."""
    return f"{DOMAIN}/{kind.value}/"


def new_sid() -> str:
    """Return a session ID that no other session ever has."""
    return secrets.token_hex(SID_BYTES)


def session_key(sid: str) -> str:
    """Return the key of a session."""
    return f"{SESSIONS}{sid}"


def session_id(key: str) -> str:
    """Return the session ID that a session's key names. Raises ValueError."""
    match = _SESSION.fullmatch(key)
    if match is None:
        raise ValueError(f"not a session's key: {key!r}")
    return match[1]


def generation_key(number: int) -> str:
    """Return the key of a generation, which has at most the number MAX_GENERATION."""
    return f"{GENERATIONS}{number:0{_GENERATION_DIGITS}d}"


def generation_number(key: str) -> int:
    """Return the number that a generation's key names. Raises ValueError."""
    match = _GENERATION.fullmatch(key)
    if match is None:
        raise ValueError(f"not a generation's key: {key!r}")
    return int(match[1])


SESSIONS = f"{DOMAIN}/s/"
GENERATIONS = f"{DOMAIN}/g/"
MANIFESTS = f"{DOMAIN}/m/"
PINS = f"{DOMAIN}/pins/"
DRILLS = f"{DOMAIN}/d/"
KEY_SLOTS = f"{DOMAIN}/keys/"
INIT_CLAIM = f"{DOMAIN}/init"
BAD = f"{DOMAIN}/v/bad/"
HEALED = f"{DOMAIN}/v/heal/"
VERIFIED = f"{DOMAIN}/v/verified"


@dataclass(frozen=True, slots=True, order=True)
class SnapshotName:
    """A manifest's name: enough for listing and retention without opening it.

    *utc* is the moment of the capture, to the microsecond: two small backups may fall into one second.
    """

    host: str
    guest: str
    utc: datetime
    sid: str

    @property
    def key(self) -> str:
        """The object's name."""
        fraction = f".{self.utc.microsecond:06}" if self.utc.microsecond else ""
        moment = f"{self.utc.strftime(_UTC)}{fraction}Z"
        return f"{MANIFESTS}{safe(self.host)}/{safe(self.guest)}/{moment}-{self.sid}"


def snapshot_name(key: str) -> SnapshotName:
    """Return what a manifest's key says. Raises ValueError."""
    match = _MANIFEST.fullmatch(key)
    if match is None:
        raise ValueError(f"not a manifest's key: {key!r}")
    microsecond = int(match[4][1:]) if match[4] else 0
    moment = datetime.strptime(match[3], _UTC).replace(microsecond=microsecond, tzinfo=UTC)
    return SnapshotName(unquote(match[1]), unquote(match[2]), moment, match[5])


def safe(name: str) -> str:
    """Return a host's or guest's name as a part of a key; `unquote` gives it back."""
    quoted = quote(name, safe="").replace("~", "%7E")
    return "%2E" + quoted[1:] if quoted.startswith(".") else quoted
