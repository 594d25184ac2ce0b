"""The story: a capture of a guest becomes a snapshot in a repository."""
