"""Restoring: disks of snapshots into files and block devices."""
