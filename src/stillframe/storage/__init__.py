"""Where a repository's objects lie: a few verbs, a driver for each kind of storage, wrappers around them."""
