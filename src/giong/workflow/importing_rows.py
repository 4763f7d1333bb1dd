"""Step `import` of the tasks that judge texts: rows of tables become passages, split and frozen as a writer's, and what belongs to each
is kept beside them. Nothing here needs torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from giong.data.importers.report import ImportReport
from giong.data.labelled import Labelled
from giong.data.paired import Paired
from giong.workflow.story import Stage, Story
from giong.workflow.writing import freeze_split, source_paths
from giong.workspace import content_hash, write_json, write_jsonl

Rows = TypeVar("Rows", Labelled, Paired)


def import_rows(
    story: Story, settings: Mapping[str, Any], read: Callable[[Sequence[Path]], tuple[Rows, ImportReport]], beside: Path,
    kept_beside: Callable[[Rows], Any], look: Callable[[Rows], tuple[Mapping[str, Any], str]],
) -> None:  # fmt: skip
    """Read the rows of `data.paths`, split them by document, freeze the test side; found done where files and `settings` are the same.

    `kept_beside` is written to the file `beside`; then `look`, which may raise, gives further results and a sentence (or none).
    """
    project, paths = story.project, source_paths(story)
    key = content_hash(story.config.data, settings, *paths)
    if story.is_current("import", key) and all(path.is_file() for path in paths):
        return
    with Stage(story, "import", f"{len(paths)} files") as stage:
        found, report = read(paths)
        write_json(project.data / "import_report.json", {"files": report.to_dict()})
        split = freeze_split(story, found.passages)
        kept = [passage for passage in found.passages if split.side_of(passage)]
        write_jsonl(project.passages_path, kept)
        write_json(beside, kept_beside(found))
        details, sentence = look(found)
    dropped = report.with_status("dropped")
    sides = {side: len(split.passages(side, kept)) for side in ("train", "calibration", "test")}
    project.finish_step(
        "import", key, [project.passages_path, project.split_path, beside],
        {"num_passages": len(kept), "sides": sides, "dropped": len(dropped), "seconds": stage.seconds, **details},
    )  # fmt: skip
    story.notice("import", f"{len(kept)} rows ({', '.join(f'{count} {side}' for side, count in sides.items())})")
    if dropped:
        story.notice(
            "import", f"{len(dropped)} rows were left out, first {dropped[0].place}: {dropped[0].reason} (all in data/import_report.json)"
        )
    if split.removed:
        story.notice("import", f"{len(split.removed)} texts that repeat another one were left out")
    if sentence:
        story.notice("import", sentence)
