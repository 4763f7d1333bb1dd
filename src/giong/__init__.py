"""giong: make a language model write like you, and know in numbers whether that is worth it.

Layers, top to bottom: cli, server > jobs | worker > workflow > evaluation, baselines | engine, export, serving >
providers | methods, objectives, generation > data, sizing, samples | models > config, workspace, clients > contracts, errors.

    import giong

    project = giong.init("myvoice", sources=["~/writing"], model="giong-tiny")
    giong.run(project)
    print(giong.verdict(project))
    voice = giong.load(project)
    print(voice.write("Dear customer, we hereby inform you that the office will be closed on Friday."))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from giong.journal import Journal
    from giong.project import compare, compare_methods, compare_objectives, init, run, sweep, verdict
    from giong.voice import Voice, load
    from giong.workspace import Project

__all__ = ["Journal", "Project", "Voice", "compare", "compare_methods", "compare_objectives", "init", "load", "run", "sweep", "verdict"]
__version__ = "0.1.0"

_HOMES = {
    "Journal": "journal",
    "Project": "workspace",
    "Voice": "voice",
    "compare": "project",
    "load": "voice",
    "compare_methods": "project",
    "compare_objectives": "project",
    "init": "project",
    "run": "project",
    "sweep": "project",
    "verdict": "project",
}


def __getattr__(name: str) -> Any:
    # Only who asks for a name pays for its imports: torch costs seconds, and the command line must be able to catch Ctrl-C.
    if name in _HOMES:
        return getattr(import_module(f"giong.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'giong' has no attribute {name!r}")
