"""The gates: what a style score must never be read without.

A loop, a copy of the training text and a babbler of the author's phrases all sound like the author; each is caught by one
of these and by nothing else. Every threshold stands in `THRESHOLDS`; the author's own unseen texts set the bands.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from giong.contracts import Reply, TokenScores
from giong.evaluation.metrics.intervals import bootstrap, bootstrap_draws, median_interval, wilson
from giong.evaluation.metrics.talk import assistant_talk, words_beyond
from giong.evaluation.metrics.text import CHARACTERS_PER_WORD, CorpusIndex, distinct_n, length_ratio, rep_n, word_spans, words, zlib_ratio
from giong.sizing.interval import Interval

Status = Literal["pass", "warn", "fail", "not available"]


@dataclass(frozen=True, slots=True)
class Thresholds:
    """All limits of all gates, in one place."""

    forgetting_warn_nats: float = 0.05
    forgetting_fail_nats: float = 0.15
    rep_4_floor: float = 0.02
    rep_4_times_author_p95: float = 2.0
    distinct_2_times_author_median: float = 0.9
    zlib_below_author_p1: float = 1.15
    zlib_above_author_p99: float = 1.25
    collapse_share: float = 0.02
    end_share: float = 0.98
    empty_share: float = 0.01
    small_sample: int = 50
    small_sample_misses: int = 1
    log_length_ratio: float = 0.18
    length_ks_p: float = 0.01
    overlap_above_author_p95: float = 0.01
    copied_run_fail_tokens: int = 50
    copied_run_warn_words: int = 20
    meaning_margin_chrf: float = 2.0
    meaning_margin_key_recall: float = 0.05
    overfitting_warn_nats: float = 0.5
    overfitting_fail_nats: float = 1.5
    surplus_share: float = 0.02
    extraction_prefix_tokens: int = 20
    extraction_tokens: int = 50
    extraction_samples: int = 100
    membership_warn_auc: float = 0.80
    canary_exposure_share: float = 0.5
    valid_format_share: float = 0.95
    coherence_band: tuple[float, float] = (5.0, 95.0)
    coherence_item_band: tuple[float, float] = (1.0, 99.0)
    coherence_warn_share: float = 0.10
    order_share: float = 0.80
    """Of the author's held-out texts, surely likelier under the base than their own shuffle. With gains that vary normally, a base that orders
    79 % lets 5 % of pools of ten shuffles over the limit of `order_gain`, a blind one (50 %) half of them."""


THRESHOLDS = Thresholds()


@dataclass(frozen=True, slots=True)
class Gate:
    """One gate of one arm: the measured value, the limit in words, what came of it, and the 95 % interval of the value if it has one."""

    name: str
    value: float | None
    threshold_text: str
    status: Status
    explanation: str
    interval: Interval | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def forgetting(general: Sequence[TokenScores] | None, general_base: Sequence[TokenScores] | None) -> Gate:
    """How much less likely general text became: NLL(arm) - NLL(base), nats per token, on the same texts."""
    limits = THRESHOLDS
    text = f"at most +{limits.forgetting_warn_nats:.2f} nats per token; fails above +{limits.forgetting_fail_nats:.2f}"
    if not general or not general_base:
        return Gate("forgetting", None, text, "not available", "The likelihood of general text was not measured for this arm.")
    tokens = [len(scores.logprobs) for scores in general]
    if tokens != [len(scores.logprobs) for scores in general_base]:
        return Gate("forgetting", None, text, "not available", "This arm and the base cut text into different tokens.")
    losses = [arm.nll - base.nll for arm, base in zip(general, general_base)]
    interval = bootstrap([np.array(losses), np.array(tokens)], [str(number) for number in range(len(tokens))], lambda loss, num: loss / num)
    delta = interval.point
    status: Status = "fail" if delta > limits.forgetting_fail_nats else "warn" if delta > limits.forgetting_warn_nats else "pass"
    explanation = f"General text costs {delta:+.3f} nats per token against the base ({100 * math.expm1(delta):+.0f} % perplexity)."
    return Gate("forgetting", delta, text, status, explanation, interval)


@dataclass(frozen=True, slots=True)
class Gain:
    """What tuning gained on N answers: nats over the base, tokens (both of shape (N,)), and the document of each."""

    nats: np.ndarray
    tokens: np.ndarray
    documents: Sequence[str]

    def per_token(self, seed: int = 0) -> tuple[float, np.ndarray]:
        """Nats per token, and its values over resampled documents."""
        return bootstrap_draws([self.nats, self.tokens], self.documents, lambda nats, tokens: nats / tokens, seed=seed)


def overfitting(training: Gain | None, test: Gain | None) -> Gate:
    """How much more tuning gained on the training answers than on the author's unseen ones, nats per token.

    Gains and not losses are compared, because the two sides need not be equally hard. A model that made unseen answers less likely
    fails whatever the difference.
    """
    limits = THRESHOLDS
    text = (
        f"at most {limits.overfitting_warn_nats:g} nats per token; fails above {limits.overfitting_fail_nats:g}, or where unseen text lost"
    )
    if training is None or test is None:
        return Gate("overfitting", None, text, "not available", "The likelihood of training answers was not measured for this arm.")
    (seen, seen_draws), (unseen, unseen_draws) = training.per_token(0), test.per_token(1)
    gap = seen - unseen
    low, high = np.quantile(seen_draws - unseen_draws, [0.025, 0.975])
    has_lost = float(np.quantile(unseen_draws, 0.975)) < 0
    status: Status = "fail" if gap > limits.overfitting_fail_nats or has_lost else "warn" if gap > limits.overfitting_warn_nats else "pass"
    explanation = f"Tuning gained {seen:+.2f} nats per token on the training answers and {unseen:+.2f} on unseen ones."
    return Gate("overfitting", gap, text, status, explanation, Interval(gap, float(low), float(high)))


@dataclass
class CollapseBand:
    """The author's own repetition at equal length, and whether a text lies within it.

    A text is judged in windows as long as the author's texts allow, because compression and distinct-2 depend on length
    and because a loop at the end of a long text must not hide behind its good beginning.
    """

    author_texts: Sequence[str]
    _bands: dict[int, tuple[float, float, float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._pieces = [(text, word_spans(text)) for text in self.author_texts if text.strip()]
        lengths = sorted(len(spans) for _, spans in self._pieces)
        # At least half of the author's texts reach the longest window.
        self._longest = lengths[(len(lengths) - 1) // 2] if lengths else 0

    def faults(self, text: str) -> list[str]:
        """Which of rep-4, distinct-2 and zlib leave the author's band; empty where none does (or nothing can be said)."""
        spans = word_spans(text)
        size = min(len(spans), self._longest)
        if size < 5:
            return []
        max_rep, min_distinct, min_zlib, max_zlib = self._band(size)
        found = set()
        for start in sorted({*range(0, len(spans) - size + 1, size), len(spans) - size}):
            piece = text[spans[start][0] : spans[start + size - 1][1]]
            tokens = words(piece)
            found |= {"rep-4"} if rep_n(tokens, 4) > max_rep else set()
            found |= {"distinct-2"} if distinct_n(tokens, 2) < min_distinct else set()
            found |= {"zlib"} if not min_zlib <= zlib_ratio(piece) <= max_zlib else set()
        return sorted(found)

    def _band(self, size: int) -> tuple[float, float, float, float]:
        if size not in self._bands:
            pieces = [text[spans[0][0] : spans[size - 1][1]] for text, spans in self._pieces if len(spans) >= size]
            tokens = [words(piece) for piece in pieces]
            reps, distincts, ratios = [rep_n(row, 4) for row in tokens], [distinct_n(row, 2) for row in tokens], [*map(zlib_ratio, pieces)]
            limits = THRESHOLDS
            self._bands[size] = (
                max(limits.rep_4_times_author_p95 * float(np.percentile(reps, 95)), limits.rep_4_floor),
                min(limits.distinct_2_times_author_median * float(np.median(distincts)), float(np.percentile(distincts, 1))),
                float(np.percentile(ratios, 1)) / limits.zlib_below_author_p1,
                float(np.percentile(ratios, 99)) * limits.zlib_above_author_p99,
            )
        return self._bands[size]


def collapse(texts: Sequence[str], band: CollapseBand, author_texts: Sequence[str] = ()) -> Gate:
    """Share of replies that repeat themselves, or compress, unlike anything that the author wrote.

    `author_texts` are the author's own unseen answers to the same requests: as many more may be outside as of those.
    """
    limits = THRESHOLDS
    text = f"at most {limits.collapse_share:.0%} of the replies outside the author's band (1 reply where there are fewer than 50)"
    text += ", beyond what the author's own unseen answers show" if author_texts else ""
    faults = [band.faults(reply) for reply in texts]
    num_failing = sum(1 for fault in faults if fault)
    names = sorted({name for fault in faults for name in fault})
    allowed = _allowed_misses(len(texts), limits.collapse_share) + sum(1 for own in author_texts if band.faults(own))
    explanation = f"{num_failing} of {len(texts)} replies are outside" + (f" ({', '.join(names)})." if names else ".")
    status: Status = "pass" if num_failing <= allowed else "fail"
    return Gate("collapse", num_failing / max(len(texts), 1), text, status, explanation, wilson(num_failing, len(texts)))


def end_of_turn(replies: Sequence[Reply]) -> Gate:
    """Share of replies that end by themselves; empty replies are misses of their own."""
    limits = THRESHOLDS
    text = f"at least {limits.end_share:.0%} end by themselves (1 miss allowed below 50), at most {limits.empty_share:.0%} are empty"
    num_cut = sum(1 for reply in replies if reply.finish_reason != "stop")
    num_empty = sum(1 for reply in replies if not reply.text.strip())
    ended = 1 - num_cut / max(len(replies), 1)
    kept = num_cut <= _allowed_misses(len(replies), 1 - limits.end_share) and num_empty <= _allowed_misses(len(replies), limits.empty_share)
    explanation = f"{num_cut} of {len(replies)} replies ran into the length limit, {num_empty} are empty."
    share = wilson(len(replies) - num_cut, len(replies))
    return Gate("end of turn", ended, text, "pass" if kept else "fail", explanation, share)


def surplus(texts: Sequence[str], author_texts: Sequence[str]) -> Gate:
    """Share of replies that go on after the answer: another turn, the answer once more, an assistant's opening or closing."""
    limits = THRESHOLDS
    text = f"at most {limits.surplus_share:.0%} of the replies (1 where there are fewer than 50), beyond what the author's own answers show"
    beyond = [words_beyond(reply) for reply in texts]
    num_failing = sum(1 for reply, num in zip(texts, beyond) if num or assistant_talk(reply))
    allowed = _allowed_misses(len(texts), limits.surplus_share) + sum(1 for own in author_texts if words_beyond(own) or assistant_talk(own))
    explanation = f"{num_failing} of {len(texts)} replies say more than the answer, {sum(beyond)} words of them after its end."
    status: Status = "pass" if num_failing <= allowed else "fail"
    return Gate("surplus", num_failing / max(len(texts), 1), text, status, explanation, wilson(num_failing, len(texts)))


def length(texts: Sequence[str], author_texts: Sequence[str]) -> Gate:
    """Median log length ratio to the author's own answers; a warning where the spread of lengths differs."""
    from scipy.stats import ks_2samp

    limits = THRESHOLDS
    text = f"median log length ratio within ±{limits.log_length_ratio} (about ±20 %)"
    if not texts:
        return Gate("length", None, text, "not available", "There are no replies.")
    ratios = [math.log(length_ratio(reply, own)) for reply, own in zip(texts, author_texts, strict=True)]
    interval = median_interval(ratios)
    median = interval.point
    explanation = f"The median reply has {math.exp(median):.2f} times the words of the author's answer."
    if abs(median) > limits.log_length_ratio:
        return Gate("length", median, text, "fail", explanation, interval)
    p_value = float(ks_2samp([len(words(reply)) for reply in texts], [len(words(own)) for own in author_texts]).pvalue)
    if p_value <= limits.length_ks_p:
        note = f"{explanation} The lengths spread differently from the author's (Kolmogorov-Smirnov p = {p_value:.4f})."
        return Gate("length", median, text, "warn", note, interval)
    return Gate("length", median, text, "pass", explanation, interval)


def overlap_limit(author_shares: Sequence[float]) -> float:
    """Largest share of copied 8-word runs that passes: the author's own 95th percentile plus one point."""
    return float(np.percentile(author_shares, 95)) + THRESHOLDS.overlap_above_author_p95 if len(author_shares) else math.nan


def overlap(shares: Sequence[float], author_shares: Sequence[float], documents: Sequence[str] = ()) -> Gate:
    """Mean share of 8-word runs that stand in the training text but not in the request."""
    limit = overlap_limit(author_shares)
    interval = bootstrap(np.asarray(shares), documents or [str(number) for number in range(len(shares))]) if len(shares) else None
    value = interval.point if interval else 0.0
    text = f"at most {limit:.1%}: the author's own 95th percentile plus one point"
    num_above = sum(1 for share in shares if share > limit)
    explanation = f"{value:.1%} of the 8-word runs stand in the training text; {num_above} of {len(shares)} replies are above the limit."
    return Gate("overlap", value, text, "pass" if value <= limit else "fail", explanation, interval)


def longest_copy(texts: Sequence[str], corpus: CorpusIndex) -> Gate:
    """Longest run of words that any reply shares with the training text."""
    limits = THRESHOLDS
    warn_tokens = limits.copied_run_warn_words * (CHARACTERS_PER_WORD if corpus.unspaced else 1)
    text = f"under {limits.copied_run_warn_words} words; fails from {limits.copied_run_fail_tokens} tokens"
    longest = max((corpus.longest_run(reply) for reply in texts), default=0)
    status: Status = "fail" if longest >= limits.copied_run_fail_tokens else "warn" if longest >= warn_tokens else "pass"
    return Gate("longest copy", float(longest), text, status, f"The longest run shared with the training text is {longest} tokens.")


def meaning(chrf_difference: Interval | None, key_recall_difference: Interval | None, reference: str) -> Gate:
    """Non-inferiority to `reference` (few-shot) by key recall and by chrF++; inputs are paired differences.

    Key recall decides first: chrF++ also rewards style, so an arm may gain it while it loses the content. Shown to be worse
    in key recall fails; shown to be worse in chrF++ alone warns; shown in neither direction warns too.
    """
    limits = THRESHOLDS
    text = f"not worse than {reference} by {limits.meaning_margin_chrf:g} chrF++ or {limits.meaning_margin_key_recall:.0%} key recall"
    chrf, described_chrf = _non_inferior(chrf_difference, limits.meaning_margin_chrf, "chrF++ {:+.1f} [{:+.1f}, {:+.1f}]")
    margin, form = limits.meaning_margin_key_recall, "key recall {:+.2f} [{:+.2f}, {:+.2f}]"
    recall, described_recall = _non_inferior(key_recall_difference, margin, form)
    described = ", ".join(filter(None, [described_recall, described_chrf]))
    if not described:
        return Gate("meaning", None, text, "not available", f"There is nothing to compare with ({reference}).")
    interval = key_recall_difference if described_recall else chrf_difference
    value = interval.point if interval else None
    status: Status = "warn"
    if recall == "worse" or (chrf == "worse" and recall != "kept"):
        status, explanation = "fail", f"Worse than {reference}: {described}."
    elif chrf == "worse":
        explanation = f"Key items are kept, but the wording lies further from the author's: {described}."
    elif "kept" in (recall, chrf):
        status, explanation = "pass", f"Not worse than {reference}: {described}."
    else:
        explanation = f"Too few requests to rule out a loss against {reference}: {described}."
    return Gate("meaning", value, text, status, explanation, interval)


def _non_inferior(difference: Interval | None, margin: float, form: str) -> tuple[str, str]:
    """("kept", "worse" or "" where undecided, description); both empty where there is no measurement."""
    if difference is None or math.isnan(difference.point):
        return "", ""
    state = "worse" if difference.high < -margin else "kept" if difference.low >= -margin else ""
    return state, form.format(difference.point, difference.low, difference.high)


def coherence(replies: Sequence[TokenScores] | None, author: Sequence[TokenScores] | None, not_measured: str = "") -> Gate:
    """Bits per byte of the replies under the untuned base, two-sided: loops lie below the author's band, babble above.

    `not_measured` says why the base's likelihood means nothing here (`evaluation.order`), and is empty where it does.
    """
    limits = THRESHOLDS
    low_percent, high_percent = limits.coherence_band
    text = f"median bits per byte under the base within the author's {low_percent:g}th to {high_percent:g}th percentile"
    if not replies or not author:
        why = "Coherence not checked: the replies were not scored under the base, or their likelihoods are no numbers (try model.dtype float32)."
        return Gate("coherence", None, text, "not available", why)
    if not_measured:
        return Gate("coherence", None, text, "not available", not_measured)
    own = np.array([bits_per_byte(scores) for scores in author])
    values = np.array([bits_per_byte(scores) for scores in replies])
    interval = median_interval(values)
    median, (low, high) = interval.point, np.nanpercentile(own, [low_percent, high_percent])
    item_low, item_high = np.nanpercentile(own, limits.coherence_item_band)
    outside = float(np.mean(~((values >= item_low) & (values <= item_high))))
    explanation = f"{median:.2f} bits per byte (author {low:.2f} to {high:.2f}); {outside:.0%} of the replies are far outside."
    status: Status = "fail" if not low <= median <= high else "warn" if outside > limits.coherence_warn_share else "pass"
    return Gate("coherence", median, text, status, explanation, interval)


def bits_per_byte(scores: TokenScores) -> float:
    """NLL in bits over UTF-8 bytes; NaN for an empty text."""
    return scores.nll / math.log(2) / scores.num_bytes if scores.num_bytes else math.nan


def _allowed_misses(num: int, share: float) -> int:
    limits = THRESHOLDS
    return limits.small_sample_misses if num < limits.small_sample else math.floor(share * num + 1e-9)
