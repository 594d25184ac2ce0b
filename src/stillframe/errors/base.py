"""The root of the error tree, what an error says of the guest, and exit codes of no error."""

from __future__ import annotations

import enum

#: Exit codes of commands that did what was asked.
EXIT_OK = 0
EXIT_USAGE = 2
EXIT_CRASH_CONSISTENT = 3
EXIT_FELL_BACK = 4
EXIT_PARTIAL = 5


class GuestState(enum.Enum):
    """What an error says about the guest."""

    UNTOUCHED = "The guest was not touched."
    SAFE = "The guest is safe: it runs on its own images and no overlay is left."
    OVERLAID = "The guest is safe but still uses an overlay that must not be deleted."
    STOPPED = "Nothing is lost, but the guest's CPUs are stopped."
    OFF = "The guest is off: it was ended for this. Its disks are as they were."
    RESTORING = "The guest is off, and is kept from starting until a restore in place is finished."
    UNKNOWN = "The state of the guest was not established."


class StillframeError(Exception):
    """Anything that stillframe tells a user went wrong."""

    code = "internal"
    exit_code = 1
    guest = GuestState.UNKNOWN
    retry = False

    def __init__(self, message: str, next_command: str = "", guest: GuestState | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.next_command = next_command
        if guest is not None:
            self.guest = guest

    def text(self) -> str:
        """Return the whole message: what happened, whether the guest is safe, what to do next."""
        lines = [self.message, self.guest.value]
        if self.next_command:
            lines.append(f"Next: {self.next_command}")
        lines.append(f"(error {self.code}; see docs/ERRORS.md)")
        return "\n".join(lines)
