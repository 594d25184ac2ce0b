"""Fixtures for tests that need the lab: a libvirtd of one's own and guests in it.

Everything of the lab is imported late: tests in tests/unit run where libvirt's binding is absent.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

from lab.enter import IMAGES_DIR, inside_lab

if TYPE_CHECKING:
    from lab.barequemu import BareQemu
    from lab.ceph import Ceph
    from lab.daemons import LibvirtDaemons
    from lab.dbguest import DbGuest
    from lab.diskguest import DiskGuest
    from lab.disks import DiskSpec
    from lab.lvm import VolumeGroup
    from tests.contract.drivers import Servers
    from tests.fault.harness import Place
    from tests.integration.booting import Booting, Snapshot

_numbers = itertools.count(1)
# How long an example takes says nothing where labs share few cores.
settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")


@pytest.fixture(scope="session")
def session_daemons() -> Iterator[LibvirtDaemons]:
    """Start libvirtd once for all tests."""
    if not inside_lab():
        pytest.fail("This test needs the lab. Run `make test`, or "
                    "`python -m lab.enter -- python -m pytest ...`.", pytrace=False)
    from lab.daemons import LibvirtDaemons

    daemons = LibvirtDaemons()
    daemons.start()
    yield daemons
    daemons.terminate()


@pytest.fixture
def daemons(session_daemons: LibvirtDaemons) -> Iterator[LibvirtDaemons]:
    """Give the lab's libvirtd, alive at the start; whatever domains a test leaves are removed after it."""
    session_daemons.start()
    yield session_daemons
    session_daemons.start()
    session_daemons.remove_all_domains()


@pytest.fixture(scope="session")
def ceph(session_daemons: LibvirtDaemons, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ceph]:
    """Start Ceph once for all tests with a disk on RBD."""
    from lab.ceph import Ceph as Cluster

    with Cluster(tmp_path_factory.mktemp("ceph"), session_daemons) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def lvm(session_daemons: LibvirtDaemons, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VolumeGroup]:
    """Make a volume group for all tests with a disk on LVM."""
    from lab.lvm import VolumeGroup as Group

    with Group(tmp_path_factory.mktemp("lvm")) as group:
        yield group


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """Give the servers of storages, each of which is started once when a test first wants it."""
    from tests.contract.drivers import Servers as All

    with contextlib.ExitStack() as stack:
        yield All(tmp_path_factory.mktemp("servers"), stack)


@pytest.fixture(autouse=True)
def _storage_that_is_marked(request: pytest.FixtureRequest) -> None:
    for storage in ("ceph", "lvm"):
        if request.node.get_closest_marker(storage):
            request.getfixturevalue(storage)


@pytest.fixture
def images_dir(daemons: LibvirtDaemons) -> Path:
    """Give the folder for guests' images, which QEMU's user can reach."""
    return IMAGES_DIR


@pytest.fixture
def overlays_dir(tmp_path: Path, images_dir: Path) -> Iterator[Path]:
    """Give a folder for overlays that is the test's own and goes with it, whatever was left there."""
    folder = images_dir / f"overlays-{tmp_path.name}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def place(tmp_path: Path, overlays_dir: Path) -> Place:
    """Give a run's places: a destination, a state folder, and a folder of its own for overlays."""
    from tests.fault.harness import Place as Places

    destination = tmp_path / "mirrors"
    destination.mkdir()
    return Places(destination, tmp_path / "state", overlays_dir)


@pytest.fixture(scope="module")
def boot_snapshot(
    session_daemons: LibvirtDaemons, tmp_path_factory: pytest.TempPathFactory
) -> Snapshot:
    """Give a snapshot of a guest with two disks for all tests of a module: none of them changes it."""
    from tests.integration.booting import take_snapshot

    session_daemons.start()
    return take_snapshot(session_daemons, tmp_path_factory.mktemp("boot"))


@pytest.fixture
def booting(
    daemons: LibvirtDaemons, boot_snapshot: Snapshot, place: Place, tmp_path: Path
) -> Iterator[Booting]:
    """Give a test's own places for guests that are booted from the snapshot; their servers end with it."""
    from tests.integration.booting import Booting as Places
    from tests.integration.booting import end_servers

    yield Places(
        daemons, boot_snapshot, replace(boot_snapshot.repo, place=place), place.overlays, tmp_path)
    end_servers()


@pytest.fixture
def disk_guest(daemons: LibvirtDaemons, images_dir: Path) -> Iterator[Callable[..., DiskGuest]]:
    """Make guests without an operating system: ``disk_guest(DiskSpec(...), ..., transient=True)``.

    The guest is defined and, unless ``started=False``, runs.
    """
    from lab.diskguest import DiskGuest
    from lab.disks import DiskSpec as Spec

    with contextlib.ExitStack() as cleanup:
        def make(*disks: DiskSpec, name: str = "", started: bool = True, **options: Any) -> DiskGuest:
            label = name or f"disk-{next(_numbers)}"
            guest = DiskGuest(daemons, images_dir, label, disks or (Spec(),), **options)
            cleanup.callback(guest.remove)
            guest.define()
            if started:
                guest.start()
            return guest

        yield make


@pytest.fixture
def bare_qemu(tmp_path: Path) -> Iterator[Callable[..., BareQemu]]:
    """Make guests that QEMU runs without libvirt: ``bare_qemu(DiskSpec(...), ..., uuid="…")``. They run."""
    if not inside_lab():
        pytest.fail("This test needs the lab. Run `make test`.", pytrace=False)
    from lab.barequemu import BareQemu
    from lab.disks import DiskSpec as Spec

    folder = tmp_path / "bare"
    folder.mkdir()
    with contextlib.ExitStack() as cleanup:
        def make(*disks: DiskSpec, name: str = "", started: bool = True, **options: Any) -> BareQemu:
            guest = BareQemu(folder, name or f"bare-{next(_numbers)}", disks or (Spec(),), **options)
            cleanup.callback(guest.remove)
            if started:
                guest.start()
            return guest

        yield make


@pytest.fixture
def db_guest(daemons: LibvirtDaemons, images_dir: Path) -> Iterator[Callable[..., DbGuest]]:
    """Make guests with a database that is written to all the time: ``db_guest(image_format="raw")``.

    The guest runs, its agent answers and its first rows are acknowledged, unless ``started=False``. One that
    is made without options booted before, for whichever test was the first (`lab.ready`).
    """
    from lab.dbguest import DbGuest
    from lab.ready import usual_moment

    with contextlib.ExitStack() as cleanup:
        def make(*, name: str = "", started: bool = True, **options: Any) -> DbGuest:
            moment = usual_moment(daemons) if started and not options else None
            if moment:
                options = {"disks": moment.disks}
            guest = DbGuest(daemons, images_dir, name or f"db-{next(_numbers)}", **options)
            cleanup.callback(guest.remove)
            guest.define()
            if moment:
                moment.resume(guest)
            elif started:
                guest.start()
            if started:
                guest.wait_ready()
            return guest

        yield make
