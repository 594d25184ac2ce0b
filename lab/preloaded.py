"""What `lab.forked` has imported before it forks: the whole product. No thread is started by that."""

from __future__ import annotations

import contextlib
import importlib
import pkgutil

import stillframe

for _module in pkgutil.walk_packages(stillframe.__path__, "stillframe."):
    if not _module.name.endswith("__main__"):
        # nbdkit's plugin is imported by nbdkit only, libguestfs's side by the distribution's own Python.
        with contextlib.suppress(ImportError):
            importlib.import_module(_module.name)
