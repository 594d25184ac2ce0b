"""`stillframe config check`: all that is wrong with the configuration file, by line."""

from __future__ import annotations

from dataclasses import asdict

from stillframe.cli.session import Session
from stillframe.config import read_file
from stillframe.config.check import all_problems
from stillframe.errors import EXIT_OK, ConfigInvalid, StillframeError
from stillframe.hypervisor.connection import Connection
from stillframe.hypervisor.domain import all_domains


def check(session: Session) -> int:
    """Say what is wrong with the file; return the exit code: ConfigInvalid's if there is an error in it."""
    path = session.settings_file

    def guests_of(uri: str) -> list[str] | None:
        try:
            return [domain.name for domain in all_domains(Connection(uri, session.clock))]
        except StillframeError as error:
            session.screen.say(f"the guests' names are not looked at: {error.message}")
            return None

    problems = all_problems(read_file(path), guests_of)
    errors = sum(not problem.is_warning for problem in problems)
    for problem in problems:
        session.screen.result(f"{path}:{problem.text}")
    session.screen.result(
        f"{path}: {errors} errors, {len(problems) - errors} warnings" if problems else f"{path}: all is well")
    session.screen.json({
        "file": str(path), "valid": not errors, "problems": [asdict(problem) for problem in problems]})
    return ConfigInvalid.exit_code if errors else EXIT_OK
