"""Tokenised text on disk, found again by content: a second run or a larger pilot tokenises only what is new.

    FOLDER/IDENTITY/part-KEY/   index.json (keys of the texts, rows per text)  lengths.npy  input_ids.npy  weights.npy

Keyed by text and not by the hash of the whole set, because pilots are nested: the largest would otherwise tokenise again
what the smaller ones did. The arrays are memory-mapped. The folder can be deleted at any time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from giong.errors import DataError
from giong.workspace import atomic_folder, content_hash, read_json, remove_folder, write_json

Parts = list[tuple[np.ndarray, np.ndarray]]
"""What a text became: (token ids, loss weights) of each of its rows; none when it is too long."""


class RowCache:
    """Tokenised texts below a folder. One process works there at a time, as in the rest of a project."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, identity: str, keys: Sequence[str], make: Callable[[list[int]], list[Parts]]) -> list[Parts]:
        """The rows of each key. `make` is asked for those that are not on disk (by their numbers), which then are."""
        folder = self.folder / identity
        found = _read_all(folder)
        first_of: dict[str, int] = {}
        for number, key in enumerate(keys):
            if key not in found:
                first_of.setdefault(key, number)
        missing = list(first_of.values())
        if missing:
            part = folder / f"part-{content_hash(list(first_of))}"
            _write(part, list(first_of), make(missing))
            found |= _read(part)
        return [found[key] for key in keys]


def _read_all(folder: Path) -> dict[str, Parts]:
    found: dict[str, Parts] = {}
    for path in sorted(folder.glob("part-*")):
        try:
            found |= _read(path)
        except (DataError, KeyError, ValueError, OSError):
            # Whatever is wrong with it, the text is still there and can be tokenised again.
            remove_folder(path)
    return found


def _read(path: Path) -> dict[str, Parts]:
    index = read_json(path / "index.json")
    ends = np.cumsum(np.load(path / "lengths.npy"))
    arrays = [np.load(path / f"{name}.npy", mmap_mode="r") if len(ends) else np.empty(0) for name in ("input_ids", "weights")]
    # Plain views: slicing a memmap object itself is many times slower.
    input_ids, weights = (np.asarray(array) for array in arrays)
    num_tokens = int(ends[-1]) if len(ends) else 0
    if len(input_ids) != num_tokens or len(weights) != num_tokens or sum(index["num_rows"]) != len(ends):
        raise ValueError(f"{path} is not whole")
    spans = itertools.pairwise([0, *ends.tolist()])
    return {
        key: [(input_ids[start:end], weights[start:end]) for start, end in itertools.islice(spans, num_rows)]
        for key, num_rows in zip(index["keys"], index["num_rows"], strict=True)
    }


def _write(path: Path, keys: Sequence[str], made: Sequence[Parts]) -> None:
    rows = list(itertools.chain.from_iterable(made))
    empty = (np.empty(0, np.int32), np.empty(0, np.float32))
    with atomic_folder(path) as folder:
        np.save(folder / "lengths.npy", np.array([len(ids) for ids, _ in rows], dtype=np.int64))
        np.save(folder / "input_ids.npy", np.concatenate([empty[0], *(ids for ids, _ in rows)]).astype(np.int32))
        np.save(folder / "weights.npy", np.concatenate([empty[1], *(weights for _, weights in rows)]).astype(np.float32))
        write_json(folder / "index.json", {"keys": list(keys), "num_rows": [len(parts) for parts in made]})
