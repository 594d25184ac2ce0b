"""The kinds of storage a test guest's disk can stand on, each made and taken down by the lab."""

from __future__ import annotations

import enum
import json
import os
import shutil
import signal
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

from lab import ceph
from lab.enter import SOCKETS_DIR
from lab.images import KIB, MIB, Model, make_initial, run
from lab.lvm import VolumeGroup
from lab.waiting import PATIENCE_S, wait_for


class Kind(enum.Enum):
    """What a disk stands on."""

    RAW = "raw file"
    QCOW2 = "qcow2 file"
    BLOCK = "loop block device holding raw data"
    QCOW2_BLOCK = "loop block device holding a qcow2 image"
    NBD = "raw file behind an NBD server on a unix socket"
    NBD_TCP = "raw file behind an NBD server on 127.0.0.1"
    CHAIN = "base, mid and top qcow2"
    LVM = "logical volume in the lab's volume group"
    RBD = "raw image in the pool of the lab's Ceph"
    RBD_QCOW2 = "qcow2 image in the pool of the lab's Ceph"


#: Those that need the lab's Ceph (lab/ceph.py).
ON_RBD = (Kind.RBD, Kind.RBD_QCOW2)
_ON_DEVICE = (Kind.BLOCK, Kind.QCOW2_BLOCK, Kind.LVM)
_QCOW2 = (Kind.QCOW2, Kind.QCOW2_BLOCK, Kind.CHAIN, Kind.RBD_QCOW2)
_ON_NETWORK = (Kind.NBD, Kind.NBD_TCP, *ON_RBD)


@dataclass(frozen=True, slots=True)
class DiskSpec:
    """A disk that a guest is to have.

    `qcow2_options` goes to ``qemu-img create -o`` (``cluster_size=64k,compat=0.10``), `elements` into
    the disk's XML (``<shareable/>``), `filled` puts random data into parts of it beforehand;
    `content` is a raw image to begin with instead.
    """

    target: str = "vda"
    kind: Kind = Kind.QCOW2
    size_bytes: int = 64 * MIB
    qcow2_options: str = ""
    elements: str = ""
    bus: str = "virtio"
    filled: bool = True
    content: Path | None = None


class Disk:
    """A disk's storage, made in *folder*, with a model of what it must hold."""

    def __init__(self, spec: DiskSpec, folder: Path, label: str) -> None:
        self.spec = spec
        self.folder = folder
        self.label = label
        #: Every image file, bottom first; the last one is what the guest writes to.
        self.files: list[Path] = []
        self.nbd_port = 0
        self._device: Path | None = None
        self._loop_hold = -1
        self._server: subprocess.Popen[bytes] | None = None
        self.model = Model(folder / f"{spec.target}.model")
        if spec.content:
            run("cp", "--sparse=always", spec.content, self.model.path)
        elif spec.filled:
            make_initial(self.model.path, spec.size_bytes, f"{label}-{spec.target}")
        else:
            self.model.path.touch()
            self.model.resize(spec.size_bytes)
        {Kind.RAW: self._make_raw, Kind.QCOW2: self._make_qcow2, Kind.CHAIN: self._make_chain,
         Kind.BLOCK: self._make_block, Kind.QCOW2_BLOCK: self._make_block,
         Kind.NBD: self._make_nbd, Kind.NBD_TCP: self._make_nbd,
         Kind.LVM: self._make_volume, Kind.RBD: self._make_rbd, Kind.RBD_QCOW2: self._make_rbd}[spec.kind]()

    @property
    def image_format(self) -> str:
        """Return the format name as QEMU knows it."""
        return "qcow2" if self.spec.kind in _QCOW2 else "raw"

    @property
    def path(self) -> Path:
        """Return the file or device that the guest's disk names (for NBD: the served raw file)."""
        return self._device or self.files[-1]

    @property
    def base(self) -> Path:
        """Return the lowest image of the chain."""
        return self.files[0]

    @property
    def _rbd_image(self) -> str:
        return f"{self.label}-{self.spec.target}"

    @property
    def socket_path(self) -> Path:
        """Return the NBD server's unix socket."""
        return SOCKETS_DIR / f"{self.label}-{self.spec.target}.nbd"

    @property
    def address(self) -> str:
        """Return what qemu-img reads the whole disk from: a path, or an NBD or RBD address."""
        if self.spec.kind in ON_RBD:
            return f"rbd:{ceph.POOL}/{self._rbd_image}:id={ceph.USER}"
        if self.spec.kind is Kind.NBD:
            return f"nbd+unix:///{self.spec.target}?socket={self.socket_path}"
        if self.spec.kind is Kind.NBD_TCP:
            return f"nbd://127.0.0.1:{self.nbd_port}/{self.spec.target}"
        return str(self.path)

    def opened_at(self, top: str) -> str:
        """Return what qemu-img opens the file *top* by: the image itself, or an overlay on it."""
        if self.spec.kind not in ON_RBD:
            return top
        # An overlay's header may lack the user: libvirt leaves it out.
        image = {"driver": "rbd", "pool": ceph.POOL, "image": self._rbd_image, "user": ceph.USER}
        return "json:" + json.dumps({
            "driver": "qcow2", "file": {"driver": "file", "filename": top},
            "backing": {"driver": self.image_format, "file": image}})

    def xml(self) -> str:
        """Return the libvirt element."""
        kinds = {**dict.fromkeys(_ON_DEVICE, "block"), **dict.fromkeys(_ON_NETWORK, "network")}
        kind = kinds.get(self.spec.kind, "file")
        cache = "none" if kind != "network" and _direct_works(self.folder) else "writeback"
        return (f"<disk type='{kind}' device='disk'>"
                f"<driver name='qemu' type='{self.image_format}' cache='{cache}' discard='unmap'/>"
                f"{self._source_xml()}<target dev='{self.spec.target}' bus='{self.spec.bus}'/>"
                f"{self.spec.elements}</disk>")

    def remove(self) -> None:
        """Take down what serves the disk; files go with the folder, the rest with Ceph or LVM."""
        self.stop_server()
        if self._loop_hold >= 0:
            os.close(self._loop_hold)
            self._loop_hold = -1
        self.socket_path.unlink(missing_ok=True)

    def start_server(self) -> None:
        """Start the NBD server of this disk (again), for as many clients as come."""
        where = ["--socket", str(self.socket_path)]
        if self.spec.kind is Kind.NBD_TCP:
            self.nbd_port = self.nbd_port or free_port()
            where = ["--bind", "127.0.0.1", "--port", str(self.nbd_port)]
        with (self.folder / f"{self.spec.target}.nbd.log").open("ab") as log:
            self._server = subprocess.Popen(
                ["qemu-nbd", "--persistent", "--shared=0", "--format=raw", "--discard=unmap",
                 "--cache=writeback", f"--export-name={self.spec.target}", *where, str(self.files[0])],
                stdout=log, stderr=log)
        wait_for(f"NBD server of {self.label} {self.spec.target}", self._server_answers, PATIENCE_S)
        if self.spec.kind is Kind.NBD:
            self.socket_path.chmod(0o666)

    def stop_server(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End the NBD server of this disk, if it has one."""
        if self._server is not None:
            self._server.send_signal(number)
            self._server.wait()
            self._server = None

    def _server_answers(self) -> bool:
        unix = self.spec.kind is Kind.NBD
        with socket.socket(socket.AF_UNIX if unix else socket.AF_INET) as link:
            return link.connect_ex(str(self.socket_path) if unix else ("127.0.0.1", self.nbd_port)) == 0

    def _source_xml(self) -> str:
        match self.spec.kind:
            case Kind.BLOCK | Kind.QCOW2_BLOCK | Kind.LVM:
                return f"<source dev='{self.path}'/>"
            case Kind.NBD:
                host = f"<host transport='unix' socket='{self.socket_path}'/>"
                return f"<source protocol='nbd' name='{self.spec.target}'>{host}</source>"
            case Kind.NBD_TCP:
                host = f"<host name='127.0.0.1' port='{self.nbd_port}'/>"
                return f"<source protocol='nbd' name='{self.spec.target}'>{host}</source>"
            case Kind.RBD | Kind.RBD_QCOW2:
                # Both ways to say where the cluster is.
                host = f"<config file='{ceph.SETTINGS}'/>" if self.spec.kind is Kind.RBD_QCOW2 else (
                    f"<host name='{ceph.MON_HOST}' port='{ceph.MON_PORT}'/>")
                auth = f"<auth username='{ceph.USER}'><secret type='ceph' uuid='{ceph.SECRET_UUID}'/></auth>"
                return f"<source protocol='rbd' name='{ceph.POOL}/{self._rbd_image}'>{host}{auth}</source>"
            case _:
                return f"<source file='{self.path}'/>"

    def _make_raw(self) -> None:
        self.files = [self.folder / f"{self.spec.target}.raw"]
        self.model.copy_at_moment(self.files[0])

    def _make_qcow2(self) -> None:
        self.files = [self.folder / f"{self.spec.target}.qcow2"]
        self._convert_into(self.files[0])

    def _make_chain(self) -> None:
        self.files = [self.folder / f"{self.spec.target}-{part}.qcow2" for part in ("base", "mid", "top")]
        self._convert_into(self.files[0])
        for lower, upper, pattern in zip(self.files, self.files[1:], (0x6D, 0x74), strict=False):
            options = ["-o", self.spec.qcow2_options] if self.spec.qcow2_options else []
            run("qemu-img", "create", "-q", "-f", "qcow2", *options, "-b", lower, "-F", "qcow2", upper)
            if self.spec.content:
                continue
            # Each layer hides some of the one below, so that a reader that skips a layer is caught.
            offset, length = pattern * 64 * KIB, 512 * KIB
            run("qemu-io", "-f", "qcow2", "-c", f"write -P {pattern} {offset} {length}", upper)
            run("qemu-io", "-f", "qcow2", "-c", f"write -P {pattern} {pattern * KIB} {128 * KIB}", upper)
            self.model.write(offset, bytes([pattern]) * length)
            self.model.write(pattern * KIB, bytes([pattern]) * (128 * KIB))

    def _make_block(self) -> None:
        if self.spec.kind is Kind.QCOW2_BLOCK:
            self._make_qcow2()
            os.truncate(self.files[0], 2 * self.spec.size_bytes)  # a device does not grow
        else:
            self._make_raw()
        self._device = Path(run("losetup", "--find", "--show", self.files[0]).strip())
        self._loop_hold = os.open(self._device, os.O_RDONLY)
        # Detaching a device in use marks it to go with its last user: nothing is left if the lab dies.
        run("losetup", "--detach", self._device)

    def _make_volume(self) -> None:
        self._device = VolumeGroup.make_volume(f"{self.label}-{self.spec.target}", self.spec.size_bytes)
        run("dd", f"if={self.model.path}", f"of={self._device}", "bs=1M", "conv=fsync,nocreat", "status=none")

    def _make_nbd(self) -> None:
        self._make_raw()
        self.start_server()

    def _make_rbd(self) -> None:
        self._convert_into(self.address)

    def _convert_into(self, image: str | Path) -> None:
        options = ["-o", self.spec.qcow2_options] if self.spec.qcow2_options else []
        run("qemu-img", "convert", "-f", "raw", "-O", self.image_format, *options, self.model.path, image)


def remove_folder(folder: Path) -> None:
    """Delete a guest's folder with everything in it."""
    shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _direct_works(folder: Path) -> bool:
    probe = folder / ".direct"
    try:
        os.close(os.open(probe, os.O_CREAT | os.O_WRONLY | os.O_DIRECT))
    except OSError:
        return False
    finally:
        probe.unlink(missing_ok=True)
    return True
