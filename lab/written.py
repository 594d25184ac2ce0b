"""Writing to a guest's disks through its QEMU, with a model of what each of them must hold."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator
from pathlib import Path

from lab.disks import Disk
from lab.images import Model
from lab.monitor import SideMonitor
from lab.waiting import PATIENCE_S, wait_for

_DONE = re.compile(r"^(wrote|discard|read) (\d+)/\d+ bytes at offset \d+\n", re.MULTILINE)
_FAILED = re.compile(r"^.*(failed|not found|invalid|cannot|must be|non-numeric).*\n",
                     re.MULTILINE | re.IGNORECASE)
_MISMATCH = "Pattern verification failed"


class WriteFailed(AssertionError):
    """QEMU did not carry out a write that the test made for the guest; the model is as before."""


class WrittenDisks:
    """A guest whose disks are written to by `write`, `write_zeroes` and `discard`.

    *log* is the file with what QEMU prints.
    """

    disks: dict[str, Disk]
    monitor: SideMonitor
    folder: Path

    def __init__(self, log: Path) -> None:
        self._log = log
        self._writing = threading.RLock()

    def running(self) -> bool:
        """Return whether the guest's QEMU runs."""
        raise NotImplementedError

    def read_disk(self, target: str, to: Path | None = None) -> Path:
        """Write what *target* holds to a raw file and return its path."""
        raise NotImplementedError

    def device(self, target: str) -> str:
        """Return what QEMU calls the device of the disk."""
        raise NotImplementedError

    def targets(self) -> list[str]:
        """Return the disks' names."""
        return list(self.disks)

    def model(self, target: str = "vda") -> Model:
        """Return the model of what *target* holds."""
        return self.disks[target].model

    @contextlib.contextmanager
    def still(self) -> Iterator[None]:
        """Hold back every write of other threads for the length of the block."""
        with self._writing:
            yield

    def write(self, target: str, offset: int, length: int, pattern: int) -> None:
        """Write *length* times the byte *pattern* (1 to 255, or 0 as data). Raises WriteFailed."""
        with self._writing:
            self._do(target, f"write -P {pattern:#04x} {offset} {length}")
            self.model(target).write(offset, bytes([pattern]) * length)

    def write_bytes(self, target: str, offset: int, data: bytes) -> None:
        """Write *data*, whole sectors of 512 bytes. Raises WriteFailed."""
        with self._writing:
            source = self.folder / "to-write"
            source.write_bytes(data)
            self._do(target, f"write -s {source} {offset} {len(data)}")
            self.model(target).write(offset, data)

    def write_zeroes(self, target: str, offset: int, length: int, *, unmap: bool = False) -> None:
        """Write zeroes as a guest's WRITE ZEROES does, *unmap* allows to free them. Raises WriteFailed."""
        with self._writing:
            self._do(target, f"write -z {'-u ' if unmap else ''}{offset} {length}")
            self.model(target).zero(offset, length)

    def discard(self, target: str, offset: int, length: int) -> None:
        """Discard whole clusters and check that they read as zero then. Raises WriteFailed."""
        with self._writing:
            self._do(target, f"discard {offset} {length}")
            if not self.reads_as(target, offset, length, 0):
                raise WriteFailed(f"{target}: discarded data does not read as zero (not whole clusters?)")
            self.model(target).zero(offset, length)

    def reads_as(self, target: str, offset: int, length: int, pattern: int) -> bool:
        """Return whether the guest would read nothing but *pattern* there."""
        with self._writing:
            return _MISMATCH not in self._do(target, f"read -P {pattern:#04x} {offset} {length}")

    def flush(self, target: str | None = None) -> None:
        """Flush one disk, or all: before that a qcow2 image can't be read from outside."""
        with self._writing:
            for name in [target] if target else self.targets():
                self._qemu_io(name, "flush")

    def assert_disk_equals_model(self, target: str = "vda") -> None:
        """Compare the disk with its model; a running guest is held still and flushed for it."""
        with self._writing:
            if self.running():
                self.flush(target)
            raw = self.read_disk(target)
            self.model(target).assert_equal(raw)
            raw.unlink()

    def _do(self, target: str, command: str) -> str:
        # qemu-io inside QEMU prints to QEMU's standard output, thus to its log, not to the monitor.
        log = self._log
        begin = log.stat().st_size
        self._qemu_io(target, command)

        def outcome() -> str:
            with log.open("rb") as file:
                file.seek(begin)
                text = file.read().decode(errors="replace")
            return text if _DONE.search(text) or _FAILED.search(text.replace(_MISMATCH, "")) else ""

        text = wait_for(f"{target}: {command}", outcome, PATIENCE_S)
        if not _DONE.search(text):
            raise WriteFailed(f"{target}: {command}: {text.strip()}")
        return text

    def _qemu_io(self, target: str, command: str) -> None:
        said = self.monitor.human(f'qemu-io -d {self.device(target)} "{command}"')
        if said.strip():
            raise WriteFailed(f"{target}: {command}: {said.strip()}")
