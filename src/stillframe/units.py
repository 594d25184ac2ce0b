"""Sizes and durations as people write and read them.

Binary sizes throughout (1 KiB = 1024 bytes). Parsing accepts what qemu-img and
virsh accept: a bare number is bytes; the suffixes K, M, G, T and their ``iB``
forms are powers of 1024.
"""

from __future__ import annotations

import re
from decimal import Decimal

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB
TIB = 1024 * GIB
DAY_S = 86400.0

_FACTORS = {"": 1, "K": KIB, "M": MIB, "G": GIB, "T": TIB}
_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:I?B)?\s*$", re.IGNORECASE)
_DURATION = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)?\s*$", re.IGNORECASE)
_SHARE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(%)?\s*$")
_SECONDS = {"ms": 0.001, "": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": DAY_S}


def parse_size_bytes(text: str) -> int:
    """Return the number of bytes that *text* ("512M", "1.5 GiB", "4096") stands for.

    Raises ValueError when it is no size.
    """
    match = _SIZE.match(text)
    if match is None:
        raise ValueError(f"not a size: {text!r} (write it like 512M or 20G)")
    return int(Decimal(match[1]) * _FACTORS[match[2].upper()])


def parse_duration_s(text: str) -> float:
    """Return the seconds that *text* ("10", "90s", "5m", "2h") stands for.

    Raises ValueError when it is no duration.
    """
    match = _DURATION.match(text)
    if match is None:
        raise ValueError(f"not a duration: {text!r} (write it like 10s or 5m)")
    return float(match[1]) * _SECONDS[(match[2] or "").lower()]


def parse_share(text: str) -> float:
    """Return the part of a whole, from 0 to 1, that *text* ("50%", "0.5") stands for.

    Raises ValueError when it is none.
    """
    match = _SHARE.match(text)
    share = float(match[1]) / (100 if match[2] else 1) if match else -1.0
    if not 0 <= share <= 1:
        raise ValueError(f"not a share: {text!r} (write it like 50%)")
    return share


def size_text(size_bytes: float) -> str:
    """Return *size_bytes* for a person: at most one decimal, binary unit."""
    for unit, factor in (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        # The unit is chosen after rounding: 1023.96 KiB would else be shown as 1024.0 KiB.
        if round(abs(size_bytes) / factor, 1) >= 1 and abs(size_bytes) * 1024 / factor >= 1023.95:
            return f"{size_bytes / factor:.1f} {unit}"
    return f"{int(size_bytes)} B"


def duration_text(seconds: float) -> str:
    """Return *seconds* for a person: "85 ms", "3.2 s", "4 min 05 s", "2 h 10 min"."""
    if round(seconds * 1000) < 1000:
        return f"{seconds * 1000:.0f} ms"
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
