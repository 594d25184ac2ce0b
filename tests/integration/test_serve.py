"""Exports of snapshots over NBD, as independent clients see them, and what happens when something dies."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from shutil import copytree
from typing import Any

import msgspec
import nbd
import pytest

from lab.disks import free_port
from lab.waiting import PATIENCE_S, wait_for
from stillframe import process
from stillframe.clock import SystemClock
from stillframe.errors import ExportExposed, ExportFailed, SnapshotUnknown, TargetExists
from stillframe.extent import Kind
from stillframe.repository.catalog import forget, plan_forget
from stillframe.repository.collect import collect
from stillframe.repository.keyslots import SlotKind
from stillframe.repository.layout import SnapshotName
from stillframe.repository.opened import Repository, Secret, open_repository
from stillframe.repository.snapshots import read_snapshot
from stillframe.restore.export import Export, Serving, Tcp, end_export, exported, start_export
from stillframe.restore.export_order import Order, order_for
from stillframe.storage.local import LocalStorage
from stillframe.units import KIB, MIB
from tests.fault.driver import PASSPHRASE
from tests.fault.harness import Place
from tests.integration.repositories import Repo, make_repo, store_disks
from tests.unit.repository_disks import SourceDisk, noise

CHUNK = 64 * KIB
HOLE = (5 * MIB, 10 * MIB)
SIZE = 24 * MIB + 512
PACK_BYTES = 4 * MIB
CLOCK = SystemClock()


@dataclass(frozen=True)
class Stock:
    """A repository on disk with a snapshot of two disks, and what they hold."""

    repo: Repo
    repository: Repository
    disks: dict[str, bytes]
    name: SnapshotName

    def order(self, target: str = "vda", path: Path | None = None, **options: Any) -> Order:
        manifest = read_snapshot(self.repository, self.name)
        entry = next(disk for disk in manifest.disks if disk.target == target)
        order = order_for(self.repository, target, entry)
        return msgspec.structs.replace(order, **({"address": str(path)} if path else {}), **options)

    def image(self, folder: Path, target: str = "vda") -> Path:
        image = folder / f"{target}.expected"
        image.write_bytes(self.disks[target])
        return image


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Stock:
    folder = tmp_path_factory.mktemp("serve")
    repo = make_repo(Place(folder / "mirror", folder / "state", folder / "overlays"), folder,
                     pack_bytes=PACK_BYTES)
    repository = open_repository(LocalStorage(repo.path), Secret(SlotKind.PASSPHRASE, PASSPHRASE))
    disks = {"vda": SourceDisk(noise(SIZE), [(*HOLE, Kind.HOLE)]), "vdb": SourceDisk(noise(3 * CHUNK, 2))}
    name = store_disks(repository, disks)
    return Stock(repo, repository, {target: bytes(disk.content) for target, disk in disks.items()}, name)


@pytest.fixture
def copy(stock: Stock, tmp_path: Path) -> Path:
    """A repository of one's own, to be hurt."""
    return Path(copytree(stock.repo.path, tmp_path / "copy"))


def run(*command: str | Path, code: int = 0) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False,
                          timeout=120)
    assert (done.returncode == 0) is (code == 0), done.stdout + done.stderr
    return done.stdout


def same(uri: str, image: Path) -> None:
    assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", image, uri)


def connected(uri: str) -> Any:
    handle = nbd.NBD()
    handle.connect_uri(uri)
    return handle


def digest(folder: Path) -> str:
    """Return what is equal only if every file of the folder is."""
    whole = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        whole.update(f"{path} {path.stat().st_mtime_ns}".encode() + path.read_bytes())
    return whole.hexdigest()


@contextlib.contextmanager
def serving(stock: Stock, *words: str | Path) -> Iterator[tuple[subprocess.Popen[str], list[dict[str, Any]]]]:
    """Run `stillframe serve` and give it and its exports; it must be ended by then, or is."""
    command = stock.repo.command("serve", *words, "--json")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          env=stock.repo.environment(), cwd=stock.repo.root) as tool:
        try:
            assert tool.stdout is not None
            body = "".join(iter(tool.stdout.readline, "}\n")) + "}"
            yield tool, json.loads(body)["exports"]
        finally:
            tool.terminate()  # it clears up; a killed one leaves that to the next


def refused(stock: Stock, *words: str | Path, code: int) -> str:
    done = stock.repo.call("serve", *words)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Next:" in done.stderr
    return done.stderr


# --- what clients read --------------------------------------------------------------------------


def test_independent_clients_read_every_byte(stock: Stock, tmp_path: Path) -> None:
    expected, copied, converted = stock.image(tmp_path), tmp_path / "copied", tmp_path / "converted"
    with exported(stock.order(), CLOCK) as export:
        run("nbdcopy", export.uri, copied)
        run("qemu-img", "convert", "-f", "raw", "-O", "raw", export.uri, converted)
        same(export.uri, expected)
        info = json.loads(run("nbdinfo", "--json", export.uri))["exports"][0]
    assert copied.read_bytes() == converted.read_bytes() == expected.read_bytes()
    assert copied.stat().st_blocks * 512 <= SIZE - HOLE[1] + MIB, "holes were copied"
    assert (info["export-name"], info["export-size"], info["is_read_only"], info["can_multi_conn"]) == (
        "vda", SIZE, True, True)


def test_holes_are_reported(stock: Stock) -> None:
    with exported(stock.order(), CLOCK) as export:
        found = json.loads(run("nbdinfo", "--map", "--json", export.uri))
    assert [(each["offset"], each["length"], each["type"]) for each in found] == [
        (0, HOLE[0], 0), (*HOLE, 3), (sum(HOLE), SIZE - sum(HOLE), 0)]


def test_reads_of_any_place_and_length(stock: Stock) -> None:
    expected = stock.disks["vda"]
    with exported(stock.order(cache_bytes=4 * MIB), CLOCK) as export:
        handle = connected(export.uri)
        for at, length in [(0, 1), (CHUNK - 1, 2), (HOLE[0] - 3, 6), (SIZE - 1, 1), (SIZE - 513, 513),
                           (HOLE[0] + 5, 70000), (3, 20 * MIB)]:
            assert handle.pread(length, at) == expected[at : at + length]


def test_two_clients_at_once(stock: Stock, tmp_path: Path) -> None:
    with exported(stock.order(), CLOCK) as export, ThreadPoolExecutor(2) as pool:
        copies = [tmp_path / "one", tmp_path / "two"]
        list(pool.map(lambda copy: run("nbdcopy", export.uri, copy), copies))
    assert [copy.read_bytes() == stock.disks["vda"] for copy in copies] == [True, True]


def test_what_is_written_lasts_as_long_as_the_server(stock: Stock, tmp_path: Path) -> None:
    expected, before = stock.image(tmp_path), digest(stock.repo.path)
    changed = bytearray(stock.disks["vda"])
    changed[MIB + 512 : MIB + 66048] = b"\7" * 65536
    changed[6 * MIB : 7 * MIB] = b"\7" * MIB
    changed[20 * MIB : 21 * MIB] = bytes(MIB)
    other = tmp_path / "changed"
    other.write_bytes(changed)
    with exported(stock.order(), CLOCK, Serving(writable=True)) as export:
        run("qemu-io", "-f", "raw", "-c", "write -P 7 1049088 64k", "-c", "write -P 7 6M 1M",
            "-c", "write -z 20M 1M", "-c", "flush", export.uri)
        same(export.uri, other)
    assert digest(stock.repo.path) == before
    with exported(stock.order(), CLOCK, Serving(writable=True)) as export:
        same(export.uri, expected)
    with exported(stock.order(), CLOCK) as export, pytest.raises(nbd.Error):
        connected(export.uri).pwrite(b"7", 0)


def test_an_export_that_is_not_there_is_refused(stock: Stock) -> None:
    with exported(stock.order(), CLOCK) as export:
        run("nbdinfo", export.uri.replace("/vda", "/vdb"), code=1)
        (listed,) = json.loads(run("nbdinfo", "--list", "--json", export.uri))["exports"]
    assert listed["export-name"] == "vda"


# --- a repository that is hurt, or gone -----------------------------------------------------------


def test_a_bad_chunk_is_an_io_error_that_names_it(stock: Stock, copy: Path) -> None:
    packs = sorted((copy / "main/p").rglob("*"), key=lambda path: path.name)
    pack = next(path for path in packs if path.is_file())
    content = bytearray(pack.read_bytes())
    content[20_000] ^= 1
    pack.write_bytes(content)
    with exported(stock.order(path=copy), CLOCK) as export:
        handle = connected(export.uri)
        with pytest.raises(nbd.Error) as caught:
            handle.pread(CHUNK, 0)
        assert caught.value.errnum == 5
        assert handle.pread(CHUNK, 2 * MIB) == stock.disks["vda"][2 * MIB : 2 * MIB + CHUNK]
        lines, end = export.said_since(0)
        assert export.said_since(end) == ([], end)
    (line,) = lines
    assert f"vda: data is lost within the {CHUNK} bytes at 0: Slot 0 of the pack p/" in line


def test_a_repository_that_vanishes_is_an_io_error_until_it_is_back(stock: Stock, copy: Path) -> None:
    away = copy.with_name("away")
    with exported(stock.order(path=copy, patience_s=0.3), CLOCK) as export:
        handle = connected(export.uri)
        assert handle.pread(CHUNK, 0) == stock.disks["vda"][:CHUNK]
        copy.rename(away)
        with pytest.raises(nbd.Error) as caught:
            handle.pread(CHUNK, 20 * MIB)
        assert caught.value.errnum == 5
        assert handle.pread(CHUNK, 0) == stock.disks["vda"][:CHUNK], "what was read is kept"
        away.rename(copy)
        assert handle.pread(SIZE, 0) == stock.disks["vda"]
        said = export.said()
    assert "the repository can't be read" in said
    assert said.endswith("vda: the repository can be read again")


def test_a_client_that_reads_meanwhile_only_waits(stock: Stock, copy: Path, tmp_path: Path) -> None:
    away = copy.with_name("away")
    order = stock.order(path=copy, patience_s=PATIENCE_S)
    with exported(order, CLOCK) as export, ThreadPoolExecutor(1) as pool:
        copy.rename(away)
        reading = pool.submit(run, "nbdcopy", export.uri, tmp_path / "copied")
        wait_for("a read fails", lambda: "can't be read" in export.said(), PATIENCE_S)
        away.rename(copy)
        reading.result()
    assert (tmp_path / "copied").read_bytes() == stock.disks["vda"]


def test_a_repository_that_hangs_without_an_error_is_one_until_it_is_back(
    stock: Stock, copy: Path, tmp_path: Path,
) -> None:
    """As on a dead NFS server: whoever opens a pack waits, here for somebody who writes into a pipe."""
    packs = [path for path in copy.glob("*/p/**/*") if path.is_file()]
    with exported(stock.order(path=copy, patience_s=0.0), CLOCK) as export:
        handle = connected(export.uri)
        for path in packs:
            path.rename(path.with_suffix(".kept"))
            os.mkfifo(path)
        with pytest.raises(nbd.Error):
            handle.pread(CHUNK, 0)
        assert "gave no answer within" in export.said()
        for path in packs:
            waker = os.open(path, os.O_RDWR | os.O_NONBLOCK)
            path.with_suffix(".kept").rename(path)
            os.close(waker)  # whoever still waits finds an end, and nothing before it
        assert handle.pread(CHUNK, 0) == stock.disks["vda"][:CHUNK]


def test_a_repository_that_is_not_there_is_said(stock: Stock, tmp_path: Path) -> None:
    with pytest.raises(ExportFailed, match="nothing in"), exported(stock.order(path=tmp_path / "no"), CLOCK):
        pass


# --- processes ------------------------------------------------------------------------------------


def test_the_command_serves_all_disks_and_ends_well(stock: Stock, tmp_path: Path) -> None:
    with serving(stock, "web") as (tool, exports):
        assert [export["name"] for export in exports] == ["vda", "vdb"]
        for export in exports:
            same(export["uri"], stock.image(tmp_path, export["target"]))
            assert Path(export["socket"]).parent.stat().st_mode & 0o777 == 0o700
        tool.send_signal(signal.SIGTERM)
        assert tool.wait(PATIENCE_S) == 0
        for export in exports:
            assert not process.is_alive(export["pid"], export["mark"])
            assert not Path(export["socket"]).parent.exists()


def test_the_key_is_nowhere_to_be_seen(stock: Stock) -> None:
    with exported(stock.order(), CLOCK) as export:
        seen = b"".join(Path(f"/proc/{export.pid}/{name}").read_bytes() for name in ("cmdline", "environ"))
        seen += b"".join(path.read_bytes() for path in Path(export.log).parent.iterdir() if path.is_file())
    key = stock.repository.key.secret
    assert b"export_plugin.py" in seen
    for text in (key, key.hex().encode(), msgspec.json.encode(key).strip(b'"')):
        assert text not in seen


def test_a_killed_tool_leaves_no_server(stock: Stock) -> None:
    with serving(stock, "web:vda") as (tool, (export,)):
        client = connected(export["uri"])  # nbdkit would wait for it to leave
        tool.kill()
        tool.wait(PATIENCE_S)
        wait_for("the server is gone", lambda: not process.start_mark(export["pid"]), PATIENCE_S)
        del client
    folder = Path(export["socket"]).parent
    assert folder.exists()
    with exported(stock.order("vdb"), CLOCK) as other:
        assert other.is_running
        assert not folder.exists(), "the next one clears up"


def test_a_server_that_dies_ends_the_command(stock: Stock) -> None:
    with serving(stock, "web:vda") as (tool, (export,)):
        os.kill(export["pid"], signal.SIGKILL)
        assert tool.wait(PATIENCE_S) == ExportFailed.exit_code


def test_a_detached_server_outlives_its_starter(stock: Stock, tmp_path: Path) -> None:
    script = (
        "import msgspec, sys; from pathlib import Path; from dataclasses import asdict\n"
        "from stillframe.clock import SystemClock\n"
        "from stillframe.restore.export import start_export\n"
        "from stillframe.restore.export_order import decode_order\n"
        "order = decode_order(sys.stdin.buffer.read())\n"
        "export = start_export(order, Path(sys.argv[1]), SystemClock())\n"
        "print(msgspec.json.encode(asdict(export)).decode())\n")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script, str(tmp_path)], capture_output=True,
                          input=stock.order().encode(), check=True, timeout=120)
    export = Export(**json.loads(done.stdout))
    try:
        same(export.uri, stock.image(tmp_path))
    finally:
        end_export(export, CLOCK)
    assert not export.is_running
    assert not Path(export.socket).exists()
    again = start_export(stock.order(), tmp_path, CLOCK)
    try:
        assert again.uri == export.uri
        same(again.uri, stock.image(tmp_path))
    finally:
        end_export(again, CLOCK)


def test_what_a_detached_server_serves_is_not_pruned(stock: Stock, copy: Path, tmp_path: Path) -> None:
    repository = open_repository(LocalStorage(copy), Secret(SlotKind.PASSPHRASE, PASSPHRASE))

    def prune() -> int:
        for _ in range(2):
            collect(repository, "alpha", CLOCK, fence_after_s=86400.0, max_unused=0.0, compact_below=0.0)
        return len(list(repository.storage.list("main/p/")))

    whole = prune()
    export = start_export(stock.order(path=copy), tmp_path, CLOCK)
    try:
        forget(repository.storage, plan_forget([stock.name]))
        assert prune() == whole > 0
        same(export.uri, stock.image(tmp_path))
    finally:
        end_export(export, CLOCK)
    assert list(repository.storage.list("main/s/")) == []
    assert prune() == 0


def test_a_detached_server_works_without_the_right_to_write(stock: Stock, copy: Path, tmp_path: Path) -> None:
    # The tools that were killed above have left their sessions.
    shutil.rmtree(copy / "main" / "s", ignore_errors=True)
    (copy / "main" / "s").write_bytes(b"in the way")
    export = start_export(stock.order(path=copy), tmp_path, CLOCK)
    try:
        wait_for("it is said", lambda: "no session could be registered" in export.said(), PATIENCE_S)
        same(export.uri, stock.image(tmp_path))
    finally:
        end_export(export, CLOCK)


def test_what_is_read_first_is_written_down(stock: Stock, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    order = stock.order(trace=str(trace))
    with exported(order, CLOCK) as export:
        handle = connected(export.uri)
        for at in (17, 3, 17, 20):
            handle.pread(CHUNK, at * MIB)
    assert trace.read_text(encoding="ascii").split() == ["17", "3", "20"]
    with exported(order, CLOCK) as export:
        handle = connected(export.uri)
        for at in (20, 21):
            assert handle.pread(CHUNK, at * MIB) == stock.disks["vda"][at * MIB : at * MIB + CHUNK]
    assert trace.read_text(encoding="ascii").split() == ["17", "3", "20", "21"]


# --- places -----------------------------------------------------------------------------------------


def test_a_socket_of_ones_own(stock: Stock, tmp_path: Path) -> None:
    socket = tmp_path / "disk.sock"
    with serving(stock, "web:vda", "--socket", socket) as (tool, (export,)):
        assert export["socket"] == str(socket)
        assert not socket.stat().st_mode & 0o022, "others must not connect"
        same(export["uri"], stock.image(tmp_path))
        assert TargetExists.code in refused(
            stock, "web:vda", "--socket", socket, code=TargetExists.exit_code)
        tool.send_signal(signal.SIGINT)
        assert tool.wait(PATIENCE_S) == 0
    assert not socket.exists()
    assert "2 disks" in refused(stock, "web", "--socket", socket, code=ExportFailed.exit_code)
    assert "vda, vdb" in refused(stock, "web:vdc", code=SnapshotUnknown.exit_code)
    refused(stock, "web:vda", "--socket", tmp_path / "no" / "disk.sock", code=ExportFailed.exit_code)
    refused(stock, "web:vda", "--socket", tmp_path / secrets.token_hex(60), code=ExportFailed.exit_code)


def test_a_port_needs_tls_or_a_loopback_address(stock: Stock, tmp_path: Path) -> None:
    port = str(free_port())
    for address in ([], ["--address", "0.0.0.0"], ["--address", "::"], ["--address", "localhost"]):
        refused(stock, "web:vda", "--port", port, *address, code=ExportExposed.exit_code)
    with serving(stock, "web:vda", "--port", port, "--address", "127.0.0.1") as (_, (export,)):
        assert export["uri"] == f"nbd://127.0.0.1:{port}/vda"
        same(export["uri"], stock.image(tmp_path))
        refused(stock, "web:vda", "--port", port, "--address", "127.0.0.1", code=ExportFailed.exit_code)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a CA, a server and a client, as nbdkit and nbdinfo look for them."""
    folder = tmp_path_factory.mktemp("pki")
    wishes = {"ca": "cn = test\nca\ncert_signing_key\n",
              "server": "cn = localhost\ndns_name = localhost\nip_address = 127.0.0.1\ntls_www_server\n"
                        "encryption_key\nsigning_key\n",
              "client": "cn = client\ntls_www_client\nencryption_key\nsigning_key\n"}
    authority = ["--load-ca-certificate", folder / "ca-cert.pem", "--load-ca-privkey", folder / "ca-key.pem"]
    for who, wish in wishes.items():
        (folder / f"{who}.info").write_text(f"expiration_days = 30\n{wish}", encoding="ascii")
        key = folder / f"{who}-key.pem"
        key.write_text(run("certtool", "--generate-privkey", "--key-type", "ecdsa"), encoding="ascii")
        how = ["--generate-self-signed"] if who == "ca" else ["--generate-certificate", *authority]
        run("certtool", *how, "--load-privkey", key, "--template", folder / f"{who}.info",
            "--outfile", folder / f"{who}-cert.pem")
    return folder


def test_tls_by_certificates(stock: Stock, certificates: Path, tmp_path: Path) -> None:
    serving_ = Serving(tcp=Tcp(free_port(), "127.0.0.1", certificates=str(certificates)))
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "ca-cert.pem").write_bytes((certificates / "ca-cert.pem").read_bytes())
    with exported(stock.order(), CLOCK, serving_) as export:
        assert export.uri.startswith("nbds://")
        run("nbdcopy", f"{export.uri}?tls-certificates={certificates}", tmp_path / "copied")
        run("nbdinfo", export.uri.replace("nbds:", "nbd:"), code=1)
        run("nbdinfo", f"{export.uri}?tls-certificates={stranger}", code=1)
    assert (tmp_path / "copied").read_bytes() == stock.disks["vda"]


def test_tls_by_a_shared_key(stock: Stock, tmp_path: Path) -> None:
    keys, other = tmp_path / "keys.psk", tmp_path / "other.psk"
    run("psktool", "-u", "alice", "-p", keys)
    run("psktool", "-u", "alice", "-p", other)
    words: list[str | Path] = ["web:vda", "--port", str(free_port()), "--tls-psk", keys,
                               "--address", "127.0.0.1"]
    with serving(stock, *words) as (_, (export,)):
        uri = export["uri"].replace("//", "//alice@")
        run("nbdcopy", f"{uri}?tls-psk-file={keys}", tmp_path / "copied")
        run("nbdinfo", f"{uri}?tls-psk-file={other}", code=1)
        run("nbdinfo", uri.replace("nbds:", "nbd:"), code=1)
    assert (tmp_path / "copied").read_bytes() == stock.disks["vda"]


_WATCHED = """
import os
from stillframe.restore.export_plugin import *
from stillframe.restore import export_plugin

def get_ready():
    getattr(export_plugin, "get_ready", lambda: None)()
    with __builtins__.open(os.environ["WATCHED"], "w") as file:
        file.write(str(len(os.listdir("/proc/self/task"))))
"""


def test_a_server_has_no_threads_while_nbdkit_opens_its_standard_files_anew(
    stock: Stock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A file that a thread opened meanwhile would take the place of 0 or 1, and nbdkit would not start."""
    trace, plugin, seen = (tmp_path / name for name in ("trace", "plugin.py", "seen"))
    trace.write_text("".join(f"{number}\n" for number in range(SIZE // MIB)))
    plugin.write_text(_WATCHED)
    monkeypatch.setenv("WATCHED", str(seen))
    monkeypatch.setattr("stillframe.restore.export.PLUGIN", plugin)
    with exported(stock.order(trace=str(trace)), CLOCK) as export:
        same(export.uri, stock.image(tmp_path))
    assert seen.read_text() == "1"
