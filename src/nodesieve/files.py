"""Files and directories that are whole or not there."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
