"""The report of a task other than writing: verdict, arms with intervals, data and settings on one page."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from giong.workspace import atomic_write


def write_task_report(
    path: Path, project: str, evaluation: Mapping[str, Any], data: Mapping[str, Any], run: Mapping[str, Any], results: Mapping[str, Any]
) -> None:
    """Render the page to `path`, atomically. Every text in it is escaped. Raises ResourceError where it cannot be written."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    header, *rows = evaluation["table"]
    settings = {"method": run["settings"]["method"]["name"], **run["settings"]["method"], **run["settings"]["train"]}
    page = environment.get_template("task.html").render(
        project=project, date=datetime.date.today().isoformat(), evaluation=evaluation, header=header, rows=rows, data=data,
        run=run, results=results, settings={**settings, "dtype": run["settings"]["dtype"], "max_seq_length": run["settings"]["max_seq_length"]},
    )  # fmt: skip
    with atomic_write(path, "w") as stream:
        stream.write(page)
