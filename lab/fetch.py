"""Make the test guest's kernel and initramfs ready, outside the lab: in the lab there is no network.

    python -m lab.fetch

Quick, and offline, once they are in the lab's cache. `make demo` and `make test` run it first.
"""

from __future__ import annotations

import subprocess
import sys

from lab.enter import cache_dir, inside_lab
from lab.initramfs import Boot, boot_files


def main() -> int:
    """Fetch what is missing; return the exit code."""
    if inside_lab():
        print("lab.fetch is for outside the lab: inside there is no network", file=sys.stderr)
        return 2
    if not any(cache_dir().glob("initrd-*")):
        print("Fetching the test guest's kernel and guest agent (kept in the lab's cache)", flush=True)
    try:
        boot_files()
    except (RuntimeError, subprocess.CalledProcessError):
        _after_update()
    return 0


def _after_update() -> Boot:
    """Try once more with fresh package lists: apt has none, or they name versions that are gone."""
    print("Refreshing apt's package lists for the test guest's kernel", flush=True)
    subprocess.run(["apt-get", "update", "-qq"], check=True)
    return boot_files()


if __name__ == "__main__":
    sys.exit(main())
