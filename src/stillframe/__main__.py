"""`python -m stillframe`, and the `stillframe` command."""

import signal


def main() -> None:
    """Run the command. Ctrl-C while the program is still being loaded ends it without a traceback."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    from stillframe.cli.main import main as run  # half a second: that is what is guarded

    signal.signal(signal.SIGINT, before)
    run()


if __name__ == "__main__":
    main()
