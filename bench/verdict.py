"""The medians of `bench.repository` as tables, and what they are against the targets of its issue."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from bench.peers import Sample
from stillframe.units import MIB, size_text

Found = Mapping[str, Mapping[str, Sequence[Sample]]]

_OURS, _BOUND, _CONVERT = "stillframe", "bound", "qemu-img convert"
_MEMORY_BYTES = 300 * MIB


def show(found: Found) -> None:
    """Print what was found with one disk."""
    data = found["first"][_OURS][0].facts["data"]
    for done in ("first", "restore", "second"):
        print(f"\n{done}\n  {'':20}{'seconds':>9}{'MB/s':>7}{'CPU s':>8}{'stored':>12}{'peak':>12}   each")
        for who, samples in found[done].items():
            stored = size_text(samples[0].facts["stored"]) if "stored" in samples[0].facts else ""
            each = " ".join(f"{sample.seconds:.2f}" for sample in samples)
            print(f"  {who:20}{median(samples):9.2f}{data / median(samples) / 1e6:7.0f}"
                  f"{statistics.median(sample.cpu_s for sample in samples):8.1f}{stored:>12}"
                  f"{size_text(max(sample.rss_bytes for sample in samples)):>12}   {each}")
    bound = statistics.median(sample.facts["sample"] / sample.seconds for sample in found["bound"][_BOUND])
    print(f"\nThe fused bound: {bound / 1e6:.0f} MB/s; {size_text(data)} of data")
    _against_peers(found)
    target("first backup, of the fused bound", data / median(found["first"][_OURS]) / bound, 0.6)
    target("restore, of the speed of qemu-img convert",
           median(found["restore"][_CONVERT]) / median(found["restore"][_OURS]), 0.6)
    second = found["second"][_OURS][0].facts
    target("increment, of the changed bytes", second["stored"] / second["changed"], 1.3, most=True)
    samples = [sample for done in ("first", "restore", "second") for sample in found[done][_OURS]]
    _memory("peak memory, this disk", samples)


def show_large(samples: Sequence[Sample]) -> None:
    """Print what a sparse disk of 1 TiB took: first and second backup, restore."""
    print("  a sparse disk of 1 TiB: first, second, restore: "
          + ", ".join(f"{sample.seconds:.1f} s {size_text(sample.rss_bytes)}" for sample in samples))
    _memory("peak memory, sparse disk of 1 TiB", samples)


def show_listing(seconds: float) -> None:
    """Print how long a list took."""
    target("stillframe list of 10,000 snapshots, s", seconds, 1.0, most=True)


def median(samples: Sequence[Sample]) -> float:
    """Return the median of the seconds."""
    return statistics.median(sample.seconds for sample in samples)


def target(what: str, value: float, wanted: float, *, most: bool = False) -> None:
    """Print one target, and whether it is met."""
    met = value <= wanted if most else value >= wanted
    print(f"  {what:52}{value:8.2f}  {'at most' if most else 'at least'} {wanted:<6g}"
          f"{'met' if met else 'MISSED'}", flush=True)


def _against_peers(found: Found) -> None:
    for done, wanted in (("first", 2.5), ("second", 4.0), ("restore", 1.5)):
        taken = {who: median(samples) for who, samples in found[done].items() if who != _CONVERT}
        own = taken.pop(_OURS)
        if taken:
            fastest = min(taken, key=lambda who: taken[who])
            target(f"{done}, times as fast as {fastest}", taken[fastest] / own, wanted)
    if "restic" in found["first"]:
        stored = {who: found["first"][who][0].facts["stored"] for who in (_OURS, "restic")}
        share = stored[_OURS] / stored["restic"]
        target("repository after the first backup, of restic's", share, 1.1, most=True)


def _memory(what: str, samples: Sequence[Sample]) -> None:
    target(f"{what}, MiB", max(sample.rss_bytes for sample in samples) / MIB, _MEMORY_BYTES / MIB, most=True)
