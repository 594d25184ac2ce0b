"""When each pack was verified last, and which are due: those verified least recently.

    main/v/verified   zstd frame of JSON: version, packs: {"p/<sid>/<n>": [stored, full]}

in microseconds since 1970, by level (verify.py); 0 is never.

Losing it costs nothing but another verification.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from fractions import Fraction

import msgspec
import zstandard

from stillframe.errors import ObjectMissing, ObjectTruncated
from stillframe.repository.layout import FORMAT_VERSION, VERIFIED, PackName, pack_name
from stillframe.storage.model import Storage
from stillframe.units import GIB

_LIMIT_BYTES = 1 << 30
_SUBSET = re.compile(r"(\d+)/(\d+)|(\d+(?:\.\d+)?)%|(\d+(?:\.\d+)?)G")


@dataclass(frozen=True, slots=True)
class Subset:
    """How much to verify: a *fraction* of what there is, or about *size_bytes*; all if neither is set."""

    fraction: Fraction | None = None
    size_bytes: int | None = None

    @staticmethod
    def parse(text: str) -> Subset:
        """Return the subset that ``n/t``, ``x%`` or ``nG`` (GiB) means. Raises ValueError."""
        match = _SUBSET.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"not a subset: {text!r} (1/30, 5% or 20G)")
        if match[4]:
            return Subset(size_bytes=int(Fraction(match[4]) * GIB))
        if match[1] and not int(match[2]):
            raise ValueError(f"not a subset: {text!r} (1/30, 5% or 20G)")
        fraction = Fraction(int(match[1]), int(match[2])) if match[1] else Fraction(match[3]) / 100
        if not 0 < fraction <= 1:
            raise ValueError(f"not a part of the whole: {text!r}")
        return Subset(fraction)

    def target_bytes(self, total_bytes: int) -> int:
        """Return how many bytes of so many are meant."""
        if self.fraction is not None:
            return -int(-total_bytes * self.fraction // 1)
        return total_bytes if self.size_bytes is None else self.size_bytes


class Verified:
    """When packs were verified: the microsecond at which stored bytes, and content, were found good."""

    def __init__(self, packs: Mapping[PackName, tuple[int, int]] | None = None) -> None:
        self._packs = dict(packs or {})

    def note(self, packs: Iterable[PackName], at: datetime, *, full: bool) -> None:
        """Note that *packs* were verified; their content as well if *full*."""
        # Parts that are verified within one second must not begin with the same pack each time.
        moment = round(at.timestamp() * 1_000_000)
        for pack in packs:
            self._packs[pack] = (moment, moment if full else self.when(pack)[1])

    def when(self, pack: PackName) -> tuple[int, int]:
        """Return when the pack's stored bytes, and its content, were verified; 0 is never."""
        return self._packs.get(pack, (0, 0))

    def due(self, packs: Mapping[PackName, int], subset: Subset, *, full: bool) -> list[PackName]:
        """Return those of *packs* (with sizes) to verify now: least recently verified first, at least one."""
        target = subset.target_bytes(sum(packs.values()))
        chosen: list[PackName] = []
        for pack in sorted(packs, key=lambda each: (self.when(each)[int(full)], each)):
            if chosen and target <= 0:
                break
            chosen.append(pack)
            target -= packs[pack]
        return chosen

    def forget_all_but(self, packs: Iterable[PackName]) -> None:
        """Drop what is known of packs that are gone."""
        self._packs = {pack: self._packs[pack] for pack in packs if pack in self._packs}

    def encode(self) -> bytes:
        """Return it as an object."""
        body = _Body(packs={pack.text: when for pack, when in self._packs.items()})
        return zstandard.ZstdCompressor().compress(msgspec.json.encode(body, order="sorted"))


class _Body(msgspec.Struct, frozen=True, kw_only=True):
    packs: dict[str, tuple[int, int]]
    version: int = FORMAT_VERSION


def read_verified(storage: Storage) -> Verified:
    """Return what is known; nothing if there is no such object, or it can't be read."""
    try:
        plain = zstandard.ZstdDecompressor().decompress(storage.get(VERIFIED), max_output_size=_LIMIT_BYTES)
        body = msgspec.json.decode(plain, type=_Body)
        if body.version != FORMAT_VERSION:
            return Verified()
        return Verified({pack_name(text): when for text, when in body.packs.items()})
    except (ObjectMissing, ObjectTruncated, ValueError, zstandard.ZstdError):
        return Verified()


def write_verified(storage: Storage, verified: Verified) -> None:
    """Replace what is known. Of two at the same time, one is lost. Raises StorageError."""
    storage.replace(VERIFIED, verified.encode())
