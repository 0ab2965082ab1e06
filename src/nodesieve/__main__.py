"""`nodesieve` and `python -m nodesieve`: the command line, which Ctrl-C (and SIGTERM) ends in one line from its first import on."""

from __future__ import annotations

import signal

from nodesieve.errors import STOPS, end_stopped


def main() -> None:
    """Entry point of `nodesieve`."""
    stopped: list[int] = []

    def stop(signum: int, frame: object) -> None:
        stopped.append(signum)
        raise KeyboardInterrupt

    for number in STOPS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as SIGINT is in the background of a shell
            signal.signal(number, stop)
    try:
        from nodesieve.cli import main as command_line
    except BaseException:
        if not stopped:
            raise
        end_stopped()
    command_line(stopped)


if __name__ == "__main__":
    main()
