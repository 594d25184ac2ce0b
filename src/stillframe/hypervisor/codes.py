"""The numbers of libvirt's errors that decide what is done next. Their texts are localised, these are not."""

from __future__ import annotations

import libvirt

#: Another call holds the domain, and did not let go of it in time (30 s).
TIMED_OUT: int = libvirt.VIR_ERR_OPERATION_TIMEOUT
#: Something in libvirt itself is not as it should be: for a job, "backup job data missing".
INTERNAL: int = libvirt.VIR_ERR_INTERNAL_ERROR
