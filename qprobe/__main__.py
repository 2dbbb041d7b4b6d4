"""The command line, as `qprobe` and as `python -m qprobe`."""

import signal
import sys

INTERRUPTED = 130  # as of `qprobe.cli.shared`, which is not imported yet when this is needed


def main() -> None:
    """Runs the command line; Ctrl-C while it is imported, or once it is done, leaves no traceback either."""
    try:
        from qprobe.cli import main as commands

        commands(prog_name="qprobe")
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        sys.exit(INTERRUPTED)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    main()
