"""What tests of the pages on targets share: a guest that is backed up as a page says, and what must stay."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lab.daemons import LibvirtDaemons
from lab.diskguest import DiskGuest
from lab.disks import DiskSpec, Kind
from lab.enter import IMAGES_DIR
from lab.images import KIB, MIB, assert_equal_images
from tests.integration.pages import OwnMachine, blocks


@dataclass(frozen=True)
class Target:
    """A server with the backup of a guest, and what its disk held then. *admin* are the admin's options."""

    machine: OwnMachine
    guest: DiskGuest
    moment: Path
    admin: str
    #: What the page says to do after the backup.
    rest: list[str]

    def stillframe(self, words: str) -> str:
        """Run a command as the admin; it must succeed."""
        return self.machine.run(f"stillframe {words} {self.admin}")

    def fails(self, words: str) -> None:
        """Run a command as the admin; it must end with an error that stillframe knows."""
        self.machine.run(f"stillframe {words} {self.admin} && exit 1; test $? -ge 64")

    def assert_whole(self, to: Path) -> None:
        """Prune, verify everything, restore, and compare every byte."""
        self.stillframe("prune --fence-after 24h")
        assert '"findings": []' in self.stillframe("verify --level full --json")
        self.stillframe(f"restore web --to {to}/back/")
        assert_equal_images(to / "back" / "vda.img", self.moment)


@contextlib.contextmanager
def followed(
    daemons: LibvirtDaemons, folder: Path, page: str, names: Mapping[str, str], admin: str, *,
    services: str = "true", files: Mapping[str, str] | None = None, without: tuple[str, ...] = (),
) -> Iterator[Target]:
    """Follow *page* up to its `stillframe list`, on a machine that has *files*. See OwnMachine.

    Blocks that contain one of the words *without* are left out: what the page leaves to choose.
    """
    daemons.start()
    guest = DiskGuest(daemons, IMAGES_DIR, "web", [DiskSpec("vda", Kind.QCOW2, 24 * MIB)])
    with contextlib.ExitStack() as stack:
        stack.callback(guest.remove)
        guest.define()
        guest.start()
        guest.write("vda", MIB, 300 * KIB, 0xA1)
        guest.flush()
        machine = stack.enter_context(OwnMachine(folder, names, services))
        for path, content in (files or {}).items():
            machine.path(path).parent.mkdir(parents=True, exist_ok=True)
            machine.path(path).write_text(content)
        steps = [block for block in blocks(page) if not any(word in block for word in without)]
        (listed,) = (number for number, block in enumerate(steps) if block.startswith("stillframe list"))
        for block in steps[:listed + 1]:
            machine.follow(block)
        yield Target(machine, guest, guest.model("vda").copy_at_moment(), admin, steps[listed + 1:])
