"""The methods of capture."""

from __future__ import annotations

import enum


class Method(enum.Enum):
    """How a disk is captured. AUTO chooses for each disk."""

    AUTO = "auto"
    OVERLAY = "overlay"
    STANDING_OVERLAY = "standing-overlay"
    BITMAP = "bitmap"
    OFFLINE = "offline"
