"""What runs the guests: libvirt and, through it, QEMU. Looks are facts, acts are single steps."""
