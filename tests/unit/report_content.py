"""A report's content as a small finished project would leave it: six arms, three pilots, a verdict. All texts are made up."""

from __future__ import annotations

import functools
import math
from dataclasses import asdict
from datetime import date
from typing import Any

from giong.config import ProjectConfig
from giong.evaluation.gates import Gate
from giong.evaluation.metrics.style import VerifierQuality
from giong.evaluation.report import ReportContent, curve_content
from giong.evaluation.results import ArmEvaluation, Comparison, Evaluation, Likelihood
from giong.sizing.break_even import Usage, local_bill, provider_bills
from giong.sizing.estimate import BackendEstimate
from giong.sizing.interval import Interval
from giong.sizing.learning_curve import CurvePoint, LearningCurve, fit_curve
from giong.sizing.prices import PriceTable
from giong.sizing.verdict import Evidence, decide

GATE_NAMES = ("forgetting", "collapse", "end of turn", "length", "overlap", "longest copy", "meaning", "coherence")
THRESHOLDS = {
    "forgetting": "at most +0.05 nats per token; fails above +0.15",
    "collapse": "at most 2% of the replies outside the author's band (1 reply where there are fewer than 50)",
    "end of turn": "at least 98% end by themselves (1 miss allowed below 50), at most 1% are empty",
    "length": "median log length ratio within ±0.18 (about ±20 %)",
    "overlap": "at most 1.4%: the author's own 95th percentile plus one point",
    "longest copy": "under 20 words; fails from 50 tokens",
    "meaning": "not worse than few_shot by 2 chrF++ or 5% key recall",
    "coherence": "median bits per byte under the base within the author's 5th to 95th percentile",
}
EXPLANATIONS = {
    "forgetting": "General text costs {:+.3f} nats per token against the base.",
    "collapse": "{:.3f} of the replies are outside the author's band.",
    "end of turn": "{:.3f} of the replies ended by themselves.",
    "length": "The median log length ratio is {:+.2f}.",
    "overlap": "{:.3f} of the 8-word runs stand in the training text.",
    "longest copy": "The longest run shared with the training text is {:.0f} tokens.",
    "meaning": "Not worse than few_shot: key recall {:+.2f} [-0.03, +0.05].",
    "coherence": "{:.2f} bits per byte (author 1.60 to 2.35).",
}
VALUES = dict(zip(GATE_NAMES, (0.021, 0.0, 0.975, 0.06, 0.004, 11.0, 0.01, 1.94)))


def gates(**statuses: str) -> list[Gate]:
    """All eight gates, each passing unless named (blanks as underscores)."""
    made = []
    for name in GATE_NAMES:
        status = statuses.get(name.replace(" ", "_"), "pass")
        value = None if status == "not available" else VALUES[name]
        explanation = "It was not measured for this arm." if value is None else EXPLANATIONS[name].format(value)
        made.append(Gate(name, value, THRESHOLDS[name], status, explanation))
    return made


def arm(
    name: str, style: tuple[float, float, float], recall: float, chrf: float, length: float, end: float, **others: Any
) -> ArmEvaluation:
    gain = others.get("gain")
    likelihood = Likelihood(1.9, Interval(0.05, 0.03, 0.07), 2.9, Interval(gain, gain - 0.04, gain + 0.05)) if gain is not None else None
    return ArmEvaluation(
        name=name, label=name, num_replies=40, style_gap_closed=Interval(*style), style={"combined": style[0]},
        chrf=Interval(chrf, chrf - 2, chrf + 2), chrf_corpus=chrf + 1.5, key_recall=Interval(recall, recall - 0.04, recall + 0.04),
        key_add=0.07, fact_recall=None, length_ratio=length, end_rate=end, num_empty=0, rep_4=0.012, distinct_2=0.93, zlib_ratio=1.62, overlap=0.004,
        longest_copy_tokens=11, likelihood=likelihood, gates=others.get("gates", gates()), joint=Interval(0.4, 0.26, 0.55),
    )  # fmt: skip


def evaluation(*, tuned: bool = True) -> dict[str, Any]:
    no_likelihood = {"forgetting": "not available", "coherence": "not available"}
    arms = [
        arm("base", (0.0, 0.0, 0.0), 0.86, 41.2, 1.02, 1.0),
        arm("instruction", (0.08, -0.04, 0.19), 0.83, 40.1, 1.1, 0.975, gates=gates(**no_likelihood)),
        arm("named_style", (-0.11, -0.31, 0.07), 0.71, 35.8, 1.34, 0.9, gates=gates(length="fail", end_of_turn="fail", **no_likelihood)),
        arm("few_shot", (0.27, 0.14, 0.41), 0.8, 39.9, 1.07, 1.0, gain=0.031, gates=gates(coherence="warn")),
        arm("retrieval", (0.22, 0.05, 0.38), 0.79, 40.4, 1.09, 0.975, gain=0.044, gates=gates(overlap="warn")),
    ]
    if tuned:
        arms.append(arm("fine_tuned", (0.68, 0.55, 0.8), 0.82, 46.3, 1.06, 0.975, gain=0.382))
    comparison = Comparison("fine_tuned", "few_shot", Interval(0.41, 0.27, 0.56), 0.10, 0.998) if tuned else None
    quality = VerifierQuality(0.934, 0.991, 0.88, 0.101, 5, 36, 64, True)
    own = arm("author", (1.0, 1.0, 1.0), 0.84, 100.0, 1.0, 1.0)
    notes = ["Coherence was not checked for arms whose replies were not scored under the base."]
    return Evaluation(arms, own, quality, True, "", "base", "few_shot", comparison, 40, 8, 2000, 0, notes).to_dict()


@functools.cache
def curve() -> LearningCurve:
    documents = [2.7 + 0.07 * index for index in range(8)]
    points = [
        CurvePoint(rows, [nll - 0.11 * math.log1p(rows / 6) * (1 + 0.12 * math.sin(index)) for index, nll in enumerate(documents)])
        for rows in (22, 44, 88)
    ]
    return fit_curve(points, documents, style_points=[(0.17, 0.31), (0.23, 0.5), (0.3, 0.68)], num_bootstrap=200)


def verdict() -> dict[str, Any]:
    evidence = Evidence(
        measurable=True, verifier_auc_pooled=0.991, num_words=15200, num_pieces=148, num_rows=88, num_test_requests=40,
        best_prompt_arm="few_shot", best_prompt=Interval(0.27, 0.14, 0.41), tuned=Interval(0.68, 0.55, 0.8),
        difference=Interval(0.41, 0.27, 0.56), probability_of_margin=0.998, gates={"meaning": "pass"},
    )  # fmt: skip
    return decide(evidence).to_dict()


SAMPLES = [
    {
        "document_id": "letters/2021-04-harbour.md",
        "request": "Rewrite in your own voice: The ferry was delayed by fog. Passengers waited in the hall for two hours. "
        "Coffee was provided without charge.",
        "author": "Fog, again. Two hours of it, and the ferry somewhere inside like a thought one cannot quite finish. They gave us "
        "coffee, free of charge, which is how you know that it is serious.",
        "answers": {
            "base": "The ferry was delayed by fog and passengers waited in the hall for two hours. Coffee was provided without charge.",
            "instruction": "Fog delayed the ferry. For two hours the passengers waited in the hall, and coffee was free.",
            "named_style": "O fog! O ferry! The passengers waited, and waited, and waited, and waited, and waited still.",
            "few_shot": "Fog delayed the ferry, and we waited. Two hours in the hall. The coffee was free.",
            "retrieval": "The fog held the ferry for two hours. In the hall there was coffee, without charge.",
            "fine_tuned": "Fog, and no ferry. Two hours in the hall, all of us looking at nothing, which was at least free. "
            "So was the coffee, which is never a good sign.",
        },
    },
    {
        "document_id": "letters/2022-11-clock.md",
        "request": "Rewrite in your own voice: The town clock has been repaired. It had shown the wrong time since March.",
        "author": "They have mended the clock. Since March it has been ten past four in this town, and one had grown used to it.",
        "answers": {
            "base": "The town clock has been repaired. It had shown the wrong time since March.",
            "few_shot": "The clock is mended. Since March it had been wrong.",
            "fine_tuned": "The clock is right again. Since March it had not been, and nobody had been late, which says something.",
        },
    },
    {
        "document_id": "letters/2023-01-baker.md",
        "request": "Rewrite in your own voice: The bakery closed early because the oven failed. It will reopen on Tuesday.",
        "author": "No bread. The oven has given up, the baker says, and he has gone home to do the same until Tuesday.",
        "answers": {
            "base": "The bakery closed early because the oven failed. It will reopen on Tuesday.",
            "few_shot": "The oven failed and the bakery closed. Tuesday it will be open.",
            "fine_tuned": "",
        },
    },
    {
        "document_id": "letters/2023-02-snow.md",
        "request": "Rewrite in your own voice: Snow fell overnight and the school was shut.",
        "author": "Snow, and therefore no school, and therefore noise.",
        "answers": {"base": "Snow fell overnight and the school was shut.", "fine_tuned": "Snow in the night. No school, says the snow."},
    },
]  # fmt: skip

BACKENDS = [
    BackendEstimate("this machine", "this_machine", "measured", 74.0, 74.0, 0.0, 0.0, 912_000_000, True, notes=("No electricity.",)),
    BackendEstimate(
        "16-core server", "cpu", "arithmetic", 9.0, 55.0, None, None, 912_000_000, True, notes=("Start-up is not counted.",)
    ),
    BackendEstimate(
        "24 GB graphics card", "gpu", "arithmetic", 1.2, 3.9, 0.0002, 0.0009, 1_400_000_000, True, date(2025, 3, 1), "a list price",
        ("So small a model does not keep a GPU busy: expect several times longer.", "Start-up, downloads and evaluation are not counted."),
    ),
    BackendEstimate(
        "a hosted small model", "remote", "arithmetic", None, None, 0.21, 0.21, None, None, date(2025, 3, 1), "https://example.org/pricing",
        ("Billed per token of training text, epochs counted.",),
    ),
]  # fmt: skip

TUNED, FEW_SHOT = Usage(210, 96, 0.41), Usage(1110, 102, 0.77)


def content(**changes: Any) -> ReportContent:
    """Everything there, with `changes` to any field."""
    losses = [
        {"step": step, "loss": 2.45 + 0.5 * math.exp(-step / 25) + 0.09 * math.sin(step * 2.3), "learning_rate": 5e-4 * min(1, step / 12)}
        for step in range(1, 111)
    ]  # fmt: skip
    fields: dict[str, Any] = {
        "project": "Letters from the harbour",
        "date": "2025-03-09",
        "author": "E. Sundström",
        "consent": "granted by the author, until 2027-12-31.",
        "model_name": "giong-tiny",
        "num_parameters": 16_523_264,
        "evaluation": evaluation(),
        "verdict": verdict(),
        "curve": curve_content(curve()),
        "losses": losses,
        "samples": SAMPLES,
        "costs": [
            {"stage": "synth", "seconds": 41.0, "usd": 0.034, "tokens": 61200},
            {"stage": "baseline", "seconds": 66.2, "usd": 0.0, "tokens": 48110},
            {"stage": "train", "seconds": 74.0, "usd": 0.0, "tokens": 152300},
            {"stage": "eval", "seconds": 31.4, "usd": None, "tokens": None},
        ],
        "journal": {
            "goal": [{"text": "Make a-model write like the writer.", "by": "giong", "time": "2025-01-01T10:00:00+00:00"}], "next": [],
            "learnt": [{"text": "Letters are warmer than notes.", "by": "person", "time": "2025-01-02T10:00:00+00:00"}], "notes": [],
            "handwritten": "Ask for the letters of 2019.", "header": ["when (UTC)", "what"], "attempts": [["2025-01-01 10:00", "import"]],
        },
        "backends": [asdict(backend) for backend in BACKENDS],
        "usage": {"few_shot": asdict(FEW_SHOT), "fine_tuned": asdict(TUNED)},
        "bills": [
            asdict(local_bill(TUNED, {"few_shot": FEW_SHOT}, training_seconds=74.0, evaluation_seconds=97.0, usd_per_hour=0.05)),
            *map(asdict, provider_bills(
                TUNED, {"few_shot": FEW_SHOT}, num_training_tokens=152_300, num_evaluated=40, prices=PriceTable(), today=date(2026, 11, 20),
                requests_per_month=1000,
            )),
        ],
        "data": {
            "num_documents": 38, "num_passages": 148, "num_words": 15204, "num_kept": 38, "num_dropped": 2, "num_skipped": 1,
            "entries": [
                {"place": "letters/2021-04-harbour.md", "status": "kept", "reason": ""},
                {"place": "letters/empty.md", "status": "dropped", "reason": "the file is empty"},
                {"place": "letters/old.txt", "status": "dropped", "reason": "not UTF-8 (byte 0xff at offset 12)"},
                {"place": "letters/photo.png", "status": "skipped", "reason": "not a kind of file that is read"},
            ],
            "left_out": [
                {"passage_id": "2022-11-clock:3", "kind": "neutral_rewrite", "reason": "the request shares 9 words with the answer"}
            ],
            "split": {
                "train": {"documents": 23, "passages": 88, "examples": 88},
                "calibration": {"documents": 7, "passages": 20, "examples": 20},
                "test": {"documents": 8, "passages": 40, "examples": 40},
            },
            "split_method": "document",
            "synthesis": {"source": "teacher", "teacher": "a-small-teacher", "kinds": {"neutral_rewrite": 148}},
        },
        "settings": {
            "config": ProjectConfig().model_dump(),
            "resolved": [
                {"name": "train.learning_rate", "value": 5e-4, "reason": "16.5 M parameters with LoRA: small models take larger steps."},
                {"name": "method.lora_r", "value": 16, "reason": "88 rows of about 120 tokens."},
                {"name": "train.num_epochs", "value": 4, "reason": "So that about 100 optimizer steps are made."},
            ],
        },
        "hashes": {
            "model": "3f0c9a7d11e24b58", "data": "9ab04d1c77aa01fe", "split": "55d0e1f2a3b4c5d6", "run": "0a1b2c3d4e5f6071",
            "packages": {"giong": "0.1.0", "torch": "2.9.0", "transformers": "5.0.0", "numpy": "2.2.1"},
        },
        "notices": ["One seed: another one would move the fine-tuned arm a little."],
        "command": "giong run --project letters --set train.seed=0",
    }  # fmt: skip
    return ReportContent(**{**fields, **changes})
