"""Do the gates tell an author from counterfeits? Every voice plays the author once, and pools of ten texts are judged.

    python benchmarks/controls.py                     # the bundled author and background voices
    python benchmarks/controls.py --data DIR          # limits from the bundled voices, other authors (.jsonl, .jsonl.gz) are tested

For each fold a voice's documents are split into training, calibration and test; one other voice is unknown to the verifier and plays
"another author"; the others are its background. Limits are set jointly on half of the voices (`pools.py`) and tested on
the other half, so no author is judged by limits that were set on him. The last line is the summary; the figures of the bundled voices
go to benchmarks/results and the table into docs/concepts/evaluation.md.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pools
from measuring import last_line
from tables import markers, replace_between, table

from giong import samples
from giong.contracts import Document, ScoreRequest
from giong.data.cleaning import cut_passages
from giong.data.synthesis.stand_in import is_english, neutral_rewrite, outline
from giong.evaluation.controls import make_controls
from giong.evaluation.gates import bits_per_byte
from giong.evaluation.metrics import meaning
from giong.evaluation.metrics.style import StyleVerifier, split_background, window_length
from giong.evaluation.metrics.text import CorpusIndex, ngrams, rep_n, words
from giong.evaluation.results import finite
from giong.workspace import read_json, write_json

ROOT = Path(__file__).resolve().parents[1]
BUNDLED_RESULT = ROOT / "benchmarks" / "results" / "controls-bundled.json"
PAGE = ROOT / "docs" / "concepts" / "evaluation.md"
MARKERS = markers("benchmarks/controls.py")
NUM_FOLDS = 4
MAX_TEST_TEXTS = 12
OWN = "the author, unseen"
CONTROLS = (
    "training_copy", "other_author", "other_answer", "shuffled_words", "shuffled_spans", "unigram_babble", "bigram_babble", "trigram_babble",
    "looped_sentence", "request", "half_and_half",
)  # fmt: skip


@dataclass(frozen=True)
class Piece:
    document: str
    text: str
    request: str


Voices = dict[str, list[Piece]]
Pools = Mapping[str, dict[str, list[dict[str, np.ndarray]]]]
"""Author -> kind of text -> standardised pool means of each fold."""


def bundled() -> Voices:
    """The sample author with the recorded requests, and the eight background voices with the stand-in's."""
    voices: Voices = {"author": [Piece(row["document_id"], row["text"], row["neutral_rewrite"]) for row in samples.author_rows()]}
    for row in map(json.loads, samples.BACKGROUND_PATH.read_text(encoding="utf-8").splitlines()):
        voices.setdefault(row["voice"], []).append(Piece(row["document_id"], row["text"], request_for(row["text"])))
    return voices


def folder_voices(folder: Path) -> Voices:
    """One voice per file of documents (`id`, `text`), cut into passages as `giong import` cuts them."""
    voices: Voices = {}
    for path in sorted([*folder.glob("*.jsonl"), *folder.glob("*.jsonl.gz")]):
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        documents = [Document(row["id"], row["text"]) for row in map(json.loads, raw.decode().splitlines())]
        passages = cut_passages(documents, 60, 160)
        voices[path.name.partition(".")[0]] = [Piece(passage.document_id, passage.text, request_for(passage.text)) for passage in passages]
    if not voices:
        raise SystemExit(f"{folder} holds no .jsonl or .jsonl.gz file; give a folder with one file of documents per author.")
    return voices


def request_for(text: str) -> str:
    return neutral_rewrite(text) if is_english(text) else outline(text)


class BaseModel:
    """Bits per byte of a text under the bundled base, each text scored once."""

    def __init__(self) -> None:
        import torch

        from giong.config import ModelConfig
        from giong.engine.score import LocalScorer
        from giong.models.load import load_model

        torch.set_num_threads(1)
        self._scorer = LocalScorer(load_model(ModelConfig(), dtype=torch.float32))
        self._known: dict[str, float] = {}

    def bits_per_byte(self, texts: Sequence[str]) -> np.ndarray:
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        self._known.update(zip(new, map(bits_per_byte, self._scorer.score([ScoreRequest(text) for text in new]))))
        return np.array([self._known[text] for text in texts])


def folds(pieces: Sequence[Piece]) -> list[tuple[list[Piece], list[Piece], list[Piece]]]:
    """(training, calibration, test) for each fold: whole documents, a quarter each for calibration and test."""
    documents = list(dict.fromkeys(piece.document for piece in pieces))
    random.Random(0).shuffle(documents)
    parts = [set(documents[start::NUM_FOLDS]) for start in range(NUM_FOLDS)]
    made = []
    for fold in range(NUM_FOLDS):
        test, calibration = parts[fold], parts[(fold + 1) % NUM_FOLDS]
        train = set(documents) - test - calibration
        made.append(tuple([piece for piece in pieces if piece.document in side] for side in (train, calibration, test)))
    return made


def spread(pieces: Sequence[Piece], limit: int) -> list[Piece]:
    """At most `limit` pieces, in turns from each document."""
    by_document: dict[str, list[Piece]] = defaultdict(list)
    for piece in pieces:
        by_document[piece.document].append(piece)
    turns = [group[turn] for turn in range(limit) for group in by_document.values() if turn < len(group)]
    return turns[:limit]


def shuffled_spans(text: str, generator: random.Random, length: int = 5) -> str:
    """Spans of five words in random order: each is fluent, the whole says nothing."""
    parts = text.split()
    spans = [parts[start : start + length] for start in range(0, len(parts), length)]
    generator.shuffle(spans)
    return " ".join(word for span in spans for word in span)


def texts_of(train: list[Piece], test: list[Piece], stranger: list[Piece], seed: int) -> dict[str, list[tuple[str, str, str]]]:
    """Name -> (document, request, text) of the author's own test texts and of every control."""
    generator = random.Random(seed)
    answers, requests = [piece.text for piece in test], [piece.request for piece in test]
    strange = [stranger[place % len(stranger)] for place in generator.sample(range(len(stranger) * 2), min(len(test), 2 * len(stranger)))]
    made = make_controls(answers, requests, [piece.text for piece in train], [piece.text for piece in strange], seed)
    made["shuffled_spans"] = [shuffled_spans(answer, generator) for answer in answers]
    found = {OWN: [(piece.document, piece.request, piece.text) for piece in test]}
    for name in CONTROLS:
        if name != "other_answer":
            found[name] = [(piece.document, piece.request, text) for piece, text in zip(test, made[name])]
    found["other_answer"] = [(piece.document, piece.request, piece.text) for piece in strange]
    return found


def echoed(text: str, request: str, num_words: int = 8) -> float:
    """Share of the text's 8-word runs that stand in its request."""
    runs, asked = ngrams(words(text), num_words), set(ngrams(words(request), num_words))
    return sum(run in asked for run in runs) / len(runs) if runs else 0.0


def measured(
    rows: Sequence[tuple[str, str, str]], verifier: StyleVerifier, corpus: CorpusIndex, base: BaseModel, closed: frozenset[str]
) -> dict[str, np.ndarray]:
    """The features that `pools` judges, of each (document, request, text)."""
    texts = [text for _, _, text in rows]
    style, bits = verifier.score(texts), base.bits_per_byte(texts)
    # Against its own spans in another order: hard words make a text unlikely too, but not less likely than its own shuffle.
    disordered = [shuffled_spans(text, random.Random(text)) for text in texts]
    return {
        "style": style["combined"],
        "masked_style": style["mask"],
        "bits_per_byte": bits,
        "order_gain": base.bits_per_byte(disordered) - bits,
        "rep_4": np.array([rep_n(words(text), 4) for text in texts]),
        "copied_8": np.array([corpus.share_copied(text, request) for _, request, text in rows]),
        "copied_4": np.array([corpus.share_copied(text, request, n=corpus.overlap_tokens // 2) for _, request, text in rows]),
        "echoed_8": np.array([echoed(text, request) for _, request, text in rows]),
        "key_recall": np.array([meaning.key_recall(request, text, closed) for _, request, text in rows]),
    }


def judge_author(name: str, voices: Voices, others: Voices, base: BaseModel) -> dict[str, list[dict[str, np.ndarray]]]:
    """Kind of text -> standardised pool means of every fold, of one voice as the author and `others` around it."""
    found: dict[str, list[dict[str, np.ndarray]]] = defaultdict(list)
    strangers = sorted(others)
    for fold, (train, calibration, test) in enumerate(folds(voices[name])):
        stranger = strangers[(fold + sum(map(ord, name))) % len(strangers)]
        background = {voice: [piece.text for piece in pieces] for voice, pieces in others.items() if voice != stranger}
        own = [piece.text for piece in train]
        fit, calibrate, _ = split_background(background, window_length(own))
        verifier = StyleVerifier().fit(own, fit).calibrate([piece.text for piece in calibration], calibrate)
        corpus, closed = CorpusIndex(own), meaning.closed_words([piece.request for piece in voices[name]])
        held_out = [(piece.document, piece.request, piece.text) for piece in spread(calibration, MAX_TEST_TEXTS)]
        scale = pools.OwnScale.of(measured(held_out, verifier, corpus, base, closed))
        for kind, rows in texts_of(train, spread(test, MAX_TEST_TEXTS), spread(others[stranger], MAX_TEST_TEXTS), fold).items():
            features = scale.standardised(measured(rows, verifier, corpus, base, closed))
            documents = [document for document, _, _ in rows]
            found[kind].append(pools.pool_means(features, documents, num=pools.NUM_POOLS // NUM_FOLDS, seed=fold))
    return found


def pass_rates(authors: Pools, limits: pools.Limits) -> dict[str, dict[str, dict[str, float]]]:
    """Author -> kind of text -> gate -> share of pools that pass."""
    rates: dict[str, dict[str, dict[str, float]]] = {}
    for name, kinds in authors.items():
        rates[name] = {}
        for kind, fold_pools in kinds.items():
            passed = [pools.passing(found, limits) for found in fold_pools]
            rates[name][kind] = {gate: float(np.mean([row[gate] for row in passed])) for gate in passed[0]}
    return rates


def tables_of(result: Mapping[str, Any]) -> str:
    """Pass rates by kind of text and gate, then by author."""
    gates, rates = [*pools.GATES, "all"], result["pass_rates"]
    by_kind = [[kind.replace("_", " "), *(f"{rates[kind][gate]:.0%}" for gate in gates)] for kind in rates]
    by_author = [_author_row(name, kinds) for name, kinds in sorted(result["authors"].items())]
    return "\n\n".join(
        [table(["pools of ten", *gates], by_kind), table(["author", "own pools that pass", "worst control", "its pools"], by_author)]
    )


def _author_row(name: str, kinds: Mapping[str, Mapping[str, float]]) -> list[str]:
    worst = max(CONTROLS, key=lambda kind: kinds[kind]["all"])
    return [name, f"{kinds[OWN]['all']:.0%}", worst.replace("_", " "), f"{kinds[worst]['all']:.0%}"]


def judged(names: Sequence[str], voices: Voices, base: BaseModel) -> Pools:
    """Each of `names` as the author among all voices."""
    found = {}
    for name in names:
        started = time.perf_counter()
        found[name] = judge_author(name, voices, {voice: pieces for voice, pieces in voices.items() if voice != name}, base)
        print(f"  {name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    return found


def in_halves(authors: Pools) -> tuple[dict[str, Any], list[pools.Limits]]:
    """Pass rates of all authors, each half by the limits of the other; and both limits."""
    names = sorted(authors)
    halves, rates, all_limits = (names[::2], names[1::2]), {}, []
    for tested, calibrated in (halves, halves[::-1]):
        limits = pools.set_limits([fold for name in calibrated for fold in authors[name][OWN]])
        rates |= pass_rates({name: authors[name] for name in tested}, limits)
        all_limits.append(limits)
    return rates, all_limits


def known_limits() -> pools.Limits:
    """Of both halves of the bundled voices the looser ones, from their result."""
    if not BUNDLED_RESULT.is_file():
        raise SystemExit(f"{BUNDLED_RESULT} holds the limits, and is not there yet; run `python benchmarks/controls.py` first.")
    both = read_json(BUNDLED_RESULT)["limits"]
    lows = {name: [limits[name][0] for limits in both] for name in both[0]}
    highs = {name: [limits[name][1] for limits in both] for name in both[0]}
    return {
        name: (-np.inf if None in lows[name] else min(lows[name]), np.inf if None in highs[name] else max(highs[name])) for name in lows
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with one file of documents per author to be tested")
    options = parser.parse_args()
    started, base, voices = time.perf_counter(), BaseModel(), bundled()
    if options.data:
        others, limits = folder_voices(options.data), known_limits()
        rates, all_limits = pass_rates(judged(sorted(others), {**voices, **others}, base), limits), [limits]
    else:
        rates, all_limits = in_halves(judged(sorted(voices), voices, base))
    gates = [*pools.GATES, "all"]
    mean = {kind: {gate: float(np.mean([rates[name][kind][gate] for name in rates])) for gate in gates} for kind in (OWN, *CONTROLS)}
    worst = max(CONTROLS, key=lambda kind: mean[kind]["all"])
    result = {
        "benchmark": "controls", "data": "others" if options.data else "bundled", "pool_size": pools.POOL_SIZE,
        "num_pools_per_author": pools.NUM_POOLS, "own_pass_rate": pools.OWN_PASS_RATE, "limits": [dict(limits) for limits in all_limits],
        "pass_rates": mean, "authors": rates, "seconds": time.perf_counter() - started,
    }  # fmt: skip
    print(tables_of(result))
    if not options.data:
        write_json(BUNDLED_RESULT, finite(result))
        PAGE.write_text(replace_between(PAGE.read_text(encoding="utf-8"), tables_of(result), str(PAGE), MARKERS), encoding="utf-8")
    print(last_line(author_pass=mean[OWN]["all"], worst_control=worst, worst_control_pass=mean[worst]["all"]))


if __name__ == "__main__":
    main()
