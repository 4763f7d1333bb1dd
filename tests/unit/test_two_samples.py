"""The two-sample test and the register axis: what is the same, what is not, and the axis in two languages."""

from __future__ import annotations

import random

import numpy as np
import pytest
from small_voices import tell, texts

from giong.data.synthesis.kinds import KINDS
from giong.evaluation.metrics.register import RegisterAxis, fit_register
from giong.evaluation.metrics.style import kept_words, mask_content
from giong.evaluation.metrics.two_sample import two_sample_test

NAMES = [str(number // 2) for number in range(24)]


def masked(written: list[str]) -> list[str]:
    kept = kept_words([texts("author", 1, 30), texts("clerk", 1, 30)])
    return [mask_content(text, kept) for text in written]


def test_another_voice_is_told_apart_and_the_same_one_is_not():
    own = masked(texts("author", 3000, 24))
    other = two_sample_test(masked([tell("clerk", 3000 + n) for n in range(24)]), own, NAMES)
    assert other.auc > 0.95
    assert other.p_value == pytest.approx(1 / 501)
    assert two_sample_test(own, own, NAMES).auc == 0.5
    assert two_sample_test(own[:3], own[:3], NAMES[:3]) is None
    assert two_sample_test([""] * 24, own, NAMES) is None


def test_the_p_value_is_even_where_both_are_the_same():
    # 40 studies of two draws from one voice: as many p-values below one half as above, and few below 0.05.
    own = masked(texts("author", 5000, 400))
    draw = random.Random(3)
    found = []
    for study in range(40):
        drawn = draw.sample(own, 24)
        found.append(two_sample_test(drawn[:12], drawn[12:], [str(n) for n in range(12)], seed=study).p_value)
    assert 12 <= sum(p < 0.5 for p in found) <= 28
    assert sum(p <= 0.05 for p in found) <= 5


def test_the_axis_runs_from_the_requests_to_the_author_and_beyond():
    pairs = [(tell("clerk", n), tell("author", n)) for n in range(100, 160)]
    axis = fit_register(pairs)
    clerk, author = ([tell(voice, 3000 + n) for n in range(24)] for voice in ("clerk", "author"))
    overdone = [f"Oh, dear me, well now - {text} - so there! Bless us all - what a life!" for text in author]
    levels = [float(np.mean(axis.level(written))) for written in (clerk, author, overdone)]
    assert levels[0] < 0 < levels[1] < levels[2]
    half = [one if n % 2 else other for n, (one, other) in enumerate(zip(clerk, author))]
    assert levels[0] < float(np.mean(axis.level(half))) < levels[1]
    assert fit_register(pairs[:5]) is None


def test_the_axis_needs_no_word_list_and_so_no_language():
    official = [f"Kính đề nghị quý vị hoàn thành công việc số {n} theo quy định." for n in range(30)]
    casual = [f"Làm giùm cái việc số {n} nha, dễ ợt à!" for n in range(30)]
    axis = RegisterAxis(official[:20], casual[:20])
    assert axis.level(official[20:]).max() < 0 < axis.level(casual[20:]).min()
    mixed = f"{official[25]} {casual[25]}"
    assert axis.level([official[25]])[0] < axis.level([mixed])[0] < axis.level([casual[25]])[0]


def test_the_instruction_is_taken_off_a_request():
    kind = KINDS["neutral_rewrite"]
    for drop in (True, False):
        assert kind.content(kind.training_messages("It rained.", drop_instruction=drop)[0].content) == "It rained."
