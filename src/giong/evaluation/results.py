"""What an evaluation leaves behind: one row per arm, the author's own row, and the comparison the verdict is about.

None means "not available" throughout: a figure that could not be measured is never written as zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any

import numpy as np

from giong.contracts import Reply
from giong.evaluation.consistency import Consistency
from giong.evaluation.gates import Gate
from giong.evaluation.metrics.intervals import Interval
from giong.evaluation.metrics.style import VerifierQuality
from giong.evaluation.metrics.two_sample import TwoSample
from giong.evaluation.order import BASE, OrderTest

AUTHOR = "author"
"""Name of the row that holds the author's own answers (and of their scores in `coherence`)."""
TUNED = "fine_tuned"
"""Name of the arm of the tuned model."""
CALIBRATION = "calibration"
"""Name of the author's held-out calibration texts (of their scores in `coherence` and `disordered`)."""
MARGIN = 0.10
"""How much more of the style gap fine-tuning must close than the best prompt does, to be worth it."""


@dataclass(frozen=True, slots=True)
class ArmOutput:
    """What one arm answered to the test requests, in their order.

    `uses_training_text` says whether the arm has seen the training text at all, in its weights or in its prompt.
    """

    name: str
    replies: Sequence[Reply]
    uses_training_text: bool = False
    label: str = ""


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Held-out likelihood of the author's answers. Differences are base - arm, so that positive is better.

    Nats per token are None where the arm cuts text into other tokens than the base.
    """

    bits_per_byte: float
    gain_bits_per_byte: Interval | None
    nats_per_token: float
    gain_nats_per_token: Interval | None


@dataclass
class ArmEvaluation:
    """All that was measured of one arm; None means not available. Shares and recalls are 0 to 1, chrF++ 0 to 100.

    `fact_recall` is the share of the facts that only the author's answers hold (numbers, dates, names, addresses that are not in the
    requests) which the replies give; None where there are none. `register_shift` is 0 at the author's own level, -1 at that of the
    neutral requests, and above 0 where an arm overshoots. `learned` are means over the replies of
    what learned models say of each beside the author's answer, 0 to 1, by figure. `pools` is, by gate and under "all", the share of
    pools of ten replies that would pass as the author's (`evaluation.pools`); empty where style or coherence was not measured.
    """

    name: str
    label: str
    num_replies: int
    style_gap_closed: Interval | None
    style: dict[str, float] | None
    chrf: Interval
    chrf_corpus: float
    key_recall: Interval | None
    key_add: float | None
    fact_recall: Interval | None
    length_ratio: float
    end_rate: float
    num_empty: int
    rep_4: float
    distinct_2: float
    zlib_ratio: float
    overlap: float
    longest_copy_tokens: int
    likelihood: Likelihood | None
    gates: list[Gate]
    joint: Interval | None
    uses_training_text: bool = False
    two_sample: TwoSample | None = None
    register_shift: Interval | None = None
    consistency: Consistency | None = None
    learned: dict[str, Interval] = field(default_factory=dict)
    pools: dict[str, float] = field(default_factory=dict)

    def gate(self, name: str) -> Gate:
        return next(gate for gate in self.gates if gate.name == name)

    @property
    def failed_gates(self) -> list[str]:
        return [gate.name for gate in self.gates if gate.status == "fail"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One arm against another, the tuned one against the best prompt above all: difference in style gap closed, and how likely it reaches `margin`."""

    arm: str
    against: str
    difference: Interval
    margin: float
    probability_of_margin: float


@dataclass
class Evaluation:
    """Every arm, the author's own row, the verifier's quality, and the comparison that the verdict is about.

    `measurable` says whether the verifier can tell the author from other writers. `style_note` says why there is no
    style gap closed (not measurable, or no gap to close), or is empty. `num_facts_to_find` of the `num_facts` in the author's answers
    are not in the requests. `controls` are counterfeits, measured as every arm; `alarms` names those that nothing stops.
    `combinations` compare the tuned model with a prompt on top with the tuned model alone and with the best prompt. `order` says who tells
    order in the author's language: the base and, where it does not, a model of characters, which judges pools then; `coherence_note` says
    why there is no coherence under the base, or is empty.
    """

    arms: list[ArmEvaluation]
    author: ArmEvaluation
    verifier: VerifierQuality | None
    measurable: bool
    style_note: str
    base_arm: str
    best_prompt_arm: str | None
    comparison: Comparison | None
    num_requests: int
    num_documents: int
    num_bootstrap: int
    seed: int
    num_facts: int = 0
    num_facts_to_find: int = 0
    notes: list[str] = field(default_factory=list)
    controls: list[ArmEvaluation] = field(default_factory=list)
    alarms: list[str] = field(default_factory=list)
    combinations: list[Comparison] = field(default_factory=list)
    order: dict[str, OrderTest] = field(default_factory=dict)
    coherence_note: str = ""

    @property
    def base_tells_order(self) -> bool | None:
        """None where it was not asked, or too few texts leave it open."""
        test = self.order.get(BASE)
        return None if test is None or test.undecided else test.passed

    def arm(self, name: str) -> ArmEvaluation:
        """The arm of that name. Raises KeyError where there is none."""
        for arm in (*self.arms, self.author):
            if arm.name == name:
                return arm
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; numbers that do not exist are None, never NaN."""
        return finite(asdict(self))


def finite(value: Any) -> Any:
    """Plain values with numpy's numbers as Python's, and numbers that do not exist as None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return finite(asdict(value))
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value
