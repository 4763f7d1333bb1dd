"""What people's votes and a judge's verdicts came to, as rows for the page and the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from giong.evaluation.report.table import NOT_AVAILABLE, arm_label, number, share, share_interval


def vote_tables(votes: Mapping[str, Any]) -> dict[str, Any]:
    """`tables` (title, header, rows) and `sentences` from `Results.to_dict()`; both empty without votes."""
    if not votes:
        return {"tables": [], "sentences": []}
    labels = votes["labels"]

    def label(arm: str) -> str:
        return "all arms" if arm == "all" else arm_label({"name": arm, "label": labels.get(arm, "")})

    tables = [
        {
            "title": "Which answer is better", "header": ["arm", "against", "votes", "won", "lost", "no difference", "win rate [95% interval]"],
            "rows": [
                [label(row["arms"][0]), label(row["arms"][1]), *_counts(row, "votes", "wins", "losses", "ties"), share_interval(row["win_rate"])]
                for row in votes["pairs"]
            ],
        },
        {
            "title": "Strength (Bradley-Terry)", "header": ["arm", "wins against one of the others [95% interval]", "log-odds"],
            "rows": [[label(row["arm"]), share_interval(row["win_probability"]), f"{row['theta']:+.2f}"] for row in votes["strengths"]],
        },
        {
            "title": "Was the author recognised", "header": ["beside", "votes", "right", "wrong", "cannot tell", "rate [95% interval]", "chance is 50%"],
            "rows": [
                [label(row["arm"]), *_counts(row, "votes", "right", "wrong", "unsure"), share_interval(row["rate"]), _against_chance(row["rate"])]
                for row in votes["detections"]
            ],
        },
        {
            "title": "Agreement of raters", "header": ["rater", "and", "pairs in common", "agree", "Cohen's kappa"],
            "rows": [
                [*row["raters"], str(row["num_common"]), share(row["agreement"]), number(row["kappa"])] for row in votes["rater_pairs"]
            ],
        },
    ]  # fmt: skip
    return {"tables": [table for table in tables if table["rows"]], "sentences": _sentences(votes)}


def judge_tables(judged: Mapping[str, Any]) -> dict[str, Any]:
    """`tables` and `sentences` from `Judgement.to_dict()`; of a judge that did not pass its self-test the sentences alone."""
    if not judged:
        return {"tables": [], "sentences": []}

    def label(arm: str) -> str:
        return arm_label({"name": arm, "label": judged["labels"].get(arm, "")})

    tables = [
        {
            "title": "Which answer is more like the author", "header": ["arm", "against", "pairs", "ties", "win rate [95% interval]", "at equal length [95% interval]"],
            "rows": [
                [
                    *map(label, row["arms"]), str(row["num_judged"]), str(row["num_ties"]), share_interval(row["win_rate"]),
                    share_interval(row["at_equal_length"]),
                ]
                for row in judged["pairs"]
            ],
        },
        {
            "title": "Strength before the judge (Bradley-Terry)", "header": ["arm", "wins against one of the others [95% interval]", "log-odds"],
            "rows": [[label(row["arm"]), share_interval(row["win_probability"]), f"{row['theta']:+.2f}"] for row in judged["strengths"]],
        },
    ]  # fmt: skip
    found = [f"Self-test: the author's text against its own words shuffled is won in {share_interval(judged['self_test'])}."]
    if judged["passed"]:
        first = share(judged["first_rate"])
        found.append(
            f"{judged['judge']} was asked {judged['num_asked']} times; {judged['num_unreadable']} answers could not be read, in "
            f"{judged['num_contradictions']} pairs it contradicted itself when the order was swapped (counted as ties), and it chose the "
            f"text that stood first in {first} of its decided answers."
        )
    if agreement := judged.get("agreement"):
        found.append(
            f"On {agreement['num_common']} pairs that people voted on too it agrees with them in {share(agreement['agreement'])} "
            f"(Cohen's kappa {number(agreement['kappa'])})."
        )
    return {"tables": [table for table in tables if table["rows"]], "sentences": [*found, *judged["sentences"]]}


def _counts(row: Mapping[str, Any], *names: str) -> list[str]:
    return [str(row[f"num_{name}"]) for name in names]


def _against_chance(rate: Mapping[str, Any]) -> str:
    if rate["low"] > 0.5:
        return "recognised"
    return "taken for the other" if rate["high"] < 0.5 else "not told from chance"


def _sentences(votes: Mapping[str, Any]) -> list[str]:
    raters = ", ".join(f"{name} ({count})" for name, count in votes["raters"].items())
    found = [f"{votes['num_votes']} votes{f' of {raters}' if raters else ''}. A tie is half a win."]
    if votes["num_judged_twice"]:
        alpha = number(votes["alpha"])
        found.append(
            f"Krippendorff's alpha over {votes['num_judged_twice']} pairs that several people judged: {alpha}"
            + (" (everybody always chose alike, so there is no chance to compare with)." if alpha == NOT_AVAILABLE else ".")
        )
    if votes["left_rate"]:
        found.append(f"Of the decided votes {share_interval(votes['left_rate'])} are for the left side, where chance would put 50%.")
    if votes["num_outdated"]:
        found.append(f"{votes['num_outdated']} more votes are on answers that have been replaced since, and do not count.")
    return found
