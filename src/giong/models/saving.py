"""Saving tensors: what the operating system refused comes out as an OSError, as from every other write.

safetensors writes in Rust and reports a full disk as an error of its own, which nothing else in giong would recognise.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def system_errors() -> Iterator[None]:
    """Around a save: raises OSError with the system's own number where a SafetensorError carries one."""
    try:
        yield
    except SafetensorError as error:
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            number = int(found[1])
            raise OSError(number, os.strerror(number)) from error
        raise


def folder_bytes(folder: Path) -> int:
    """What was saved there, in bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
