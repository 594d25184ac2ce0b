"""stillframe: live and safe backup of running libvirt/QEMU guests."""

__version__ = "0.1.0"
