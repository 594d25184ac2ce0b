"""Writing past the kernel's page cache (O_DIRECT), where a file system can.

What a backup or a restore writes is not read again soon. In the page cache it would push out what the guests
of the host need, and the kernel would first have to find and fill pages for it: a fifth of a backup's
processor time and two thirds of a restore's, on a virtual machine whose host takes unused memory back.

The kernel wants memory, place and length aligned; what is not goes the usual way, and so does
everything on a file system without direct writing. Both ways may be mixed in one file.
"""

from __future__ import annotations

import errno
import mmap
import os

#: What block devices and file systems ask for at most (the page; devices have 512 or 4096).
ALIGNED_BYTES = 4096
#: Smaller writes are cheaper through the cache: one that is direct waits for the disk.
_WORTH_BYTES = 1024 * 1024
_CANNOT = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)


def aligned_buffer(length_bytes: int) -> mmap.mmap:
    """Return zeroed memory of its own that begins at a page, and can be made larger.

    Private, since the kernel does not give shared memory more pages when it is: what lies behind kills with
    SIGBUS whoever touches it.
    """
    return mmap.mmap(-1, length_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def open_direct(fd: int) -> int | None:
    """Return a second descriptor of the file open as *fd* that writes past the cache, None where none can.

    The caller closes it. Locks that QEMU knows (OFD) stay with *fd* whatever becomes of this one.
    """
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError:
        return None  # tmpfs, FUSE and others refuse; if it is more than that, the usual way will tell


def write_at(fd: int, direct: int | None, content: memoryview, offset_bytes: int) -> None:
    """Write all of *content*, as much of it past the cache as is aligned. Raises OSError."""
    done = 0
    if direct is not None and offset_bytes % ALIGNED_BYTES == 0:
        done = _direct(direct, content[: len(content) // ALIGNED_BYTES * ALIGNED_BYTES], offset_bytes)
    while done < len(content):
        done += os.pwrite(fd, content[done:], offset_bytes + done)


def write_new(fd: int, content: memoryview) -> None:
    """Write the whole content of an empty file. Raises OSError."""
    direct = open_direct(fd) if len(content) >= _WORTH_BYTES else None
    try:
        write_at(fd, direct, content, 0)
    finally:
        if direct is not None:
            os.close(direct)


def _direct(fd: int, content: memoryview, offset: int) -> int:
    """Write as much as the kernel takes directly; return how much that was."""
    done = 0
    while done < len(content) and done % ALIGNED_BYTES == 0:
        try:
            done += os.pwrite(fd, content[done:], offset + done)
        except OSError as error:
            if error.errno not in _CANNOT:
                raise
            break  # the memory is not aligned, or the file system found out only now
    return done
