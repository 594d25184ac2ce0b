"""Sizes and durations, read and written."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillframe.units import GIB, KIB, MIB, TIB, duration_text, parse_duration_s, parse_size_bytes, size_text


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0), ("4096", 4096), ("4096B", 4096), ("1k", KIB), ("512M", 512 * MIB), (" 20 G ", 20 * GIB),
        ("1.5 GiB", 3 * GIB // 2), ("2tib", 2 * TIB), ("3MB", 3 * MIB),
    ],
)
def test_a_size_is_read(text: str, size_bytes: int) -> None:
    assert parse_size_bytes(text) == size_bytes


@pytest.mark.parametrize("text", ["", "M", "-1", "1P", "1 2", "1,5G", "nan", "1e3", "0x10"])
def test_what_is_no_size_is_refused_and_shown(text: str) -> None:
    with pytest.raises(ValueError, match="not a size") as caught:
        parse_size_bytes(text)
    assert repr(text) in str(caught.value)


@given(st.integers(0, 2**53), st.sampled_from(["", "B"]))
def test_a_number_of_bytes_is_read_exactly(size_bytes: int, suffix: str) -> None:
    assert parse_size_bytes(f"{size_bytes}{suffix}") == size_bytes


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("10", 10), ("250ms", 0.25), ("90s", 90), ("5m", 300), ("2h", 7200), ("1.5 d", 129600), (" 3 S ", 3)],
)
def test_a_duration_is_read(text: str, seconds: float) -> None:
    assert parse_duration_s(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "s", "-1s", "5 min", "1h30m", "inf"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a duration"):
        parse_duration_s(text)


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"), (1023, "1023 B"), (KIB, "1.0 KiB"), (85 * MIB, "85.0 MiB"), (3 * GIB // 2, "1.5 GiB"),
        (2 * TIB, "2.0 TiB"), (-2 * KIB, "-2.0 KiB"),
    ],
)
def test_a_size_is_written(size_bytes: float, text: str) -> None:
    assert size_text(size_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 ms"), (0.085, "85 ms"), (3.2, "3.2 s"), (60, "1 min 00 s"), (245, "4 min 05 s"),
        (3600, "1 h 00 min"), (7800, "2 h 10 min"),
    ],
)
def test_a_duration_is_written(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


@given(st.floats(0, 1e7))
def test_no_part_of_a_duration_reaches_sixty(seconds: float) -> None:
    text = duration_text(seconds)
    if " s" in text and "min" in text:
        assert int(text.split()[2]) < 60
    if "min" in text and "h" in text:
        assert int(text.split()[2]) < 60


@pytest.mark.parametrize(
    ("text", "expected"),
    [(duration_text(59.97), "1 min 00 s"), (duration_text(0.9997), "1.0 s"), (size_text(MIB - 1), "1.0 MiB")],
)
def test_rounding_up_reaches_the_next_unit(text: str, expected: str) -> None:
    assert text == expected
