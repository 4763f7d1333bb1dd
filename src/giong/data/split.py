"""The split into train, calibration and test: by whole documents, frozen with hashes before anything else is looked at.

Once frozen, the calibration and test sides never change: later writing goes to train, and an edited test passage is an
error and not a silent new test. Scores stay comparable only as long as the questions stay the same.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from giong.config.data import DataConfig
from giong.contracts import Passage, Side
from giong.data.cleaning import text_hash
from giong.errors import DataError
from giong.workspace import content_hash, read_json, write_json

SIDES: tuple[Side, ...] = get_args(Side)
_REDRAW = "Put it back, or delete data/split.json to draw a new split (results so far are then no longer comparable)."


@dataclass(frozen=True, slots=True)
class Split:
    """Document ids of each side, hashes of each side's passages (passage id -> hash), and how it was drawn.

    `removed` maps each passage that stands on no side to the passage it repeats: the copy on the more protected side stays.
    """

    train: list[str]
    calibration: list[str]
    test: list[str]
    passage_hashes: dict[str, dict[str, str]]
    method: str
    seed: int
    test_share: float
    calibration_share: float
    removed: dict[str, str] = field(default_factory=dict)

    def documents(self, side: Side) -> list[str]:
        return {"train": self.train, "calibration": self.calibration, "test": self.test}[side]

    def side_of(self, passage: Passage) -> Side | None:
        """The side a passage stands on; None for one that repeats another side's text or is not in the split."""
        return next((side for side in SIDES if passage.id in self.passage_hashes[side]), None)

    def passages(self, side: Side, passages: Iterable[Passage]) -> list[Passage]:
        """Those of `passages` that stand on `side`, in order."""
        return [passage for passage in passages if passage.id in self.passage_hashes[side]]


def split_documents(passages: Sequence[Passage], config: DataConfig) -> Split:
    """Draw the sides: whole documents at random up to the shares of passages, or the newest documents as the test.

    Raises DataError for fewer than three documents, and for a split by date where documents have none.
    """
    sizes = _sizes(passages)
    if len(sizes) < 3:
        known = ", ".join(sizes) or "none"
        raise DataError(
            f"{len(sizes)} document{'' if len(sizes) == 1 else 's'} with passages long enough ({known}), but a split by document needs at "
            "least 3: one to train on, one to calibrate with, one to test on",
            place="data.paths", remedy="Add documents, cut one long text into files (a chapter each), or lower data.min_words.",
        )  # fmt: skip
    order = _by_date(passages, sizes) if config.split == "date" else _shuffled(sizes, config.seed)
    fill = _newest if config.split == "date" else _greedy
    total = len(passages)
    test = fill(order, sizes, config.test_share * total, num_kept_back=2)
    rest = [document for document in order if document not in set(test)]
    calibration = fill(rest, sizes, config.calibration_share * total, num_kept_back=1)
    taken = {*test, *calibration}
    train = [document for document in sizes if document not in taken]
    sides = {"train": train, "calibration": sorted(calibration), "test": sorted(test)}
    return _with_hashes(sides, passages, config)


def freeze(split: Split, path: Path) -> None:
    """Write the split with a hash over its content."""
    content = dataclasses.asdict(split)
    write_json(path, {**content, "content_hash": content_hash(content)})


def load_split(path: Path, passages: Sequence[Passage] | None = None) -> Split:
    """Read a frozen split. With `passages`, raises DataError where any differs from what was frozen, or is new."""
    content = dict(read_json(path))
    stated = content.pop("content_hash", None)
    if stated != content_hash(content) or not {f.name for f in dataclasses.fields(Split)} <= set(content):
        raise DataError("The frozen split was changed by hand or cut short", place=str(path), remedy=_REDRAW)
    split = Split(**content)
    if passages is not None:
        _check_frozen(split, passages, SIDES, str(path))
        known = {*split.train, *split.calibration, *split.test}
        new = sorted({passage.document_id for passage in passages} - known)
        if new:
            raise DataError(
                f"{len(new)} documents are not in the frozen split (first: {new[0]})", place=str(path),
                remedy="Run `giong import` again: they are added to the training side.",
            )  # fmt: skip
    return split


def update_split(old: Split, passages: Sequence[Passage], config: DataConfig) -> Split:
    """The frozen split over newer passages: test and calibration stay, new and changed documents train.

    Raises DataError where a frozen passage changed or is gone, or where the settings ask for another split.
    """
    _check_settings(old, config)
    _check_frozen(old, passages, ("calibration", "test"), "data/split.json")
    held_out = {*old.calibration, *old.test}
    train = [document for document in _sizes(passages) if document not in held_out]
    if not train:
        raise DataError("No document is left to train on", place="data.paths", remedy="Put the training documents back.")
    return _with_hashes({"train": train, "calibration": old.calibration, "test": old.test}, passages, config)


def _sizes(passages: Iterable[Passage]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for passage in passages:
        sizes[passage.document_id] = sizes.get(passage.document_id, 0) + 1
    return sizes


def _shuffled(sizes: Mapping[str, int], seed: int) -> list[str]:
    order = sorted(sizes)
    random.Random(seed).shuffle(order)
    return order


def _by_date(passages: Sequence[Passage], sizes: Mapping[str, int]) -> list[str]:
    """Newest first. Raises DataError naming how many documents have no date."""
    dates = {passage.document_id: passage.date for passage in passages}
    undated = [document for document in sizes if not dates[document]]
    if undated:
        raise DataError(
            f"{len(undated)} of {len(sizes)} documents have no date (first: {undated[0]}), so they cannot be split by date",
            place="data.split", remedy="Give them a `date:` in the front matter or in the file name, or set data.split: document.",
        )  # fmt: skip
    return sorted(sizes, key=lambda document: (dates[document], document), reverse=True)


def _greedy(order: Sequence[str], sizes: Mapping[str, int], target: float, num_kept_back: int) -> list[str]:
    """Documents in the given order, each taken where it brings the sum nearer to `target`; at least one, never the last ones."""
    taken: list[str] = []
    total = 0
    for document in order:
        if len(taken) == len(order) - num_kept_back:
            break
        if abs(total + sizes[document] - target) < abs(total - target):
            taken.append(document)
            total += sizes[document]
    return taken or [min(order, key=lambda document: sizes[document])]


def _newest(order: Sequence[str], sizes: Mapping[str, int], target: float, num_kept_back: int) -> list[str]:
    """The first documents of the order, without a gap, as many as come nearest to `target`; at least one."""
    taken: list[str] = []
    total = 0
    for document in order[: len(order) - num_kept_back]:
        if taken and abs(total + sizes[document] - target) >= abs(total - target):
            break
        taken.append(document)
        total += sizes[document]
    return taken


def _with_hashes(sides: Mapping[str, list[str]], passages: Sequence[Passage], config: DataConfig) -> Split:
    """Hash every passage. Of texts that read alike, the test's copy stays, then the calibration's, then the first in train."""
    hashes: dict[str, dict[str, str]] = {side: {} for side in SIDES}
    first_ids: dict[str, str] = {}
    removed: dict[str, str] = {}
    for side in ("test", "calibration", "train"):
        documents = set(sides[side])
        for passage in passages:
            if passage.document_id not in documents:
                continue
            key = text_hash(passage.text)
            if key in first_ids:
                removed[passage.id] = first_ids[key]
            else:
                first_ids[key] = passage.id
                hashes[side][passage.id] = _exact_hash(passage)
    empty = next((side for side in SIDES if not hashes[side]), None)
    if empty:
        raise DataError(
            f"The {empty} side is empty: every passage of its documents repeats one of another side", place="data.paths",
            remedy="Remove the copies, or draw with another data.seed.",
        )  # fmt: skip
    return Split(
        train=list(sides["train"]), calibration=list(sides["calibration"]), test=list(sides["test"]), passage_hashes=hashes,
        method=config.split, seed=config.seed, test_share=config.test_share, calibration_share=config.calibration_share, removed=removed,
    )  # fmt: skip


def _exact_hash(passage: Passage) -> str:
    # Exact and not case-folded: a frozen passage may not change by a single byte.
    return content_hash(passage.text.encode("utf-8"))


def _check_frozen(split: Split, passages: Sequence[Passage], sides: Sequence[Side], place: str) -> None:
    now = {passage.id: passage for passage in passages}
    for side in sides:
        frozen = split.passage_hashes[side]
        changed = [key for key, value in frozen.items() if key not in now or _exact_hash(now[key]) != value]
        documents = set(split.documents(side))
        # A copy that was left out has to go on repeating its original, or it would now be a new passage of this side.
        changed += [
            copy for copy, original in split.removed.items()
            if copy in now and original in now and now[copy].document_id in documents
            and text_hash(now[copy].text) != text_hash(now[original].text)
        ]  # fmt: skip
        added = [p.id for p in passages if p.document_id in documents and p.id not in frozen and p.id not in split.removed]
        if changed or added:
            first = (changed or added)[0]
            what = "is gone" if first not in now else "was changed" if changed else "is new in a frozen document"
            raise DataError(
                f"{len(changed) + len(added)} passages of the frozen {side} side changed: {first!r} {what}", place=place, remedy=_REDRAW
            )


def _check_settings(old: Split, config: DataConfig) -> None:
    for setting, was, now in (
        ("data.split", old.method, config.split),
        ("data.seed", old.seed, config.seed),
        ("data.test_share", old.test_share, config.test_share),
        ("data.calibration_share", old.calibration_share, config.calibration_share),
    ):
        if was != now and not (setting == "data.seed" and old.method == "date"):
            raise DataError(f"The split is frozen and was drawn with {setting}: {was}, not {now}", place=setting, remedy=_REDRAW)


def describe(split: Split) -> dict[str, Any]:
    """Counts of documents and passages per side, for reports."""
    counts = {side: {"num_documents": len(split.documents(side)), "num_passages": len(split.passage_hashes[side])} for side in SIDES}
    return {**counts, "num_removed": len(split.removed), "method": split.method, "seed": split.seed}
