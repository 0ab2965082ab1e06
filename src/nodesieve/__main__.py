"""`nodesieve` and `python -m nodesieve`: the command line, which Ctrl-C ends in one line from its first import on."""

from __future__ import annotations

import signal

from nodesieve.errors import end_stopped


def main() -> None:
    """Entry point of `nodesieve`."""
    stopped: list[int] = []

    def stop(signum: int, frame: object) -> None:
        stopped.append(signum)
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored, as in the background of a shell
        signal.signal(signal.SIGINT, stop)
    try:
        from nodesieve.cli import main as command_line
    except BaseException:
        if not stopped:
            raise
        end_stopped()
    command_line(stopped)


if __name__ == "__main__":
    main()
