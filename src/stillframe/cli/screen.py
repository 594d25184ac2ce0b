"""What a person sees: results on stdout, progress and messages on stderr, JSON when asked for."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import msgspec
from rich.console import Console

from stillframe.errors import StillframeError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from stillframe.capture.stepping import CommitProgress, Watcher
    from stillframe.mirror.update import CopyProgress


class _Unbreakable(Console):
    """A console that goes silent when nobody reads it any more: a run must end well all the same."""

    def on_broken_pipe(self) -> None:
        """Go silent, where rich would end the process."""
        self.quiet = True


class Screen:
    """Where the output of a command goes. No method raises for an output that is gone.

    *as_json*: one JSON object on stdout at the end, nothing else there. *quiet*: nothing on
    stderr but errors. A progress bar is drawn only if stderr is a terminal.
    """

    def __init__(self, *, as_json: bool, quiet: bool) -> None:
        self.as_json = as_json
        self._quiet = quiet
        self._err = _Unbreakable(stderr=True, highlight=False, soft_wrap=True)
        self._bars: dict[str, TaskID] = {}
        watched = not quiet and not as_json and sys.stderr.isatty()
        self._progress = _make_progress(self._err) if watched else None

    def start(self) -> None:
        """Begin to draw progress bars, if somebody watches."""
        if self._progress is not None:
            with contextlib.suppress(OSError, ValueError):
                self._progress.start()

    def close(self) -> None:
        """Take the progress bars away."""
        if self._progress is not None:
            with contextlib.suppress(OSError, ValueError):
                self._progress.stop()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Draw no progress bars within the block, where a person types."""
        self.close()
        try:
            yield
        finally:
            self.start()

    def say(self, text: str) -> None:
        """Tell the person what is being done."""
        if not self._quiet:
            self._print(text)

    def warn(self, text: str) -> None:
        """Tell the person something they should know, also when quiet."""
        self._print(f"warning: {text}")

    def error(self, error: StillframeError, subject: str = "") -> None:
        """Show an error: what happened, whether the guest is safe, what to do next."""
        self._print(f"{subject}: {error.text()}" if subject else error.text())

    def result(self, text: str) -> None:
        """Print a line of the result, for people."""
        if not self.as_json:
            _to_stdout(text)

    def json(self, body: object) -> None:
        """Print the whole result, for programs."""
        if self.as_json:
            _to_stdout(msgspec.json.format(msgspec.json.encode(body), indent=2).decode())

    def watcher(self) -> Watcher:
        """Return who is told what a run does."""
        from stillframe.capture.stepping import Watcher

        return Watcher(say=self.say, commit=self._on_commit)

    def on_copy(self, guest: str) -> Callable[[CopyProgress], None]:
        """Return who is told how far the copies of *guest* are."""
        return lambda progress: self.bar(
            f"{guest} {progress.target}: copy", progress.done_bytes, progress.total_bytes
        )

    def bar(self, name: str, done_bytes: int, total_bytes: int | None) -> None:
        """Draw how far the work called *name* is; of how much may not be known."""
        if self._progress is None:
            return
        with contextlib.suppress(OSError, ValueError):
            if name not in self._bars:
                self._bars[name] = self._progress.add_task(name, total=total_bytes)
            self._progress.update(self._bars[name], completed=done_bytes, total=total_bytes)

    def _print(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._err.print(text, markup=False)

    def _on_commit(self, progress: CommitProgress) -> None:
        self.bar("commit", progress.done_bytes, progress.total_bytes)


def _make_progress(console: Console) -> Progress:
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    return Progress(
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True),
        TransferSpeedColumn(), TimeRemainingColumn(), console=console,
        # rich would send results to the bars' stream; that is right only where both are one terminal.
        redirect_stdout=sys.stdout.isatty(),
    )


def _to_stdout(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(text, flush=True)


def error_body(error: StillframeError) -> dict[str, object]:
    """Return *error* for JSON."""
    return {
        "code": error.code, "exit_code": error.exit_code, "message": error.message,
        "guest": error.guest.name.lower(), "next_command": error.next_command, "retry": error.retry,
    }
