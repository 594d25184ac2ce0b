"""A volume group in the lab, on a loop device: for disks on logical volumes.

    with VolumeGroup(folder):
        ...   # a guest's disk may be of Kind.LVM now

It needs a kernel with device-mapper (`make test-lvm` boots one). LVM's commands see this one device alone and
keep nothing in /etc/lvm, so other volume groups of the machine are out of reach.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Self

from lab.daemons import OutsideLab
from lab.enter import inside_lab
from lab.images import MIB, run

#: The volume group that guests' disks are in.
NAME = "stillframe_lab"
_SIZE_BYTES = 1024 * MIB
# Nobody but LVM itself makes device nodes: udev may be absent.
_CONFIG = """\
devices {{ use_devicesfile=0 filter=["a|^{device}$|", "r|.*|"] }}
activation {{ udev_sync=0 udev_rules=0 monitoring=0 }}
backup {{ backup=0 archive=0 }}
"""


def lvm(device: str, program: str, *words: str) -> str:
    """Run one of LVM's commands, which sees *device* alone, and return its output."""
    return run(program, "--quiet", "--config", _CONFIG.format(device=device), *words)


class VolumeGroup:
    """The volume group, in a file in *folder*. Raises OutsideLab outside the lab."""

    _device = ""

    def __init__(self, folder: Path) -> None:
        if not inside_lab():
            raise OutsideLab
        self._file = folder / "volumes"

    def __enter__(self) -> Self:
        """Make the volume group."""
        self._file.touch()
        os.truncate(self._file, _SIZE_BYTES)
        VolumeGroup._device = run("losetup", "--find", "--show", self._file).strip()
        lvm(self._device, "vgcreate", NAME, self._device)
        return self

    def __exit__(self, *_: object) -> None:
        """Take the volume group away with all its volumes."""
        lvm(self._device, "vgremove", "--force", NAME)
        run("losetup", "--detach", self._device)

    @classmethod
    def make_volume(cls, name: str, size_bytes: int) -> Path:
        """Make a logical volume and return its device."""
        lvm(cls._device, "lvcreate", "--yes", "--name", name, "--size", f"{size_bytes}b", NAME)
        return Path(f"/dev/{NAME}/{name}")
