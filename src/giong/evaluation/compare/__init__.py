"""Blind comparison: people judge pairs of recorded answers to the same request and do not know who wrote which.

Nothing is generated: the answers are those that the evaluation measured. Votes lie in the project's `votes.jsonl`, each with the
texts that were shown, so that a vote keeps its meaning when the answers are replaced later.
"""

from __future__ import annotations

from giong.evaluation.compare.export import Exported, export_preferences
from giong.evaluation.compare.results import Results, vote_results
from giong.evaluation.compare.session import Comparison
from giong.evaluation.compare.votes import Vote, read_votes

__all__ = ["Comparison", "Exported", "Results", "Vote", "export_preferences", "read_votes", "vote_results"]
