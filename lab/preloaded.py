"""What `lab.forked` has imported before it forks: the product, but for the clients of far storage."""

from __future__ import annotations

import contextlib
import importlib
import pkgutil

import stillframe

#: Each is imported by few commands, and starts threads or takes longer than all the rest.
_NOT = ("stillframe.storage.s3", "stillframe.storage.sftp", "stillframe.storage.smb")

for _module in pkgutil.walk_packages(stillframe.__path__, "stillframe."):
    if not _module.name.endswith("__main__") and _module.name not in _NOT:
        # nbdkit's plugin is imported by nbdkit only, libguestfs's side by the distribution's own Python.
        with contextlib.suppress(ImportError):
            importlib.import_module(_module.name)
