"""Where snapshots live: deduplicated, encrypted, verifiable, safe with many writers."""
