"""How long a server may take for a call. See storage/patience.py."""

from __future__ import annotations

from stillframe.capture.watched import STALL_TIMEOUT_S
from stillframe.repository.layout import Parameters
from stillframe.repository.pipeline import UPLOADS
from stillframe.storage.patience import CALL_TIMEOUT_S, call_timeout_s

_LEAST_LINE_BYTES_PER_S = 2_000_000 / 8  # docs/USER-GUIDE.md


def test_packs_that_share_the_slowest_line_have_time_and_a_lost_one_time_for_another_try() -> None:
    parameters = Parameters("", "")
    pack_bytes = parameters.pack_bytes + 2 * parameters.slot_chunks * parameters.chunk_bytes
    assert UPLOADS * pack_bytes / _LEAST_LINE_BYTES_PER_S <= call_timeout_s(pack_bytes) < STALL_TIMEOUT_S / 2
    assert call_timeout_s(0) == CALL_TIMEOUT_S
