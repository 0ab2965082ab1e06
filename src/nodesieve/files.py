"""Files and directories that are whole or not there, and directories in which one process is at work."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nodesieve.errors import UserError

LOCK = ".lock"  # in a directory, while a process is at work there


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A scratch path beside `path`, for a file or a directory, moved over it when the block ends well, removed when it does not."""
    scratch = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        yield scratch
        scratch.replace(path)
    finally:
        if scratch.is_dir():
            shutil.rmtree(scratch, ignore_errors=True)
        else:
            scratch.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Whole or not at all, like `write_text`; NaN is an error."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    with replacing(path) as scratch:
        scratch.write_text(text, "utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """
    Raises:
        UserError: there is no such file, or something else in it than a JSON object.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"expected a file {str(path)!r}, could not read it: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"expected JSON in {str(path)!r}, got {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"expected a JSON object in {str(path)!r}, got {type(content).__name__}")
    return content


@contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """No other process that asks for it is at work in `directory`, which is made if need be, and removed in the end if it was and holds nothing.

    Raises:
        UserError: another process is, or the directory cannot be made or written.
    """
    made, lock = absent(directory), FileLock(directory / LOCK)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with suppress(NotImplementedError):  # a file system without locks
            lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"expected a directory in which no run is under way, one is in {str(directory)!r}; wait for it, or choose another") from None
    except OSError as error:
        raise UserError(f"expected a directory that can be written, got {str(directory)!r}: {error.strerror}") from error
    try:
        yield
    finally:
        if lock.is_locked:
            (directory / LOCK).unlink(missing_ok=True)
            lock.release()
        remove_empty(made)


def absent(directory: Path) -> list[Path]:
    """Of a directory and those that it lies in, those that are to be made, the innermost first."""
    return [path for path in (directory, *directory.parents) if not path.exists()]


def remove_empty(directories: Iterable[Path]) -> None:
    """One after another, as long as nothing is in them."""
    with suppress(OSError):
        for directory in directories:
            directory.rmdir()
