"""Creating an object whose content nobody else can have made: sealed, or with random numbers in it.

Something between here and a server may carry out a request twice (a proxy that tries again). The reply is
then that of the second one: the key is taken, by our own bytes. So what can only be ours is no conflict.
The same goes for whatever is tried again because the first reply was lost (Retried).
"""

from __future__ import annotations

from stillframe.errors import ObjectExists, ObjectMissing, ObjectTruncated
from stillframe.storage.model import Content, Storage


def create_own(storage: Storage, key: str, content: Content) -> None:
    """Create an object as `Storage.create` does; one that is there with these very bytes was created by us.

    Not for content that another could have written as well: two would believe to have made it.
    """
    try:
        storage.create(key, content)
    except ObjectExists:
        if not holds(storage, key, content):
            raise


def holds(storage: Storage, key: str, content: Content) -> bool:
    """Return whether the object has this content. One that is gone again has not. Raises StorageLost."""
    try:
        return storage.get(key) == content
    except (ObjectMissing, ObjectTruncated):
        return False
