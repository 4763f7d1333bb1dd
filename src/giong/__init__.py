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

from typing import TYPE_CHECKING, Any

from giong.project import init, run, verdict
from giong.workspace import Project

if TYPE_CHECKING:
    from giong.voice import Voice, load

__all__ = ["Project", "Voice", "init", "load", "run", "verdict"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Loading a model needs torch, which costs seconds: only who asks for it pays.
    if name in ("Voice", "load"):
        from giong import voice

        return getattr(voice, name)
    raise AttributeError(f"module 'giong' has no attribute {name!r}")
