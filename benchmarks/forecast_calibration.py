"""How far the forecast can be trusted: forecast from the first slices of many data sets, then train on the rest and compare.

    python benchmarks/forecast_calibration.py              # bundled writers, 3 seeds
    python benchmarks/forecast_calibration.py --data DIR   # also writers from .jsonl files (rows with `text` and `id`)
    python benchmarks/forecast_calibration.py --again      # new forecasts from the trainings in the results, without training
    python benchmarks/forecast_calibration.py --quick      # two data sets, one seed: shows that it runs

Trainings go through giong's own engine with the settings that giong would choose, on the bundled base; each finished one is kept
in build/forecast_calibration, so a stopped study goes on where it was. What is measured is the likelihood of held-out passages.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from forecast_data import DataSet, bundled, from_files
from forecast_study import Measured, plot, study, summarise, tables
from measuring import BUILD, RESULTS, ROOT, describe_machine, last_line
from short_runs import faster_dtype, short_run
from tables import markers, replace_between

from giong.baselines import BASELINES
from giong.config import BaselinesConfig, MethodConfig, ModelConfig, TrainConfig
from giong.contracts import Example, Request, Sampling, ScoreRequest
from giong.engine.score import LocalScorer
from giong.generation.local import LocalModel
from giong.models.folder import resolve
from giong.models.load import LoadedModel, load_model, model_identity
from giong.sizing.defaults import ResolvedTraining, resolve_training
from giong.sizing.shapes import shape_from_config
from giong.workflow.training import nested_slice, nll_per_document, score_answers
from giong.workspace import content_hash, read_json, write_json

NUM_SEEDS = 3
PROMPTED = "few_shot"
PAGE = ROOT / "docs" / "concepts" / "forecasting.md"
PICTURE = ROOT / "docs" / "images" / "forecast_calibration.svg"


class Trainings:
    """Likelihoods after training on slices, each measured once and kept on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.config = folder, ModelConfig()
        self.dtype = faster_dtype(self.config)
        self.identity = model_identity(self.config)
        # Read from its file: where all trainings are kept already, the model need not be loaded.
        self.shape = shape_from_config(read_json(Path(resolve(self.config.name_or_path)) / "config.json"))

    @cached_property
    def loaded(self) -> LoadedModel:
        return load_model(self.config, dtype=self.dtype)

    def untuned(self, data: DataSet) -> Measured:
        """The base as it is, and with examples in the prompt."""
        return self._kept([data, PROMPTED], lambda: self._untuned(data))

    def tuned(self, data: DataSet, num_rows: int, seed: int) -> Measured:
        """After training on the first `num_rows` rows in the order of `seed`, with the recipe of all rows."""
        resolved = resolve_training(MethodConfig(), TrainConfig(seed=seed, save_seconds=1e9), self.shape, len(data.train))
        return self._kept([data, num_rows, resolved.method, resolved.train], lambda: self._tuned(data, num_rows, resolved))

    def _kept(self, key: list[Any], measure: Callable[[], Measured]) -> Measured:
        path = self.folder / f"{content_hash(self.identity, str(self.dtype), *key)}.json"
        if not path.is_file():
            write_json(path, dataclasses.asdict(measure()))
        return Measured(**read_json(path))

    def _untuned(self, data: DataSet) -> Measured:
        started = time.monotonic()
        scorer = LocalScorer(self.loaded)
        room = self.loaded.max_seq_length - max(len(self.loaded.tokenizer(example.answer)["input_ids"]) for example in data.held_out)
        arm = BASELINES[PROMPTED](
            LocalModel(self.loaded).predictor("base", None, Sampling()),
            data.train,
            BaselinesConfig(),
            count_tokens=self.loaded.chat.count_tokens,
            max_prompt_tokens=room,
        )
        asked = [ScoreRequest(example.answer, arm.prompt(Request(example.id, example.messages)).messages) for example in data.held_out]
        plain = self._likelihoods(data.held_out)
        prompted = nll_per_document(data.held_out, scorer.score(asked))
        return Measured(data.name, 0, 0, plain, time.monotonic() - started, prompted)

    def _tuned(self, data: DataSet, num_rows: int, resolved: ResolvedTraining) -> Measured:
        started, seed = time.monotonic(), resolved.train.seed
        part = nested_slice(data.train, num_rows / len(data.train), seed)
        trainable = short_run(self.loaded, resolved.method, resolved.train, part)
        try:
            likelihoods = self._likelihoods(data.held_out)
        finally:
            trainable.detach()
        return Measured(data.name, seed, num_rows, likelihoods, time.monotonic() - started)

    def _likelihoods(self, examples: list[Example]) -> dict[str, float]:
        return nll_per_document(examples, score_answers(LocalModel(self.loaded), None, examples))


def measure_all(trainings: Trainings, sets: list[DataSet], num_seeds: int) -> list[Measured]:
    """Every training of the study, in an order that finishes one data set after the other."""
    found = []
    for data in sets:
        started = time.monotonic()
        found.append(trainings.untuned(data))
        found += [trainings.tuned(data, num_rows, seed) for seed in range(num_seeds) for num_rows in data.sizes]
        print(f"{data.name}: {len(data.sizes)} sizes, {num_seeds} seeds, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with further writers as .jsonl or .jsonl.gz files")
    parser.add_argument("--seeds", type=int, default=NUM_SEEDS, help=f"trainings per slice (default {NUM_SEEDS})")
    parser.add_argument("--again", action="store_true", help="forecast from the trainings that the results hold already")
    parser.add_argument(
        "--quick", action="store_true", help="two data sets, one seed; written to a file of its own, and no page is changed"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results (default benchmarks/results)")
    options = parser.parse_args()
    path = options.results / f"forecast_calibration{'-quick' if options.quick else ''}.json"
    if options.again:
        known = read_json(path)
        machine, num_seeds, measured = known["machine"], known["num_seeds"], [Measured(**item) for item in known["measured"]]
    else:
        sets, num_seeds = bundled() + (from_files(options.data) if options.data else []), options.seeds
        if options.quick:
            sets, num_seeds = [next(data for data in sets if data.name == name) for name in ("manual, question", "teacher, question")], 1
        machine, measured = describe_machine("cpu"), measure_all(Trainings(BUILD / "forecast_calibration"), sets, num_seeds)
    cells = study(measured)
    summary = summarise(cells, measured)
    result = {
        "benchmark": "forecast_calibration", "quick": options.quick, "machine": machine, "num_seeds": num_seeds, "summary": summary,
        "cells": [{name: value for name, value in dataclasses.asdict(cell).items() if name != "ends"} for cell in cells],
        "measured": [dataclasses.asdict(item) for item in measured],
    }  # fmt: skip
    write_json(path, result)
    if options.quick:
        print(tables(summary))
    else:
        PICTURE.write_text(plot(cells), encoding="utf-8")
        page = replace_between(PAGE.read_text(encoding="utf-8"), tables(summary), str(PAGE), markers("benchmarks/forecast_calibration.py"))
        PAGE.write_text(page, encoding="utf-8")
    print(last_line(**{name: summary[name] for name in ("coverage_80", "median_error", "naive_median_error")}))


if __name__ == "__main__":
    main()
