"""How long a server may take for a call before it counts as hanging."""

from __future__ import annotations

CALL_TIMEOUT_S = 120.0
#: Half of a line of 2 Mbit/s, since two packs share it. A slower line would leave a run no time to try again
#: before it is given up as one whose destination hangs.
_LEAST_BYTES_PER_S = 125_000


def call_timeout_s(size_bytes: int) -> float:
    """Return how long a call may take that moves *size_bytes*."""
    return max(CALL_TIMEOUT_S, size_bytes / _LEAST_BYTES_PER_S)
