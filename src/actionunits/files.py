"""Write files atomically, so that an interrupted program leaves no partial one, and tell changed ones."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it is moved there on success and removed on failure."""
    part = Path(path).with_name(f".{Path(path).name}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def file_version(path: str | os.PathLike) -> tuple[str, int, int]:
    """Path, size [bytes] and time [ns] of a file or folder, to tell a change; zeros for a dead link."""
    try:
        stat = os.stat(path)
    except FileNotFoundError:
        return os.fspath(path), 0, 0
    return os.fspath(path), stat.st_size, stat.st_mtime_ns


__all__ = ["file_version", "whole_file"]
