"""The entry point, which imports the commands when an interrupt can no longer show a traceback of that."""

import signal


def main() -> None:
    """Run the command line.

    While the commands are imported, Ctrl-C just ends the process: nothing has begun. A command that does anything sets
    a handler of its own.
    """
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from moemerge.cli.app import main as run

    run()
