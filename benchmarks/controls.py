"""Do the gates tell an author from counterfeits? Every voice plays the author once, and pools of ten texts are judged.

    python benchmarks/controls.py                       # the bundled author and background voices
    python benchmarks/controls.py --only author,manual  # some of them, by the limits that ship
    python benchmarks/controls.py --data DIR            # other authors (.jsonl, .jsonl.gz), by the limits that ship
    python benchmarks/controls.py --vietnamese FILE     # the bundled Vietnamese author among the documents of FILE (.jsonl, .jsonl.gz)
    python benchmarks/controls.py --characters          # without the base, coherence by characters alone; by the limits that ship

For each fold a voice's documents are split into training, calibration and test; one other voice is unknown to the verifier and plays
"another author"; the others are its background. Pools are judged as every evaluation judges them (`giong.evaluation.pools`), and
requests are made as in a project without a teacher. Coherence is judged by the base where it tells the order of the author's texts, and
by a model of characters where it does not (`giong.evaluation.order`). Limits are set jointly on half of the voices and tested on the other half, so no
author is judged by limits that were set on him; the looser of both ship. The last line is the summary. The figures of the bundled
voices and of the Vietnamese author go to benchmarks/results, and their tables into docs/concepts/evaluation.md.
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
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from measuring import BUILD, RESULTS, ROOT, last_line
from tables import markers, replace_between, table

from giong import samples
from giong.config import DataConfig, SynthesisConfig
from giong.contracts import Document, Sampling, ScoreRequest
from giong.data.cleaning import cut_passages
from giong.data.synthesis.kinds import KINDS
from giong.data.synthesis.leak import why_rejected
from giong.data.synthesis.stand_in import StandIn
from giong.evaluation import controls, order, pools
from giong.evaluation.gates import bits_per_byte
from giong.evaluation.metrics import meaning
from giong.evaluation.metrics.style import StyleVerifier, split_background, window_length
from giong.evaluation.metrics.text import CorpusIndex
from giong.evaluation.results import finite
from giong.workspace import content_hash, read_json, write_json

PAGE = ROOT / "docs" / "concepts" / "evaluation.md"
NUM_FOLDS = 4
MAX_TEST_TEXTS = 12
NUM_VIETNAMESE_VOICES, TEXTS_PER_VOICE, TEXTS_PER_DOCUMENT = 8, 24, 4
OWN = "the author, unseen"
VIETNAMESE = "Vietnamese author"
CONTROLS = (*controls.CONTROLS, "other_answer")


@dataclass(frozen=True)
class Piece:
    document: str
    text: str
    request: str


Voices = dict[str, list[Piece]]
Pools = Mapping[str, dict[str, list[dict[str, np.ndarray]]]]
"""Author -> kind of text -> standardised pool means of each fold."""


def piece(document: str, text: str, recorded: str | None = None) -> Piece | None:
    """A text with its neutral rewrite, recorded or the stand-in's; None where a project would leave it out, as the rewrite gives it away."""
    kind, settings = KINDS["neutral_rewrite"], SynthesisConfig()
    asked = kind.teacher_messages(text, settings.language)
    request = recorded or StandIn(settings.max_shared_words).ask(asked, Sampling()).text
    return None if why_rejected(request, text, settings.max_shared_words) else Piece(document, text, request)


def bundled() -> Voices:
    """The sample author with the recorded requests, and the eight background voices with the stand-in's."""
    made = {"author": [piece(row["document_id"], row["text"], row["neutral_rewrite"]) for row in samples.author_rows()]}
    for row in samples.background_rows():
        made.setdefault(row["voice"], []).append(piece(row["document_id"], row["text"]))
    return _kept(made)


def folder_voices(folder: Path) -> Voices:
    """One voice per file of documents."""
    paths = sorted([*folder.glob("*.jsonl"), *folder.glob("*.jsonl.gz")])
    if not paths:
        raise SystemExit(f"{folder} holds no .jsonl or .jsonl.gz file; give a folder with one file of documents per author.")
    return _kept({path.name.partition(".")[0]: [piece(*passage) for passage in passages_of(path)] for path in paths})


def vietnamese_voices(path: Path) -> Voices:
    """The bundled Vietnamese author with his recorded English translations, and voices of whole documents drawn from the file."""
    made = {VIETNAMESE: [piece(row["document_id"], row["text"], row["translation"]) for row in samples.vietnamese_author_rows()]}
    by_document: dict[str, list[str]] = defaultdict(list)
    for document, text in passages_of(path, limit=NUM_VIETNAMESE_VOICES * TEXTS_PER_VOICE):
        by_document[document].append(text)
    documents = sorted(by_document)
    random.Random(0).shuffle(documents)
    for number, document in enumerate(documents):
        voice = made.setdefault(f"voice {number % NUM_VIETNAMESE_VOICES + 1}", [])
        voice += [piece(document, text) for text in by_document[document][: max(0, min(TEXTS_PER_DOCUMENT, TEXTS_PER_VOICE - len(voice)))]]
    return _kept(made)


def passages_of(path: Path, limit: int | None = None) -> list[tuple[str, str]]:
    """(document, passage) of a file of documents (`text`, and `id` or `title`), at most `limit` of them, cut as `giong import` cuts them."""
    settings = DataConfig()
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    rows = map(json.loads, raw.decode().splitlines())
    documents = [Document(str(row.get("id") or row.get("title") or number), row["text"]) for number, row in enumerate(rows)]
    if limit and len(documents) > limit:
        documents = random.Random(0).sample(documents, limit)
    return [(passage.document_id, passage.text) for passage in cut_passages(documents, settings.min_words, settings.max_words)]


def _kept(made: Mapping[str, Sequence[Piece | None]]) -> Voices:
    return {voice: [found for found in pieces if found] for voice, pieces in made.items()}


class BaseModel:
    """Bits per byte of a text under the bundled base, each text scored once and kept in build/controls: a run that was stopped goes on."""

    def __init__(self) -> None:
        import torch

        from giong.config import ModelConfig
        from giong.engine.score import LocalScorer
        from giong.models.load import load_model, model_identity

        torch.set_num_threads(1)
        self._scorer = LocalScorer(load_model(ModelConfig(), dtype=torch.float32))
        self._path = BUILD / "controls" / f"{model_identity(ModelConfig())}.json"
        self._known: dict[str, float] = read_json(self._path) if self._path.is_file() else {}

    def bits_per_byte(self, texts: Sequence[str]) -> np.ndarray:
        keys = [content_hash(text) for text in texts]
        new = {key: text for key, text in zip(keys, texts) if key not in self._known}
        self._known.update(zip(new, map(bits_per_byte, self._scorer.score([ScoreRequest(text) for text in new.values()]))))
        return np.array([self._known[key] for key in keys])

    def keep(self) -> None:
        write_json(self._path, self._known)


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


def texts_of(train: list[Piece], test: list[Piece], stranger: list[Piece], seed: int) -> dict[str, list[tuple[str, str, str]]]:
    """Name -> (document, request, text) of the author's own test texts and of every control."""
    generator = random.Random(seed)
    answers, requests = [piece.text for piece in test], [piece.request for piece in test]
    strange = [stranger[place % len(stranger)] for place in generator.sample(range(len(stranger) * 2), min(len(test), 2 * len(stranger)))]
    made = controls.make_controls(answers, requests, [piece.text for piece in train], [piece.text for piece in strange], seed)
    found = {OWN: [(piece.document, piece.request, piece.text) for piece in test]}
    for name in CONTROLS:
        if name != "other_answer":
            found[name] = [(piece.document, piece.request, text) for piece, text in zip(test, made[name])]
    found["other_answer"] = [(piece.document, piece.request, piece.text) for piece in strange]
    return found


def measured(
    rows: Sequence[tuple[str, str, str]],
    verifier: StyleVerifier,
    corpus: CorpusIndex,
    bits: order.BitsPerByte | None,
    closed: frozenset[str],
) -> dict[str, np.ndarray]:
    """What a pool is judged by, of each (document, request, text)."""
    requests, texts = [request for _, request, _ in rows], [text for _, _, text in rows]
    return pools.features(texts, requests, verifier.score(texts), order.both_orders(texts, bits) if bits else None, corpus, closed)


def judge_author(name: str, voices: Voices, others: Voices, base: BaseModel | None) -> dict[str, list[dict[str, np.ndarray]]]:
    """Kind of text -> standardised pool means of every fold, of one voice as the author and `others` around it."""
    found: dict[str, list[dict[str, np.ndarray]]] = defaultdict(list)
    strangers = sorted(others)
    sides = folds(voices[name])
    unknown = [strangers[(fold + sum(map(ord, name))) % len(strangers)] for fold in range(NUM_FOLDS)]
    backgrounds = [{voice: [piece.text for piece in others[voice]] for voice in others if voice != stranger} for stranger in unknown]
    witnesses = who_tells_order(sides, backgrounds, base)
    for fold, ((train, calibration, test), background, stranger, bits) in enumerate(zip(sides, backgrounds, unknown, witnesses)):
        own = [piece.text for piece in train]
        fit, calibrate, _ = split_background(background, window_length(own))
        verifier = StyleVerifier().fit(own, fit).calibrate([piece.text for piece in calibration], calibrate)
        corpus, closed = CorpusIndex(own), meaning.closed_words([piece.request for piece in voices[name]])
        held_out = [(piece.document, piece.request, piece.text) for piece in spread(calibration, MAX_TEST_TEXTS)]
        scale = pools.OwnScale.of(measured(held_out, verifier, corpus, bits, closed))
        for kind, rows in texts_of(train, spread(test, MAX_TEST_TEXTS), spread(others[stranger], MAX_TEST_TEXTS), fold).items():
            features = scale.standardised(measured(rows, verifier, corpus, bits, closed))
            documents = [document for document, _, _ in rows]
            found[kind].append(pools.pool_means(features, documents, num=pools.NUM_POOLS // NUM_FOLDS, seed=fold))
    return found


def who_tells_order(
    sides: Sequence[tuple[list[Piece], list[Piece], list[Piece]]], backgrounds: Sequence[Mapping[str, Sequence[str]]], base: BaseModel | None
) -> Sequence[order.BitsPerByte | None]:  # fmt: skip
    """What judges coherence in each fold: the base if it tells the order of the author's test texts, else characters if they do, else nothing."""
    tested = [[piece.text for piece in spread(test, MAX_TEST_TEXTS)] for _, _, test in sides]
    read = [[*(piece.text for piece in train), *chain.from_iterable(rest.values())] for (train, _, _), rest in zip(sides, backgrounds)]
    for name in (order.BASE, order.CHARACTERS) if base else (order.CHARACTERS,):
        bits = [base.bits_per_byte] * len(sides) if base and name == order.BASE else [order.character_bits(texts) for texts in read]
        both = zip(*(order.both_orders(texts, of_fold) for texts, of_fold in zip(tested, bits)))
        found = order.order_test([*chain.from_iterable(tested)], *map(np.concatenate, both))
        print(f"    {name}: {found.figures}", file=sys.stderr)
        if found.passed:
            return bits
    return [None] * len(sides)


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
    by_kind = [[kind.replace("_", " "), *(_share(rates[kind][gate]) for gate in gates)] for kind in rates]
    by_author = [_author_row(name, kinds) for name, kinds in sorted(result["authors"].items())]
    return "\n\n".join(
        [table(["pools of ten", *gates], by_kind), table(["author", "own pools that pass", "worst control", "its pools"], by_author)]
    )


def _share(value: float) -> str:
    return "not measured" if np.isnan(value) else f"{value:.0%}"


def _author_row(name: str, kinds: Mapping[str, Mapping[str, float]]) -> list[str]:
    worst = max(CONTROLS, key=lambda kind: kinds[kind]["all"])
    return [name, f"{kinds[OWN]['all']:.0%}", worst.replace("_", " "), f"{kinds[worst]['all']:.0%}"]


def judged(names: Sequence[str], voices: Voices, base: BaseModel | None) -> Pools:
    """Each of `names` as the author among all voices."""
    found = {}
    for name in names:
        started = time.perf_counter()
        found[name] = judge_author(name, voices, {voice: pieces for voice, pieces in voices.items() if voice != name}, base)
        if base:
            base.keep()
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--only", metavar="VOICE,...", help="these of the bundled voices; nothing is written")
    chosen.add_argument("--data", type=Path, help="folder with one file of documents per author to be tested; nothing is written")
    chosen.add_argument("--vietnamese", type=Path, metavar="FILE", help="file of Vietnamese documents by many writers")
    chosen.add_argument("--characters", action="store_true", help="coherence by characters alone, without the base; nothing is written")
    options = parser.parse_args()
    voices = vietnamese_voices(options.vietnamese) if options.vietnamese else bundled()
    tested, data = sorted(voices), "vietnamese" if options.vietnamese else "bundled"
    if options.data:
        others = folder_voices(options.data)
        voices, tested = {**voices, **others}, sorted(others)
    elif options.vietnamese:
        tested = [VIETNAMESE]
    elif options.only:
        tested = options.only.split(",")
        if unknown := set(tested) - set(voices):
            parser.error(f"There is no voice {sorted(unknown)[0]!r}; there are {', '.join(voices)}.")
    started, base = time.perf_counter(), None if options.characters else BaseModel()
    judged_pools = judged(tested, voices, base)
    sets_limits = tested == sorted(voices) and not options.characters
    rates, limits = in_halves(judged_pools) if sets_limits else (pass_rates(judged_pools, pools.known_limits()), [pools.known_limits()])
    gates = [*pools.GATES, "all"]
    mean = {
        kind: {gate: float(np.mean([rates[name][kind].get(gate, np.nan) for name in rates])) for gate in gates} for kind in (OWN, *CONTROLS)
    }
    worst = max(CONTROLS, key=lambda kind: mean[kind]["all"])
    result = {
        "benchmark": "controls", "data": data, "pool_size": pools.POOL_SIZE,
        "num_pools_per_author": pools.NUM_POOLS, "own_pass_rate": pools.OWN_PASS_RATE, "limits": [dict(each) for each in limits],
        "pass_rates": mean, "authors": rates, "seconds": time.perf_counter() - started,
    }  # fmt: skip
    print(tables_of(result))
    if sets_limits:
        write_json(pools.LIMITS_PATH, finite(dict(pools.loosest(limits))))
    if sets_limits or options.vietnamese:
        write_json(RESULTS / f"controls-{data}.json", finite(result))
        marked = markers("benchmarks/controls.py" + (" --vietnamese FILE" if options.vietnamese else ""))
        PAGE.write_text(replace_between(PAGE.read_text(encoding="utf-8"), tables_of(result), str(PAGE), marked), encoding="utf-8")
    print(last_line(author_pass=mean[OWN]["all"], worst_control=worst, worst_control_pass=mean[worst]["all"]))


if __name__ == "__main__":
    main()
