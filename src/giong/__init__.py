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

from giong.project import Voice, init, load, run, verdict
from giong.workspace import Project

__all__ = ["Project", "Voice", "init", "load", "run", "verdict"]
__version__ = "0.1.0"
