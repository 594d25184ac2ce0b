"""Images that QEMU can open: where they are, what they are made of, and how to read them."""
