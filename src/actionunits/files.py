"""Write files atomically, so that an interrupted program leaves no partial one."""

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


__all__ = ["whole_file"]
