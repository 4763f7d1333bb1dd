"""Options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ProjectOption = Annotated[
    Path | None, typer.Option("--project", "-p", help="Project folder; by default the one you are in.", show_default=False)
]
NumProcessesOption = Annotated[
    int | None,
    typer.Option("--num-processes", min=1, help="Processes that share each training step.", show_default="train.num_processes, or 1"),
]
ForceOption = Annotated[bool, typer.Option("--force", help="Do it again even if nothing changed.")]
