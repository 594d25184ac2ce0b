"""The rules of the protocol (SPEC section 5), each of which can be dropped to see what it is good for."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Look(Enum):
    """What a collector reads before it decides, one storage operation each."""

    LATEST = "latest generation"
    PACKS = "packs"
    SESSIONS = "sessions"
    MANIFESTS = "manifests"


class Reuse(Enum):
    """When a writer may refer to a slot that is there already."""

    HOME = "the pack where the slot lives in g is not condemned in g"
    ANY_HOME = "one of the packs that have the slot, by g, is not condemned in g"
    MOVED = "its birth pack is not condemned in g, or g moved the slot anywhere"
    ALWAYS = "always"


class Beneath(Enum):
    """How a writer knows that every slot beneath a tree node may be reused along with it."""

    CHECKED = "it looks at each"
    MARKED = "the parent was marked by g or committed in g: all of it may be reused unseen; else as CHECKED"
    UNKNOWN = "it checks the node alone"
    ALWAYS = "all of any parent's slots may be reused unseen"
    COMMITTED_BEFORE = "as MARKED, but the parent was committed in g or earlier"
    LISTED_LATE = "as MARKED, but marked are all that are there when g is created"

    @property
    def is_recorded(self) -> bool:
        """Do generations and manifests say what it goes by?"""
        return self not in {Beneath.CHECKED, Beneath.UNKNOWN, Beneath.ALWAYS}


class LostReply(Enum):
    """What a writer does that does not know whether its manifest was created, or still will be."""

    CLOSE = "it creates a tombstone in the manifest's place: then it knows"
    LOOK = "it looks; what is absent will never come"
    AGAIN = "it looks, and creates again what is absent"


@dataclass(frozen=True)
class Rules:
    """The defaults are the protocol."""

    reread: bool = True                     # W2
    reuse: Reuse = Reuse.HOME               # W3
    hints_listed: bool = True               # W3: a hint counts only if its pack is in a listing made after W2
    beneath: Beneath = Beneath.CHECKED      # W3
    adopted_seen: bool = True               # W4: slots of elsewhere count once the latest generation has them
    lost_reply: LostReply = LostReply.CLOSE     # W5
    own_bytes: bool = True                  # W5: who finds its place taken looks by whose manifest
    copies_end: bool = True                 # assumed: no second copy comes when session and snapshot are gone
    tombstone: bool = True                  # G0
    reload_often: bool = True               # a reader that misses reloads while there is a newer generation
    order: tuple[Look, ...] = (Look.LATEST, Look.PACKS, Look.SESSIONS, Look.MANIFESTS)
    spare_sessions: bool = True             # G4: packs of listed sessions are not condemned
    wait_for_sessions: bool = True          # G5
    condemned_until_gone: bool = True       # G5: a pack stays condemned while it is being deleted
    homes_listed: bool = True               # a moved entry whose pack is not in the listing is no home
    win_first: bool = True                  # G6 before G7
    stop_losers: bool = True                # G6: a loser deletes nothing
    still_latest: bool = True               # G6: the winner deletes only if no newer generation is there
    keep_moved: bool = True                 # entries stay while their pack exists, used or not
    drop_moved: bool = True                 # entries go with the generation that decides to delete their pack


PROTOCOL = Rules()
