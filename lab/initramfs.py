"""The kernel and the initial file systems of guests that boot, put together from Debian packages.

Nothing is installed on the machine: the packages are unpacked into the lab's cache, where the
finished initramfs stays for the next time, named by a hash of all that went into it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lab.enter import cache_dir
from lab.images import run

_KERNEL_META = "linux-image-cloud-amd64"
_AGENT_PACKAGE = "qemu-guest-agent"
_HERE = Path(__file__).resolve().parent
_LIBRARY = re.compile(r"(/\S+) \(0x")
_FOLDERS = ("bin", "sbin", "usr/bin", "usr/sbin", "proc", "sys", "dev", "run", "tmp", "data", "modules",
            "lib64", "var", "etc")


@dataclass(frozen=True, slots=True)
class Boot:
    """What a guest is booted with."""

    kernel: Path
    initrd: Path


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is in an initramfs besides busybox: kernel modules; scripts of lab/ and programs, by place."""

    modules: tuple[str, ...]
    scripts: tuple[tuple[str, str], ...]
    programs: tuple[tuple[str, str], ...] = ()
    with_agent: bool = False


#: The guest with a database (lab/dbguest.py).
DATABASE = Recipe(
    ("virtio_pci", "virtio_blk", "virtio_console"),
    (("guest-init.sh", "init"), ("guest-shutdown.sh", "sbin/shutdown")),
    (("sqlite3", "usr/bin/sqlite3"),), with_agent=True)
#: The machine that runs this one's files (lab/machine.py).
MACHINE = Recipe(("virtio_pci", "virtiofs", "overlay", "dm-mod", "loop"), (("machine-init.sh", "init"),))


def boot_files(recipe: Recipe = DATABASE) -> Boot:
    """Return kernel and initramfs, made now if the cache has none. Needs apt only the first time."""
    packages = _packages()
    _index_modules(packages)
    kernel = next((packages / "boot").glob("vmlinuz-*"))
    scripts = [*(_HERE / script for script, _ in recipe.scripts), Path(__file__)]
    digest = hashlib.sha256(kernel.name.encode() + b"".join(script.read_bytes() for script in scripts))
    initrd = cache_dir() / f"initrd-{digest.hexdigest()[:16]}.cpio"
    if not initrd.exists():
        with tempfile.TemporaryDirectory(dir=cache_dir()) as staging:
            part = _build(recipe, packages, Path(staging))
            part.rename(initrd)
    return Boot(kernel, initrd)


def _packages() -> Path:
    """Return the folder with the unpacked kernel and guest agent."""
    unpacked = cache_dir() / "packages"
    if unpacked.is_dir():
        return unpacked
    with tempfile.TemporaryDirectory(dir=cache_dir()) as place:
        folder = Path(place)
        depends = run("apt-cache", "depends", _KERNEL_META)
        kernel = re.search(r"Depends: (linux-image-\S+)", depends)
        if kernel is None:
            raise RuntimeError(f"apt knows no {_KERNEL_META}: run `apt-get update`")
        subprocess.run(["apt-get", "download", "-q", kernel[1], _AGENT_PACKAGE], cwd=folder, check=True,
                       capture_output=True)
        for package in folder.glob("*.deb"):
            run("dpkg-deb", "-x", package, folder / "unpacked")
        (folder / "unpacked").rename(unpacked)
    return unpacked


def _index_modules(packages: Path) -> None:
    """Write down where each kernel module is: in libguestfs's appliance, modprobe looks there."""
    version_dir = next((packages / "lib/modules").iterdir())
    if not (version_dir / "modules.dep").exists():
        run(_found("depmod"), "-b", packages, version_dir.name)


def _build(recipe: Recipe, packages: Path, staging: Path) -> Path:
    root = staging / "root"
    for name in _FOLDERS:
        (root / name).mkdir(parents=True)
    (root / "var/run").symlink_to("/run")
    programs = [(_found(name), place) for name, place in (("busybox", "bin/busybox"), *recipe.programs)]
    if recipe.with_agent:
        programs.append((packages / "usr/sbin/qemu-ga", "usr/sbin/qemu-ga"))
    for program, place in programs:
        shutil.copy(program, root / place)
        _copy_libraries(program, root)
    for script, place in recipe.scripts:
        shutil.copy(_HERE / script, root / place)
        (root / place).chmod(0o755)
    for number, module in enumerate(_in_load_order(packages, recipe.modules)):
        shutil.copy(module, root / "modules" / f"{number:02d}-{module.name}")
    names = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
    archive = staging / "initrd.cpio"  # not packed: to unpack it would take an emulated guest longer
    with archive.open("wb") as out:
        subprocess.run(["cpio", "--create", "--format=newc", "--quiet", "--owner=0:0"], cwd=root,
                       input=names.encode(), stdout=out, check=True)
    return archive


def _found(program: str) -> Path:
    path = shutil.which(program, path=os.defpath + ":/usr/sbin:/sbin")
    if path is None:
        raise RuntimeError(f"{program} is not installed (apt-get install busybox-static sqlite3)")
    return Path(path)


def _copy_libraries(program: Path, root: Path) -> None:
    for library in _LIBRARY.findall(_ldd(program)):
        place = root / library.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, place)


def _ldd(program: Path) -> str:
    # A static program (Debian's busybox-static) makes it end with 1.
    return subprocess.run(["ldd", program], capture_output=True, text=True, check=False).stdout


def _in_load_order(packages: Path, modules: tuple[str, ...]) -> list[Path]:
    """Return the files of *modules*, each behind what it depends on."""
    version_dir = next((packages / "lib/modules").iterdir())
    listing = run("busybox", "depmod", "-n", "-b", packages, version_dir.name)
    needs: dict[str, list[str]] = {}
    for line in listing.splitlines():
        if line.startswith(("alias", "symbols", "#")) or ":" not in line:
            continue
        module, _, rest = line.partition(":")
        needs[_module_name(module)] = [_module_name(part) for part in rest.split()]
    files = {_module_name(path.name): path for path in version_dir.rglob("*.ko")}
    ordered: list[str] = []

    def visit(name: str) -> None:
        for needed in needs.get(name, []):
            visit(needed)
        if name not in ordered:
            ordered.append(name)

    for name in modules:
        visit(name)
    return [files[name] for name in ordered]


def _module_name(path: str) -> str:
    return Path(path).name.removesuffix(".ko")
