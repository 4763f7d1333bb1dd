"""One code path for every arm: the same texts, the same measures, the same gates, whoever wrote the replies.

It sees texts, replies and token scores only; whoever calls it asks the models. All numbers of an arm are paired with the
author's own answers to the same requests, and the row "author" is computed like any other arm (it must close the whole
gap). Without other voices, or where the verifier cannot tell the author apart, there is a sentence instead of a score.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from giong.config import EvaluationConfig
from giong.contracts import Example, Reply, TokenScores, request_text
from giong.errors import DataError
from giong.evaluation import formats, gates, leakage, order, pools
from giong.evaluation.consistency import Consistency, consistency
from giong.evaluation.controls import alarms
from giong.evaluation.gates import Gate
from giong.evaluation.metrics import intervals, meaning
from giong.evaluation.metrics.intervals import Interval
from giong.evaluation.metrics.register import RegisterAxis, fit_register
from giong.evaluation.metrics.style import (
    StyleVerifier,
    Vectors,
    VerifierQuality,
    kept_words,
    mask_content,
    split_background,
    window_length,
)
from giong.evaluation.metrics.text import CorpusIndex, distinct_n, length_ratio, rep_n, words, zlib_ratio
from giong.evaluation.metrics.two_sample import TwoSample, two_sample_test
from giong.evaluation.results import AUTHOR, CALIBRATION, MARGIN, ArmEvaluation, ArmOutput, Comparison, Evaluation, Likelihood

MIN_REQUESTS = 10
MAX_SHARED_WITH_AUTHOR = 0.5
"""Share of its 8-word runs from which a background text counts as the author's own."""


def evaluate(
    arms: Sequence[ArmOutput],
    examples_test: Sequence[Example],
    author_train_texts: Sequence[str],
    author_calibration_texts: Sequence[str],
    background: Mapping[str, Sequence[str]],
    config: EvaluationConfig,
    held_out: Mapping[str, Sequence[TokenScores]] | None = None,
    general: Mapping[str, Sequence[TokenScores]] | None = None,
    coherence: Mapping[str, Sequence[TokenScores]] | None = None,
    *,
    training: Mapping[str, Sequence[TokenScores]] | None = None,
    training_documents: Sequence[str] = (),
    exposures: Sequence[float] = (),
    register_pairs: Sequence[tuple[str, str]] = (),
    neutral_requests: Sequence[str] = (),
    reworded_replies: Mapping[str, Sequence[Sequence[str]]] | None = None,
    controls: Mapping[str, Sequence[str]] | None = None,
    calibration: Sequence[Example] = (),
    disordered: Mapping[str, Sequence[TokenScores]] | None = None,
    base_model: str = "",
    json_schema: Mapping[str, Any] | None = None,
    learned: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
    style_vectors: Vectors | None = None,
    base_arm: str = "base",
    tuned_arms: Sequence[str] = ("fine_tuned",),
    combined_arms: Sequence[str] = (),
    meaning_reference: str = "few_shot",
) -> Evaluation:
    """Measure every arm on the frozen test requests.

    `held_out[arm]` scores the author's answers under the arm, one per test example; `general[arm]` scores general texts;
    `coherence[arm]` scores the arm's replies under the untuned base, with the author's answers under "author". Arms
    missing there show "not available". `training[arm]` scores training answers (of `training_documents`) under the base and the tuned
    arms, `exposures` are those of planted canaries. `register_pairs` are neutral training requests with the author's answers, and
    `neutral_requests` the test requests without their instruction, where they are such. `reworded_replies[arm]` are its replies to some
    requests, one list per wording. `controls` are counterfeits by name, one text per
    request (`controls.make_controls`), with their scores in `coherence` too. `calibration` are held-out examples of the author that pools of
    replies are compared with (their scores in `coherence` under "calibration"), `disordered` scores every text of `coherence` with its spans
    shuffled (`order.disordered`): they show whether the base, `base_model` by name, tells order in this language. `combined_arms` are the tuned model with a prompt on top:
    compared with it and with the best prompt. `json_schema` is what every answer has to meet whose example brings no other.
    `learned[figure][arm]` holds what a learned model says of each reply against the author's answer, and `style_vectors` is a further
    witness of style. Raises DataError where replies and requests do not match or the base is missing.
    """
    _check(arms, examples_test, base_arm, controls or {})
    notes: list[str] = []
    scored = [_numbers(scores, what, notes) for what, scores in (
        ("the author's answers", held_out), ("general text", general), ("the replies", coherence), ("training answers", training),
        ("the shuffled replies", disordered),
    )]  # fmt: skip
    held_out, general, coherence, training, disordered = scored
    own_texts = [*author_train_texts, *author_calibration_texts, *(example.answer for example in examples_test)]
    background = _without_author(background, own_texts, notes)
    measurement = _Measurement(examples_test, author_train_texts, author_calibration_texts, background, config, json_schema, style_vectors)
    measurement.reworded, measurement.learned = reworded_replies or {}, learned or {}
    measurement.set_register(register_pairs, neutral_requests)
    own = ArmOutput(AUTHOR, [Reply(example.answer) for example in examples_test], label="the author's own answers")
    # Every gate of a counterfeit counts: it is held to what an arm is held to that has seen the training text.
    counterfeits = [ArmOutput(name, [Reply(text) for text in texts], uses_training_text=True) for name, texts in (controls or {}).items()]
    outputs = {arm.name: arm for arm in (*arms, own, *counterfeits)}
    measured = {name: _measure(output, measurement) for name, output in outputs.items()}
    base, author = measured[base_arm], measured[AUTHOR]
    measurement.order = _order_tests(calibration, coherence or {}, disordered or {}, measurement)
    coherence_note = measurement.order[order.BASE].why_not_measured(base_model) if measurement.order else ""
    measurement.pools = _pools(measured, calibration, coherence or {}, disordered or {}, measurement)
    measurable = not measurement.style_note
    style_note = measurement.style_note or _gap_closed(author, base, author, measurement)[1]
    reference_name = meaning_reference if meaning_reference in measured else base_arm
    rows = {
        name: _row(
            outputs[name], figures, base, author, measured[reference_name], reference_name, measurement, measurable,
            held_out=_of(held_out, name), held_out_base=_of(held_out, base_arm),
            general=_of(general, name), general_base=_of(general, base_arm),
            coherence=_of(coherence, name), coherence_author=_of(coherence, AUTHOR), coherence_note=coherence_note,
            of_training=_training_gates(name, base_arm, held_out, training, training_documents, exposures, measurement) if name in tuned_arms else [],
        )
        for name, figures in measured.items()
    }  # fmt: skip
    prompts = [rows[arm.name] for arm in arms if arm.name not in (*tuned_arms, *combined_arms)]
    best_prompt = None if style_note else _best_prompt(prompts, base_arm)
    tuned = next((name for name in tuned_arms if name in measured), None)
    comparison = _compare(measured, tuned, best_prompt, base_arm, measurement) if tuned and best_prompt else None
    combinations = [
        _compare(measured, name, against, base_arm, measurement)
        for name in combined_arms for against in (tuned, best_prompt) if against and best_prompt
    ]  # fmt: skip
    return Evaluation(
        [rows[arm.name] for arm in arms], rows[AUTHOR], measurement.quality, measurable, style_note, base_arm, best_prompt,
        comparison, len(examples_test), len(set(measurement.clusters)), config.num_bootstrap, config.seed,
        int(author.facts[:, 0].sum()), int(author.facts[:, 1].sum()), [*notes, *_notes(measurement, coherence, arms)],
        [rows[arm.name] for arm in counterfeits],
        alarms({
            arm.name: (row.failed_gates, row.joint.low if row.joint else None, row.pools.get("all"))
            for arm in counterfeits if (row := rows[arm.name])
        }),
        combinations,
        measurement.order, coherence_note,
    )  # fmt: skip


class _Measurement:
    """What is fitted once and used for every arm."""

    def __init__(
        self, examples: Sequence[Example], train: Sequence[str], calibration: Sequence[str],
        background: Mapping[str, Sequence[str]], config: EvaluationConfig, json_schema: Mapping[str, Any] | None,
        style_vectors: Vectors | None,
    ) -> None:  # fmt: skip
        self.examples, self.config = examples, config
        self.clusters = [example.document_id for example in examples]
        self.answers = [example.answer for example in examples]
        self.requests = [request_text(example.messages) for example in examples]
        self.closed = meaning.closed_words(self.requests)
        self.train, self.background = train, background
        self.corpus = CorpusIndex(train)
        self.band = gates.CollapseBand(calibration or self.answers)
        self.author_overlaps = [self.corpus.share_copied(*pair) for pair in zip(self.answers, self.requests)]
        self.verifier, self.quality, self.style_note = _fit_verifier(train, calibration, self.answers, background, config, style_vectors)
        self.kept = kept_words([train, *background.values()])
        self.masked_answers = [mask_content(answer, self.kept) for answer in self.answers]
        self.register: tuple[RegisterAxis, np.ndarray, np.ndarray] | None = None
        self.reworded: Mapping[str, Sequence[Sequence[str]]] = {}
        self.pools: Mapping[str, dict[str, float]] = {}
        self.order: dict[str, order.OrderTest] = {}
        self.learned: Mapping[str, Mapping[str, Sequence[float]]] = {}
        self.format = formats.Format(examples, json_schema)
        self.author_style_p10 = float(np.percentile(self.verifier.combined(calibration), 10)) if self.verifier else math.nan

    @cached_property
    def character_bits(self) -> order.BitsPerByte:
        return order.character_bits([*self.train, *(text for texts in self.background.values() for text in texts)])

    def set_register(self, pairs: Sequence[tuple[str, str]], neutral_requests: Sequence[str]) -> None:
        """Fit the axis and place the author and the neutral test requests on it."""
        axis = fit_register(pairs, self.config.seed) if len(neutral_requests) == len(self.answers) else None
        self.register = (axis, axis.level(self.answers), axis.level(neutral_requests)) if axis else None

    def register_shift(self, texts: Sequence[str]) -> Interval | None:
        """How far the texts lie beyond the author's level, in distances of the neutral requests from it."""
        if self.register is None:
            return None
        axis, author, neutral = self.register
        return self.interval([axis.level(texts), author, neutral], lambda arm, own, request: (arm - own) / (own - request))

    def consistency(self, name: str) -> Consistency | None:
        replies_WN = self.reworded.get(name)
        if not replies_WN:
            return None
        style = None if self.style_note or not self.verifier else np.array([self.verifier.combined(replies) for replies in replies_WN])
        return consistency(replies_WN, style)

    def two_sample(self, texts: Sequence[str]) -> TwoSample | None:
        masked = [mask_content(text, self.kept) for text in texts]
        return two_sample_test(masked, self.masked_answers, self.clusters, self.config.seed)

    def interval(self, values: Any, statistic: Any = None) -> Interval:
        settings = {"num_bootstrap": self.config.num_bootstrap, "seed": self.config.seed}
        return intervals.bootstrap(values, self.clusters, statistic, **settings)


@dataclass
class _Figures:
    """Per-request figures of one arm, each of shape (number of requests,); `facts` (number of requests, 3) as `count_facts` has them."""

    texts: list[str]
    style: dict[str, np.ndarray] | None
    chrf: np.ndarray
    key_recall: np.ndarray
    key_add: np.ndarray
    facts: np.ndarray
    overlap: np.ndarray
    longest_copy: np.ndarray
    collapsed: np.ndarray
    ended: np.ndarray


def _check(arms: Sequence[ArmOutput], examples: Sequence[Example], base_arm: str, controls: Mapping[str, Sequence[str]]) -> None:
    names = [*(arm.name for arm in arms), *controls]
    if base_arm not in names:
        raise DataError(f"There are no replies of the arm {base_arm!r}, the zero of the style scale", remedy="Run `giong baseline` first.")
    if len(set(names)) < len(names) or AUTHOR in names:
        raise DataError(f"Two arms have the same name: {sorted(names)}", remedy="Give every arm a name of its own (not 'author').")
    if not examples:
        raise DataError("There are no test requests", remedy="Add documents: whole documents are kept for the test.")
    for arm in arms:
        if len(arm.replies) != len(examples):
            raise DataError(
                f"Arm {arm.name!r} has {len(arm.replies)} replies to {len(examples)} test requests", remedy="Run `giong eval` again."
            )  # fmt: skip


def _fit_verifier(
    train: Sequence[str], calibration: Sequence[str], answers: Sequence[str], background: Mapping[str, Sequence[str]],
    config: EvaluationConfig, vectors: Vectors | None,
) -> tuple[StyleVerifier | None, VerifierQuality | None, str]:  # fmt: skip
    """The calibrated verifier and its quality, and the sentence that says why style cannot be measured (or nothing)."""
    fit, calibrate, test = split_background(background, window_length(train))
    try:
        verifier = StyleVerifier(vectors).fit(train, fit, config.seed).calibrate(calibration, calibrate)
    except DataError as error:
        return None, None, f"Style is not measurable: {error}"
    quality = verifier.quality(list(dict.fromkeys(answers)), test, config.pool_size, config.seed)
    if quality.measurable:
        return verifier, quality, ""
    cause = quality.caution or (
        f"pools of {quality.pool_size} unseen pieces of the author and of others are told apart with AUC {quality.auc_pooled:.2f}, "
        "below 0.80."
    )
    help_text = "More of the author's writing (at least 2,500 words), longer passages, or background writers of the same genre would help."
    return verifier, quality, f"Style is not measurable for this author yet: {cause} {help_text}"


def _measure(output: ArmOutput, measurement: _Measurement) -> _Figures:
    texts = [reply.text for reply in output.replies]
    pairs = list(zip(measurement.requests, texts))
    return _Figures(
        texts,
        measurement.verifier.score(texts) if measurement.verifier else None,
        np.array(meaning.chrf_scores(texts, measurement.answers)),
        np.array([meaning.key_recall(request, text, measurement.closed) for request, text in pairs]),
        np.array([meaning.key_add(request, text, measurement.closed) for request, text in pairs]),
        np.array([meaning.count_facts(request, own, text, measurement.closed) for (request, text), own in zip(pairs, measurement.answers)]),
        np.array([measurement.corpus.share_copied(text, request) for request, text in pairs]),
        np.array([measurement.corpus.longest_run(text) for text in texts]),
        np.array([bool(measurement.band.faults(text)) for text in texts]),
        np.array([reply.finish_reason == "stop" and bool(reply.text.strip()) for reply in output.replies]),
    )


def _row(
    output: ArmOutput, figures: _Figures, base: _Figures, author: _Figures, reference: _Figures, reference_name: str,
    measurement: _Measurement, has_style: bool, *, held_out: Any, held_out_base: Any, general: Any, general_base: Any,
    coherence: Any, coherence_author: Any, coherence_note: str, of_training: list[Gate],
) -> ArmEvaluation:  # fmt: skip
    texts, answers = figures.texts, measurement.answers
    tokens = [words(text) for text in texts]
    gap_closed = _gap_closed(figures, base, author, measurement)[0] if has_style else None
    arm_gates = [
        gates.forgetting(general, general_base),
        gates.collapse(texts, measurement.band, answers),
        gates.end_of_turn(output.replies),
        gates.length(texts, answers),
        gates.surplus(texts, answers),
        gates.overlap(list(figures.overlap), measurement.author_overlaps, measurement.clusters),
        gates.longest_copy(texts, measurement.corpus),
        leakage.personal(texts, measurement.requests, measurement.train),
        *of_training,
        _meaning_gate(figures, reference, author, reference_name, measurement),
        gates.coherence(coherence, coherence_author, coherence_note),
        *([measurement.format.gate(texts)] if measurement.format else []),
    ]
    return ArmEvaluation(
        name=output.name,
        label=output.label or output.name,
        num_replies=len(texts),
        style_gap_closed=gap_closed,
        style={witness: float(scores.mean()) for witness, scores in figures.style.items()} if has_style and figures.style else None,
        chrf=measurement.interval(figures.chrf),
        chrf_corpus=meaning.chrf_corpus(texts, answers),
        key_recall=None if np.isnan(figures.key_recall).all() else measurement.interval(figures.key_recall),
        key_add=None if np.isnan(figures.key_add).all() else float(np.nanmean(figures.key_add)),
        fact_recall=_fact_recall(figures, measurement),
        length_ratio=float(np.median([length_ratio(*pair) for pair in zip(texts, answers)])),
        end_rate=float(np.mean([reply.finish_reason == "stop" for reply in output.replies])),
        num_empty=sum(1 for text in texts if not text.strip()),
        rep_4=float(np.mean([rep_n(row, 4) for row in tokens])),
        distinct_2=float(np.mean([distinct_n(row, 2) for row in tokens])),
        zlib_ratio=float(np.mean([zlib_ratio(text) for text in texts])),
        overlap=float(figures.overlap.mean()),
        longest_copy_tokens=int(figures.longest_copy.max()),
        likelihood=_likelihood(held_out, held_out_base, measurement),
        gates=arm_gates,
        joint=_joint(figures, reference, author, measurement) if has_style else None,
        uses_training_text=output.uses_training_text,
        two_sample=measurement.two_sample(texts),
        register_shift=measurement.register_shift(texts),
        consistency=measurement.consistency(output.name),
        pools=measurement.pools.get(output.name, {}),
        learned={
            figure: measurement.interval(np.array(of_arm[output.name]))
            for figure, of_arm in measurement.learned.items()
            if output.name in of_arm
        },
    )


def _order_tests(
    calibration: Sequence[Example], coherence: Mapping[str, Sequence[TokenScores]], disordered: Mapping[str, Sequence[TokenScores]],
    measurement: _Measurement,
) -> dict[str, order.OrderTest]:  # fmt: skip
    """Who tells the order of the author's held-out texts: the base and, where it does not, a model of characters; empty where neither text nor
    shuffle was scored."""
    held_out = {CALIBRATION: [example.answer for example in calibration], AUTHOR: measurement.answers}
    scored = [name for name in held_out if name in coherence and name in disordered]
    texts = [text for name in scored for text in held_out[name]]
    if not texts:
        return {}
    of_base = ([gates.bits_per_byte(row) for name in scored for row in scores[name]] for scores in (coherence, disordered))
    found = {order.BASE: order.order_test(texts, *map(np.array, of_base))}
    if not found[order.BASE].passed and not measurement.style_note:
        found[order.CHARACTERS] = order.order_test(texts, *order.both_orders(texts, measurement.character_bits))
    return found


def _pools(
    measured: Mapping[str, _Figures], calibration: Sequence[Example], coherence: Mapping[str, Sequence[TokenScores]],
    disordered: Mapping[str, Sequence[TokenScores]], measurement: _Measurement,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Arm -> gate -> share of its pools that would pass as the author's; empty where style or the author's scale is missing, or nothing was
    scored, and without the gate of coherence where nobody tells order."""
    scored = coherence.keys() & disordered.keys()
    witness = next((name for name, test in measurement.order.items() if test.passed), "")
    if measurement.style_note or not measurement.verifier or CALIBRATION not in scored or len(calibration) < pools.MIN_OWN:
        return {}

    def features(name: str, texts: Sequence[str], requests: Sequence[str], style: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        bits = None
        if witness == order.BASE:
            bits = tuple(np.array(list(map(gates.bits_per_byte, scores[name]))) for scores in (coherence, disordered))
        elif witness == order.CHARACTERS:
            bits = order.both_orders(texts, measurement.character_bits)
        return pools.features(texts, requests, style, bits, measurement.corpus, measurement.closed)

    answers = [example.answer for example in calibration]
    requests = [request_text(example.messages) for example in calibration]
    own = pools.OwnScale.of(features(CALIBRATION, answers, requests, measurement.verifier.score(answers)))
    return {
        name: pools.passing_shares(
            own, features(name, figures.texts, measurement.requests, figures.style or {}), measurement.clusters, measurement.config.seed
        )
        for name, figures in measured.items() if name in scored
    }  # fmt: skip


def _training_gates(
    name: str, base_arm: str, held_out: Mapping[str, Sequence[TokenScores]] | None,
    training: Mapping[str, Sequence[TokenScores]] | None, documents: Sequence[str], exposures: Sequence[float], measurement: _Measurement,
) -> list[Gate]:  # fmt: skip
    """The gates that need the likelihood of what was trained on."""
    seen = _gain(_of(training, name), _of(training, base_arm), documents)
    unseen = _gain(_of(held_out, name), _of(held_out, base_arm), measurement.clusters)
    found = [gates.overfitting(seen, unseen), leakage.extraction(_of(training, name), _of(training, base_arm))]
    found.append(leakage.membership(seen, unseen, measurement.config.seed))
    return [*found, *([leakage.canary(exposures)] if exposures else [])]


def _gain(scores: Sequence[TokenScores] | None, base: Sequence[TokenScores] | None, documents: Sequence[str]) -> gates.Gain | None:
    """What tuning gained on each answer; None where one was not scored, or where the two cut text into different tokens."""
    if not scores or not base or [len(row.logprobs) for row in scores] != [len(row.logprobs) for row in base]:
        return None
    nats = np.array([before.nll - after.nll for before, after in zip(base, scores)])
    return gates.Gain(nats, np.array([len(row.logprobs) for row in scores]), list(documents))


def _gap_closed(arm: _Figures, base: _Figures, author: _Figures, measurement: _Measurement) -> tuple[Interval | None, str]:
    config = measurement.config
    scores = [figures.style["combined"] for figures in (arm, base, author) if figures.style is not None]
    return intervals.style_gap_closed(*scores, measurement.clusters, num_bootstrap=config.num_bootstrap, seed=config.seed)


def _fact_recall(figures: _Figures, measurement: _Measurement) -> Interval | None:
    if not figures.facts[:, 1].any():
        return None
    return measurement.interval([figures.facts[:, 2], figures.facts[:, 1]], lambda found, wanted: found / np.maximum(wanted, 1e-9))


def _meaning_gate(arm: _Figures, reference: _Figures, author: _Figures, name: str, measurement: _Measurement) -> Gate:
    def difference(own: np.ndarray, other: np.ndarray) -> Interval | None:
        if np.isnan(own).all() or np.isnan(other).all():
            return None
        return measurement.interval([own, other], lambda mean, other_mean: mean - other_mean)

    # Nobody has to keep more words of the request than the author does.
    recalls = [figures.key_recall for figures in (reference, author)]
    target = recalls[0] if np.isnan(recalls[0]).all() else min(recalls, key=lambda recall: float(np.nanmean(recall)))
    return gates.meaning(difference(arm.chrf, reference.chrf), difference(arm.key_recall, target), name)


def _joint(figures: _Figures, reference: _Figures, author: _Figures, measurement: _Measurement) -> Interval:
    """Share of replies that are in style, keep the meaning and pass the gates at once (after Krishna et al. 2020)."""
    assert figures.style is not None
    in_style = figures.style["combined"] >= measurement.author_style_p10
    recalls = author.key_recall[~np.isnan(author.key_recall)]
    enough_recall = max(float(np.percentile(recalls, 10)), 1e-9) if len(recalls) else math.inf
    by_recall = np.nan_to_num(figures.key_recall, nan=0.0) >= enough_recall
    by_chrf = np.isnan(figures.key_recall) & (figures.chrf >= np.median(reference.chrf))
    clean = ~figures.collapsed & figures.ended & (figures.longest_copy < gates.THRESHOLDS.copied_run_fail_tokens)
    clean &= figures.overlap <= gates.overlap_limit(measurement.author_overlaps)
    good = in_style & (by_recall | by_chrf) & clean
    return intervals.wilson(int(good.sum()), len(good))


def _likelihood(
    scores: Sequence[TokenScores] | None, base: Sequence[TokenScores] | None, measurement: _Measurement
) -> Likelihood | None:  # fmt: skip
    if not scores or not base:
        return None
    if not len(scores) == len(base) == len(measurement.examples):
        raise DataError(
            f"{len(scores)} scored answers (base: {len(base)}) for {len(measurement.examples)} test requests",
            remedy="Run `giong eval` again.",
        )  # fmt: skip
    nll, nll_base = (np.array([row.nll for row in rows]) for rows in (scores, base))
    tokens, num_bytes = np.array([len(row.logprobs) for row in scores]), np.array([row.num_bytes for row in scores])
    bits = nll / math.log(2)
    same_tokens = [len(row.logprobs) for row in base] == tokens.tolist()

    def per(gain: np.ndarray, units: np.ndarray) -> Interval:
        return measurement.interval([gain, units], lambda mean_gain, mean_units: mean_gain / mean_units)

    return Likelihood(
        float(bits.sum() / num_bytes.sum()), per((nll_base - nll) / math.log(2), num_bytes),
        float(nll.sum() / tokens.sum()), per(nll_base - nll, tokens) if same_tokens else None,
    )  # fmt: skip


def _best_prompt(prompts: Sequence[ArmEvaluation], base_arm: str) -> str:
    """The prompted arm that closes most of the gap among those that no gate fails; a parrot is no alternative."""
    sound = [arm for arm in prompts if arm.style_gap_closed and (not arm.failed_gates or arm.name == base_arm)]
    return max(sound, key=lambda arm: arm.style_gap_closed.point if arm.style_gap_closed else -math.inf).name


def _compare(measured: Mapping[str, _Figures], tuned: str, against: str, base_arm: str, measurement: _Measurement) -> Comparison:
    def gap_difference(arm: Any, other: Any, base: Any, author: Any) -> Any:
        return (arm - other) / (author - base)

    config = measurement.config
    scores = [figures.style["combined"] for name in (tuned, against, base_arm, AUTHOR) if (figures := measured[name]).style is not None]
    settings = {"num_bootstrap": config.num_bootstrap, "seed": config.seed}
    _, draws = intervals.bootstrap_draws(scores, measurement.clusters, gap_difference, **settings)
    interval = intervals.bootstrap(scores, measurement.clusters, gap_difference, **settings)
    return Comparison(tuned, against, interval, MARGIN, float(np.mean(draws >= MARGIN)))


def _numbers(
    scores: Mapping[str, Sequence[TokenScores]] | None, what: str, notes: list[str]
) -> dict[str, Sequence[TokenScores]] | None:  # fmt: skip
    """The arms whose likelihoods are numbers; a note on each of the others, which are as if they had not been scored."""
    if scores is None:
        return None
    for name, rows in scores.items():
        if num := sum(1 for row in rows if not math.isfinite(row.nll)):
            notes.append(
                f"{num} of {len(rows)} likelihoods of {what} under {name!r} are no numbers (the model overflows): they are not available. "
                "Try model.dtype float32."
            )  # fmt: skip
    return {name: rows for name, rows in scores.items() if all(math.isfinite(row.nll) for row in rows)}


def _without_author(background: Mapping[str, Sequence[str]], own: Sequence[str], notes: list[str]) -> dict[str, list[str]]:
    """The background without texts that are mostly the author's own, and a note on each voice that had some."""
    corpus = CorpusIndex(own)
    kept: dict[str, list[str]] = {}
    for voice, texts in background.items():
        kept[voice] = [text for text in texts if corpus.share_copied(text) < MAX_SHARED_WITH_AUTHOR]
        if num := len(texts) - len(kept[voice]):
            notes.append(f"{num} of {len(texts)} texts of the background voice {voice!r} are the author's own and were left out.")
    return kept


def _notes(measurement: _Measurement, coherence: Mapping[str, Sequence[TokenScores]] | None, arms: Sequence[ArmOutput]) -> list[str]:
    notes = [] if coherence else ["Coherence not checked: no replies were scored under the base."]
    if measurement.quality and measurement.quality.caution:
        notes.append(measurement.quality.caution)
    if len(set(measurement.clusters)) < 2:
        notes.append("All test requests come from one document: the intervals are too narrow for other documents.")
    if len(measurement.examples) < MIN_REQUESTS:
        notes.append(f"Only {len(measurement.examples)} test requests: below {MIN_REQUESTS} no gate and no interval is dependable.")
    same: dict[tuple[str, ...], list[str]] = {}
    for arm in arms:
        same.setdefault(tuple(reply.text for reply in arm.replies), []).append(arm.name)
    for texts, names in same.items():
        if not any(text.strip() for text in texts):
            notes.append(f"Every reply of {' and '.join(names)} is empty: its figures say nothing about style.")
        elif len(names) > 1:
            notes.append(f"{' and '.join(names)} gave the very same replies: one of them may not have been asked as it should.")
    return notes


def _of(scores: Mapping[str, Sequence[TokenScores]] | None, name: str) -> Sequence[TokenScores] | None:
    return scores.get(name) if scores else None
