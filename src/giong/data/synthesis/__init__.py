"""Reverse synthesis: the author's text is the answer and stays as it is; a teacher writes the request that led to it."""

from giong.data.synthesis.kinds import KINDS, Kind
from giong.data.synthesis.leak import leaks, longest_shared_run
from giong.data.synthesis.recorded import Recorded
from giong.data.synthesis.report import LeftOut, SynthesisReport
from giong.data.synthesis.run import Teacher, make_teacher, synthesise
from giong.data.synthesis.stand_in import StandIn

__all__ = [
    "KINDS", "Kind", "LeftOut", "Recorded", "StandIn", "SynthesisReport", "Teacher", "leaks", "longest_shared_run", "make_teacher",
    "synthesise",
]  # fmt: skip
