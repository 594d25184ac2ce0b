"""Files of a snapshot, taken out through libguestfs: the bytes, and all that belongs to them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from lab.enter import SOCKETS_DIR
from lab.waiting import PATIENCE_S as LAB_PATIENCE_S
from lab.waiting import wait_for
from stillframe.block.image import file_place
from stillframe.block.reader import open_reader
from stillframe.clock import SystemClock
from stillframe.errors import (
    ApplianceFailed,
    FilesystemLocked,
    FilesystemUnknown,
    KeyNeeded,
    LibguestfsMissing,
    PathUnknown,
    StillframeError,
    TargetExists,
)
from stillframe.repository.keyslots import SlotKind
from stillframe.repository.opened import Repository, Secret, open_repository
from stillframe.repository.places import Places
from stillframe.repository.reader import DiskView
from stillframe.repository.snapshots import read_snapshot
from stillframe.restore.appliance import Appliance, Person, started
from stillframe.restore.appliance_wire import Begun, Entry, Found, Listed, Task
from stillframe.restore.archive import Rules, hand_on
from stillframe.restore.export_order import Order, order_for
from stillframe.storage.local import LocalStorage
from tests.fault.driver import PASSPHRASE
from tests.fault.harness import Place
from tests.integration.guest_images import (
    FILES,
    LUKS_PASSPHRASE,
    MODIFIED_NS,
    MODIFIED_S,
    VAULT,
    guest_images,
)
from tests.integration.repositories import Repo, make_repo, store_disks

CLOCK = SystemClock()
#: Launch and inspection take a minute of a processor without KVM, and more where labs share it.
PATIENCE_S = 600.0
IN_ROOT = ("--filesystem", "/dev/sda1", "--timeout", "10m")
pytestmark = [pytest.mark.timeout(900), pytest.mark.together]
_NOBODY = 65534
_VAULT_DEVICE = "/dev/sda5"


@dataclass(frozen=True)
class Stock:
    """A repository on disk with a snapshot of the guest's four disks."""

    repo: Repo
    repository: Repository
    orders: dict[str, Order]

    def call(self, *words: str | Path, timeout_s: float = PATIENCE_S, user: int = 0,
             **environment: str) -> subprocess.CompletedProcess[bytes]:
        """Run `stillframe files`; output is bytes."""
        return subprocess.run(
            self.repo.command("files", *words), capture_output=True, check=False, timeout=timeout_s,
            cwd="/", env={**self.repo.environment(), "HOME": "/", **environment}, stdin=subprocess.DEVNULL,
            user=user or None, group=user or None, extra_groups=[] if user else None)

    def refused(self, error: type[StillframeError], *words: str | Path, **options: str) -> str:
        done = self.call(*words, **options)  # type: ignore[arg-type]
        assert done.returncode == error.exit_code, done.stderr.decode()
        assert b"Next:" in done.stderr
        return done.stderr.decode()


@pytest.fixture(scope="module")
def stock() -> Stock:
    folder = _open_folder()
    repo = make_repo(Place(folder / "mirror", folder / "state", folder / "overlays"), folder)
    repository = open_repository(LocalStorage(repo.path), Secret(SlotKind.PASSPHRASE, PASSPHRASE))
    with contextlib.ExitStack() as stack:
        readers = {target: stack.enter_context(open_reader(file_place(str(path), "raw"), clock=CLOCK))
                   for target, path in guest_images().items()}
        name = store_disks(repository, readers)
    disks = read_snapshot(repository, name).disks
    return Stock(repo, repository, {disk.target: order_for(repository, disk.target, disk) for disk in disks})


def _open_folder() -> Path:
    """Return a new folder that every user can get to; pytest's own are for root alone."""
    folder = Path(tempfile.mkdtemp(dir=SOCKETS_DIR))
    folder.chmod(0o755)
    return folder


class Guest:
    """A running appliance, and what a person was told."""

    def __init__(self, appliance: Appliance, warned: list[str]) -> None:
        self._appliance = appliance
        self.warned = warned

    def ask(self, verb: str, *paths: str, **options: object) -> list[object]:
        """Return what is said to a task; data is left out."""
        return list(self._appliance.ask(Task(verb, paths, **options)))  # type: ignore[arg-type]

    def entries(self, *paths: str, **options: object) -> dict[str, Entry]:
        listed = self.ask("list", *paths, **options)
        return {entry.path: entry for part in listed if isinstance(part, Listed) for entry in part.entries}

    def content(self, path: str, **options: object) -> bytes:
        found = b""
        for answer in self._appliance.ask(Task("cat", (path,), **options)):  # type: ignore[arg-type]
            if isinstance(answer, Begun):
                found = self._appliance.data().read()
        return found

    def archive(self, *paths: str, rules: Rules | None = None) -> dict[str, tuple[tarfile.TarInfo, bytes]]:
        """Return the members of what `get` gives, by name."""
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as sink:
            for answer in self._appliance.ask(Task("get", paths)):
                if isinstance(answer, Begun):
                    hand_on(self._appliance.data(), answer.path.rpartition("/")[2], sink,
                            rules or Rules(unpacked=False), lambda: None)
        out.seek(0)
        with tarfile.open(fileobj=out) as archive:
            files = {each.name: archive.extractfile(each) for each in archive if not each.issym()}
            return {each.name: (each, file.read() if (file := files.get(each.name)) else b"")
                    for each in archive}


@pytest.fixture(scope="module")
def guest(stock: Stock) -> Iterator[Guest]:
    """One appliance with all disks, for all tests that only ask."""
    warned: list[str] = []
    person = Person(lambda _: None, warned.append, None, lambda: None)
    with started(list(stock.orders.values()), person, CLOCK, PATIENCE_S) as appliance:
        yield Guest(appliance, warned)


# --- what is there --------------------------------------------------------------------------------


def test_file_systems_are_found_with_their_disks(guest: Guest) -> None:
    (found,) = guest.ask("filesystems")
    assert isinstance(found, Found)
    assert {(each.device, each.disk, each.type, each.label, each.mounted_at)
            for each in found.filesystems} >= {
        ("/dev/sda1", "vda", "ext4", "root", "/"), ("/dev/guest/data", "", "ext4", "", "/data"),
        ("/dev/sda3", "vda", "vfat", "EFI", "/boot/efi"), ("/dev/sda4", "vda", "ntfs", "windows", "/windows"),
        (_VAULT_DEVICE, "vda", "crypto_LUKS", "", ""), ("/dev/sdb", "vdb", "xfs", "srv", "/srv")}
    assert {each.type for each in found.filesystems if each.mounted_at == "/opt"} == {"btrfs"}
    assert found.systems == ("Debian of tests on /dev/sda1",)


@pytest.mark.parametrize("path", FILES)
def test_a_file_is_the_guests_byte_by_byte(guest: Guest, path: str) -> None:
    """ext4 on a partition and on LVM, btrfs on LVM, XFS on a whole disk, FAT and NTFS."""
    assert guest.content(path) == FILES[path].content


def test_listing_has_what_belongs_to_files(guest: Guest) -> None:
    found = guest.entries("/home/alice")
    home = "/home/alice/"
    assert set(found) == {home + name for name in (
        "absolute", "empty", "link", "notes.txt", "pipe", "size\u00e4 1.txt", "tool", "zz-hard")}
    notes = found[home + "notes.txt"]
    assert (notes.mode, notes.uid, notes.gid, notes.size_bytes, notes.modified_ns) == (
        0o100640, 1000, 1001, 100_003, MODIFIED_S * 10**9 + MODIFIED_NS)
    assert found[home + "link"].links_to == "notes.txt"
    assert found[home + "absolute"].links_to == "/etc/hostname"


def test_listing_all_below(guest: Guest) -> None:
    assert set(FILES) <= set(guest.entries("/", recursive=True))


def test_a_path_through_a_link_stays_in_the_guest(guest: Guest) -> None:
    assert guest.content("/home/alice/absolute") == b"web\n"


@pytest.mark.parametrize(
    "path", ["/none", "/etc/hostname/below", "/home/alice", "relative", "/home/alice/pipe"])
def test_a_path_that_has_no_content(guest: Guest, path: str) -> None:
    with pytest.raises(PathUnknown):
        guest.content(path)


# --- what is taken out ------------------------------------------------------------------------------


def test_a_folder_as_an_archive_keeps_all(guest: Guest) -> None:
    members = guest.archive("/home/alice", "/data/rows.db")
    for path in ("/home/alice/notes.txt", "/home/alice/tool", "/home/alice/size\u00e4 1.txt"):
        member, content = _first(members, path.removeprefix("/home/"))
        assert (content, member.uid, member.gid, member.mode) == (
            FILES[path].content, FILES[path].uid, FILES[path].gid, FILES[path].mode)
        assert member.pax_headers["mtime"] == f"{MODIFIED_S}.{MODIFIED_NS}"
    assert members["alice"][0].isdir()
    assert members["alice/empty"][0].isdir()
    assert members["alice/pipe"][0].isfifo()
    assert members["alice/link"][0].linkname == "notes.txt"
    assert members["alice/absolute"][0].linkname == "/etc/hostname"
    assert {members["alice/zz-hard"][0].linkname, members["alice/notes.txt"][0].linkname} in (
        {"", "alice/zz-hard"}, {"", "alice/notes.txt"})
    notes = _first(members, "alice/notes.txt")[0].pax_headers
    assert notes["SCHILY.xattr.user.color"] == "blue"
    assert "user:1234:r--" in notes["SCHILY.acl.access"]
    assert members["rows.db"][1] == FILES["/data/rows.db"].content
    assert (members["rows.db"][0].uid, members["rows.db"][0].mode) == (33, 0o600)


def test_a_single_file_keeps_what_it_keeps_in_a_folder(guest: Guest) -> None:
    alone, of_folder = (guest.archive(path) for path in ("/home/alice/notes.txt", "/home/alice"))
    one, other = alone["notes.txt"], _first(of_folder, "alice/notes.txt")
    assert one[1] == other[1]
    for attribute in ("mode", "uid", "gid", "size", "type"):
        assert getattr(one[0], attribute) == getattr(other[0], attribute)
    kept = ("mtime", "SCHILY.xattr.user.color")
    assert {key: one[0].pax_headers[key] for key in kept} == {key: other[0].pax_headers[key] for key in kept}
    assert _acl(one[0]) == _acl(other[0])
    assert guest.archive("/home/alice/link")["link"][0].linkname == "notes.txt"


def _first(
    members: dict[str, tuple[tarfile.TarInfo, bytes]], name: str
) -> tuple[tarfile.TarInfo, bytes]:
    """Return the member with the content: of a file's two names, tar has it with the one that comes first."""
    member = members[name]
    return members[member[0].linkname] if member[0].islnk() else member


def _acl(member: tarfile.TarInfo) -> set[str]:
    return {line.partition("#")[0].strip() for line in
            member.pax_headers["SCHILY.acl.access"].replace(",", "\n").splitlines() if line.strip()}


# --- file systems by themselves ------------------------------------------------------------------


def test_case_does_not_count_where_it_does_not_for_the_guest(guest: Guest) -> None:
    content = FILES["/windows/Users/Me/report.doc"].content
    for path in ("/users/me/REPORT.doc", r"\Users\Me\report.doc", r"C:\users\ME\report.doc"):
        assert guest.content(path, filesystem="/dev/sda4") == content
    with pytest.raises(PathUnknown):
        guest.content("/HOME/alice/notes.txt", filesystem="/dev/sda1")


def test_one_file_system_by_itself(guest: Guest) -> None:
    assert guest.content("/rows.db", filesystem="/dev/guest/data") == FILES["/data/rows.db"].content
    assert guest.content("/big.bin", filesystem="/dev/sdb") == FILES["/srv/big.bin"].content
    with pytest.raises(FilesystemUnknown, match="/dev/sda9"):
        guest.content("/big.bin", filesystem="/dev/sda9")


# --- what is hurt or locked -------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["/dev/sdd", "/dev/sdc"])
def test_a_hostile_or_unknown_disk_is_an_error_alone(guest: Guest, device: str) -> None:
    with pytest.raises(FilesystemUnknown):
        guest.ask("list", "/", filesystem=device)
    # The appliance is of use all the same.
    assert guest.content("/etc/hostname", filesystem="/dev/sda1") == b"web\n"


@pytest.mark.slow  # LUKS opened by an emulated appliance
def test_an_encrypted_disk_and_its_keys(guest: Guest) -> None:
    with pytest.raises(FilesystemLocked, match=_VAULT_DEVICE):
        guest.content("/vault.bin", filesystem="/dev/mapper/stillframe-sda5", keys=("wrong",))
    assert guest.content("/vault.bin", filesystem="/dev/mapper/stillframe-sda5",
                         keys=("wrong", LUKS_PASSPHRASE)) == VAULT


# --- by the command ------------------------------------------------------------------------------


def test_a_folder_becomes_files_of_this_host(stock: Stock, tmp_path: Path) -> None:
    """By the command, as root: one launch; what would be dangerous here is left out."""
    done = stock.call("get", "web:vda", "/home/alice", "/etc", "--to", tmp_path / "out", "--json", *IN_ROOT)
    assert done.returncode == 0, done.stderr.decode()
    body = json.loads(done.stdout)
    assert (body["names"], body["left_out"]) == (["alice", "etc"], ["./pipe"])
    home = tmp_path / "out" / "alice"
    notes, facts = home / "notes.txt", (home / "notes.txt").stat()
    assert notes.read_bytes() == FILES["/home/alice/notes.txt"].content
    assert (facts.st_uid, facts.st_gid, facts.st_mode & 0o7777) == (1000, 1001, 0o640)
    assert facts.st_mtime_ns == MODIFIED_S * 10**9 + MODIFIED_NS
    assert os.getxattr(notes, "user.color") == b"blue"
    assert "user:1234:r--" in subprocess.run(["getfacl", "-n", notes], capture_output=True, text=True).stdout
    assert (home / "zz-hard").stat().st_ino == facts.st_ino
    assert (home / "absolute").readlink() == Path("/etc/hostname")
    assert (home / "tool").stat().st_mode & 0o7777 == 0o755, "a program of another root's would run as ours"
    assert home.stat().st_mtime_ns == MODIFIED_S * 10**9 + MODIFIED_NS
    assert (tmp_path / "out/etc/fstab").read_bytes() == FILES["/etc/fstab"].content
    assert not (home / "pipe").exists()
    before = sorted(tmp_path.rglob("*"))
    stock.refused(TargetExists, "get", "web:vda", "/home/alice", "--to", tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_user_who_is_not_root(stock: Stock) -> None:
    out, _ = _of_nobody(stock)
    done = stock.call("get", "web:vdb", "/big.bin", "--to", out / "to", "--timeout", "10m", user=_NOBODY,
                      TMPDIR=str(out))
    assert done.returncode == 0, done.stderr.decode()
    assert (out / "to/big.bin").read_bytes() == FILES["/srv/big.bin"].content
    assert (out / "to/big.bin").stat().st_uid == _NOBODY
    assert sorted(path.name for path in out.iterdir()) == ["key", "state", "to"], "something was left"


@pytest.mark.slow
def test_a_key_file_for_an_encrypted_disk(stock: Stock) -> None:
    """The passphrase is on no command line and in no output."""
    out, key = _of_nobody(stock)
    done = stock.call("get", "web:vda", "/vault.bin", "--to", out / "vault.tar", "--luks-key-file", key,
                      "--filesystem", "/dev/mapper/stillframe-sda5", "--timeout", "10m",
                      user=_NOBODY, timeout_s=800.0, TMPDIR=str(out))
    assert done.returncode == 0, done.stderr.decode()
    with tarfile.open(out / "vault.tar") as archive:
        file = archive.extractfile("vault.bin")
        assert file is not None
        assert file.read() == VAULT
    assert LUKS_PASSPHRASE.encode() not in done.stdout + done.stderr


def _of_nobody(stock: Stock) -> tuple[Path, Path]:
    """Return a folder of that user's and a key file in it; the repository is made theirs to read."""
    stock.repo.path.with_suffix(".pass").chmod(0o644)
    for path in [stock.repo.path, *stock.repo.path.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    out = _open_folder()
    key = out / "key"
    key.write_text(f"{LUKS_PASSPHRASE}\n")
    (out / "state").mkdir()
    for path in (out, key, out / "state"):
        os.chown(path, _NOBODY, _NOBODY)
    key.chmod(0o600)
    return out, key


@pytest.mark.slow  # an appliance of its own, for a repository that is hurt
def test_a_file_in_a_bad_chunk_is_no_file(stock: Stock, tmp_path: Path) -> None:
    hurt = replace(stock.repo, path=tmp_path / "repository")
    shutil.copytree(stock.repo.path, hurt.path)
    shutil.copy(stock.repo.path.with_suffix(".pass"), hurt.path.with_suffix(".pass"))
    content = FILES["/srv/big.bin"].content
    order = stock.orders["vdb"]
    with DiskView(Places(stock.repository), order.content) as view:
        at = guest_images()["vdb"].read_bytes().find(content[:4096])
        chunk = at // stock.repository.parameters.chunk_bytes + 4
        entry, = view._entries(range(chunk, chunk + 1))
    assert entry is not None
    pack = hurt.path / entry.place.pack.key
    packed = bytearray(pack.read_bytes())
    packed[entry.place.offset_bytes + entry.place.stored_bytes // 2] ^= 1
    pack.chmod(0o600)
    pack.write_bytes(packed)
    done = replace(stock, repo=hurt).call(
        "get", "web:vdb", "/big.bin", "--to", tmp_path / "out", "--filesystem", "/dev/sda",
        "--timeout", "10m")
    said = done.stderr.decode()
    assert done.returncode != 0, said
    assert "data is lost" in said
    assert not (tmp_path / "out" / "big.bin").exists()


# --- when the appliance can't be had ------------------------------------------------------------------


def test_an_appliance_that_takes_too_long_is_given_up(stock: Stock, tmp_path: Path) -> None:
    before = _qemus()
    said = stock.refused(
        ApplianceFailed, "get", "web:vdb", "/big.bin", "--to", tmp_path / "out", "--timeout", "1s")
    assert "said nothing for 1 s" in said
    assert list(tmp_path.iterdir()) == []
    wait_for("QEMU ends with its worker", lambda: _qemus() <= before, LAB_PATIENCE_S)


def _qemus() -> set[str]:
    found = subprocess.run(["pgrep", "-f", "guestfsd.sock"], capture_output=True, text=True, check=False)
    return set(found.stdout.split())


def test_a_kernel_that_only_root_can_read_is_named(stock: Stock) -> None:
    out, _ = _of_nobody(stock)
    kernel = Path(os.environ["SUPERMIN_KERNEL"])
    mine = out / kernel.name
    shutil.copy(kernel, mine)
    mine.chmod(0o600)
    said = stock.refused(  # a cache of its own, else nothing would have to be made
        ApplianceFailed, "ls", "web:vdb", "/", user=_NOBODY, SUPERMIN_KERNEL=str(mine),  # type: ignore[arg-type]
        LIBGUESTFS_CACHEDIR=str(out))
    assert "chmod 0644 /boot/vmlinuz" in said


def test_without_libguestfs_it_says_what_to_install(stock: Stock) -> None:
    hidden = ("import sys, stillframe.cli.main as cli; "
              "sys.path[:] = [each for each in sys.path if 'dist-packages' not in each]; cli.main()")
    words = stock.repo.command("files", "ls", "web")[3:]
    done = subprocess.run([sys.executable, "-c", hidden, *words], capture_output=True, text=True, check=False,
                          env=stock.repo.environment())
    assert done.returncode == LibguestfsMissing.exit_code, done.stderr
    assert "apt-get install python3-guestfs" in done.stderr


def test_a_key_file_that_is_not_there(stock: Stock, tmp_path: Path) -> None:
    assert "can't be read" in stock.refused(
        KeyNeeded, "ls", "web", "/", "--luks-key-file", tmp_path / "none")
