"""A destination for tests of the bitmap method: whole images, made of the last one and of what changed.

It keeps every restore point, so that each can be compared with the model of its moment. A point is
durable once `current` names it; its anchor is kept in it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from lab.images import run
from stillframe.block.anchor import Anchor
from stillframe.block.reader import DiskReader
from stillframe.capture.bitmap import captured_by_bitmap
from stillframe.capture.plan import Wishes, make_plan
from stillframe.capture.run import Capture, StillDisk, Tools
from stillframe.errors import StillframeError
from stillframe.extent import Extent
from stillframe.hypervisor.guest import Guest

_STEP_BYTES = 1 << 20


def never() -> StillframeError | None:
    return None


@dataclass
class Taken:
    """What one capture read: changed bytes, or the whole disk's, and the notes, by target."""

    counted: dict[str, int] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    anchor: Anchor | None = None


class PullStore:
    """The folder of one destination. *name* is what the runs call it."""

    def __init__(self, folder: Path, name: str = "store") -> None:
        self.folder = folder
        self.name = name
        folder.mkdir(exist_ok=True)

    def current(self) -> Path | None:
        """Return the newest durable point."""
        with contextlib.suppress(OSError):
            return self.folder / os.readlink(self.folder / "current")
        return None

    def anchor(self) -> Anchor | None:
        """Return the anchor of the newest durable point."""
        point = self.current()
        if point is None or not (point / "anchor.json").exists():
            return None
        return msgspec.json.decode((point / "anchor.json").read_bytes(), type=Anchor)

    def take(
        self, domain: Guest, tools: Tools, wishes: Wishes, *,
        during: Callable[[Capture], None] = lambda _capture: None,
        before_durable: Callable[[], None] = lambda: None,
    ) -> Taken:
        """Make a new point: what changed goes onto the last one, all else is read whole."""
        taken = Taken()
        plan = make_plan(domain, wishes)
        with captured_by_bitmap(plan, tools, self.name, never, self.anchor()) as capture:
            during(capture)
            point = self.folder / capture.run_id
            point.mkdir()
            for disk in capture.disks:
                taken.notes[disk.target] = disk.note
                self._read(disk, point, taken, capture)
            capture.check_still()
            taken.anchor = capture.anchor
            if capture.anchor is not None:
                (point / "anchor.json").write_bytes(msgspec.json.encode(capture.anchor))
            before_durable()
            new = self.folder / "new"
            new.unlink(missing_ok=True)
            new.symlink_to(point.name)
            os.replace(new, self.folder / "current")
        return taken

    def _read(self, disk: StillDisk, point: Path, taken: Taken, capture: Capture) -> None:
        image, last = point / f"{disk.target}.img", self.current()
        with disk.read() as reader:
            changed = reader.changed()
            if changed is None:
                image.touch()
                os.truncate(image, reader.size_bytes)
                apply(reader.extents(), reader, image, capture)
                return
            assert last is not None
            run("cp", "--sparse=always", last / image.name, image)
            taken.counted[disk.target] = apply(changed, reader, image, capture)

    def drop(self, point: Path) -> None:
        """Delete a point."""
        shutil.rmtree(point)

    def points(self) -> Iterator[Path]:
        """Yield the durable points and the failed ones, oldest first."""
        return iter(sorted(path for path in self.folder.iterdir() if path.is_dir() and not path.is_symlink()))


def apply(extents: Iterator[Extent], reader: DiskReader, image: Path, capture: Capture) -> int:
    """Write *extents* into the image; return their bytes. Zeroes are written, too."""
    total = 0
    with image.open("r+b") as file, reader.connect() as connection:
        for extent in extents:
            error = capture.stop()
            if error is not None:
                raise error
            total += extent.length_bytes
            for at in range(extent.offset_bytes, extent.end_bytes, _STEP_BYTES):
                piece = bytearray(min(_STEP_BYTES, extent.end_bytes - at))
                if not extent.kind.reads_as_zero:
                    connection.pread_into(memoryview(piece), at)
                file.seek(at)
                file.write(piece)
    return total
