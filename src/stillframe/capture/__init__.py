"""Getting all disks of a domain at one moment, and bringing the guest back whatever happens."""
