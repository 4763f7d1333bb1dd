"""Counterfeits that run with every evaluation: whatever may not win, measured by the same code as every arm.

A measure that only ever sees honest arms cannot be shown to be wrong. Each control is stopped by one thing if the measures are
right: copies by the overlap, babble and loops by collapse or coherence, another author and the request itself by style, texts that
say something else by meaning. One that nothing stops is a defect of the gates, and the evaluation says so.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

from giong.data.words import is_unspaced

MAX_PASSING_SHARE = 0.05
"""Share of a control's texts that may be in style, keep the meaning and be clean at once (evaluation at most 5 %)."""

CONTROLS = {
    "training_copy": "passages of the training text, unchanged",
    "other_author": "other writers on other things",
    "shuffled_words": "the author's own answer with its words shuffled",
    "shuffled_spans": "the author's own answer with its spans of five words shuffled",
    "unigram_babble": "the author's words drawn one by one",
    "bigram_babble": "a chain over pairs of the author's words",
    "trigram_babble": "a chain over triples of the author's words",
    "looped_sentence": "one sentence of the author's answer over and over",
    "request": "the request itself",
    "half_and_half": "half the author's answer, half another writer's text",
}
"""Name -> what it is, in the order of the table."""

START, END = "\x02", "\x03"


def make_controls(
    answers: Sequence[str], requests: Sequence[str], training_texts: Sequence[str], other_texts: Sequence[str], seed: int = 0
) -> dict[str, list[str]]:
    """One text per test request and control, as long as the author's answer where it is made up; always the same for one seed.

    Without other writers (`other_texts` empty) the two controls that need them are left out, and without training text the copies
    and the babble.
    """
    generator = random.Random(seed)
    made: dict[str, list[str]] = {
        "shuffled_words": [_shuffled(answer, generator) for answer in answers],
        "shuffled_spans": [shuffled_spans(answer, generator) for answer in answers],
        "looped_sentence": [_looped(answer) for answer in answers],
        "request": list(requests),
    }
    if training_texts:
        made["training_copy"] = _drawn(training_texts, len(answers), generator)
        for name, order in (("unigram_babble", 0), ("bigram_babble", 1), ("trigram_babble", 2)):
            chain = _Chain(training_texts, order)
            made[name] = [chain.text(len(answer.split()), generator) for answer in answers]
    if other_texts:
        made["other_author"] = _drawn(other_texts, len(answers), generator)
        made["half_and_half"] = [
            " ".join([*answer.split()[: len(answer.split()) // 2], *other.split()[len(other.split()) // 2 :]])
            for answer, other in zip(answers, _drawn(other_texts, len(answers), generator))
        ]
    return {name: made[name] for name in CONTROLS if name in made}


def alarms(controls: Mapping[str, tuple[Sequence[str], float | None, float | None]]) -> list[str]:
    """A sentence per control that nothing stops; per control its failed gates, the lowest plausible share of texts that pass, and the share
    of pools that do (None where none were judged)."""
    return [
        f"The control {name.replace('_', ' ')!r} ({CONTROLS[name]}) fails no gate, and more than {MAX_PASSING_SHARE:.0%} of its texts count as "
        "good: the measures cannot be trusted on this author."
        for name, (failed, passing, of_pools) in controls.items()
        if not failed and passing is not None and passing > MAX_PASSING_SHARE and (of_pools is None or of_pools > MAX_PASSING_SHARE)
    ]


class _Chain:
    """A Markov chain over words; order 0 draws each word alone."""

    def __init__(self, texts: Sequence[str], order: int) -> None:
        self.order = order
        self.following: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for text in texts:
            tokens = [START] * order + text.split() + [END] * (order > 0)
            for index in range(order, len(tokens)):
                self.following[tuple(tokens[index - order : index])].append(tokens[index])

    def text(self, num_words: int, generator: random.Random) -> str:
        """As many words; a chain that comes to an end begins anew."""
        said: list[str] = []
        state = (START,) * self.order
        while len(said) < num_words:
            word = generator.choice(self.following[state])
            if word == END:
                state = (START,) * self.order
                continue
            said.append(word)
            state = (*state, word)[1:] if self.order else ()
        return " ".join(said)


def _drawn(texts: Sequence[str], count: int, generator: random.Random) -> list[str]:
    """`count` of the texts, each as seldom twice as can be."""
    drawn: list[str] = []
    while len(drawn) < count:
        drawn += generator.sample(list(texts), min(len(texts), count - len(drawn)))
    return drawn


def shuffled_spans(text: str, generator: random.Random, length: int = 5) -> str:
    """Spans of five words (ten characters of a script without spaces) in random order: each is fluent, the whole says nothing."""
    unspaced = bool(text) and 2 * sum(map(is_unspaced, text)) >= len(text)
    parts, length = (list(text), 2 * length) if unspaced else (text.split(), length)
    spans = [parts[start : start + length] for start in range(0, len(parts), length)]
    generator.shuffle(spans)
    return ("" if unspaced else " ").join(part for span in spans for part in span)


def _shuffled(text: str, generator: random.Random) -> str:
    parts = text.split()
    generator.shuffle(parts)
    return " ".join(parts)


def _looped(text: str) -> str:
    sentence = re.split(r"(?<=[.!?。！？])\s*", text.strip())[0]
    times = max(2, -(-len(text) // max(len(sentence), 1)))
    return " ".join([sentence] * times)
