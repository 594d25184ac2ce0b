"""A guest's screen as a PNG. libvirt gives it as a portable pixmap, which few programs show."""

from __future__ import annotations

import re
import struct
import zlib

_PIXMAP = re.compile(rb"P6\s+(\d{1,5})\s+(\d{1,5})\s+255\s", re.DOTALL)
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_TRUE_COLOUR = 2


def as_png(kind: str, picture: bytes) -> bytes:
    """Return a picture of that MIME type as a PNG. Raises ValueError for what is no picture."""
    if kind == "image/png":
        return picture
    head = _PIXMAP.match(picture)
    if head is None:
        raise ValueError(f"not a picture that is known: {kind}")
    width, height = int(head[1]), int(head[2])
    pixels, row = picture[head.end():], width * 3
    if not row or len(pixels) != row * height:
        raise ValueError("the picture is not whole")
    # Each row begins with its filter: none.
    rows = b"".join(b"\0" + pixels[at : at + row] for at in range(0, len(pixels), row))
    about = struct.pack(">IIBBBBB", width, height, 8, _TRUE_COLOUR, 0, 0, 0)
    return _PNG_MAGIC + _part(b"IHDR", about) + _part(b"IDAT", zlib.compress(rows)) + _part(b"IEND", b"")


def _part(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
