"""The field's headline claims, checked as far as the bundled base on two cores can: reproduced, not reproduced, or not testable here.

    python benchmarks/claims.py            # 3 seeds, about half an hour on two cores
    python benchmarks/claims.py --arithmetic    # the claims that need no training alone
    python benchmarks/claims.py --quick    # one seed, few rows: shows that it runs, changes no page

Each claim's condition was written down before it was measured. Differences are paired by held-out document, averaged over seeds, with
95 % intervals over documents. The scale is 14 M parameters and 64 rows: a direction can show there, a size cannot. Finished trainings
are kept in build/claims.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from forecast_data import DataSet, bundled
from measuring import BUILD, RESULTS, ROOT, describe_machine, last_line
from short_runs import faster_dtype, short_run
from tables import markers, replace_between, table
from transformers import AutoModelForCausalLM

from giong import samples
from giong.config import MethodConfig, ModelConfig, TrainConfig
from giong.contracts import ModelShape, ScoreRequest
from giong.engine.score import LocalScorer
from giong.evaluation.metrics.intervals import Interval, bootstrap
from giong.generation.local import LocalModel
from giong.methods import METHODS
from giong.models.load import LoadedModel, load_model, model_identity
from giong.sizing.defaults import resolve_training
from giong.sizing.memory import training_memory
from giong.sizing.shapes import num_trainable_parameters, shape_from_config
from giong.workflow.training import nll_per_document, score_answers
from giong.workspace import content_hash, read_json, write_json

NUM_SEEDS = 3
PAGE = ROOT / "docs" / "methods" / "claims.md"
NEAR, FAR = "author, rewrite", "Vietnamese author, translation"
REPRODUCED, NOT_REPRODUCED, NOT_TESTABLE = "direction reproduced", "not reproduced", "not testable here"
ENOUGH_OF_FULL = 0.95
"""Share of full fine-tuning's gain that counts as on a par with it."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a training came to: nats per token on held-out documents, and on general text."""

    held_out: dict[str, float]
    general: float
    num_trainable: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the table."""

    claim: str
    said: str
    found: str
    verdict: str
    limits: str


class Study:
    """Short trainings of the bundled base, each measured once per seed and kept on disk."""

    def __init__(self, folder: Path, sets: Mapping[str, DataSet], num_seeds: int) -> None:
        self.folder, self.sets, self.seeds = folder, sets, range(num_seeds)
        self.config = ModelConfig()
        self.dtype = faster_dtype(self.config)
        self.identity = model_identity(self.config)
        self.shape = self._load(random=False, seed=0).shape

    def _load(self, *, random: bool, seed: int) -> LoadedModel:
        loaded = load_model(self.config, dtype=self.dtype)
        if not random:
            return loaded
        torch.manual_seed(seed)
        return dataclasses.replace(loaded, model=AutoModelForCausalLM.from_config(loaded.model.config, dtype=self.dtype).eval())

    def base(self, on: str) -> list[Outcome]:
        """The base as it is, once per seed so that it pairs with the others."""
        return [self._kept([on, "base"], lambda: self._measure(self._load(random=False, seed=0), on, 0, 0.0))] * len(self.seeds)

    def tuned(
        self, on: str, *, epochs: float | None = None, random: bool = False, rate: float | None = None, **method: Any
    ) -> list[Outcome]:
        """After training on all rows of a data set, one outcome per seed; settings left out are giong's defaults."""
        data = self.sets[on]
        found = []
        for seed in self.seeds:
            asked = TrainConfig(seed=seed, save_seconds=1e9, num_epochs=epochs, learning_rate=rate)
            resolved = resolve_training(MethodConfig(**method), asked, self.shape, len(data.train))
            key = [data, resolved.method, resolved.train, random]
            found.append(self._kept(key, partial(self._train, on, resolved.method, resolved.train, random=random)))
        return found

    def _kept(self, key: Sequence[Any], measure: Callable[[], Outcome]) -> Outcome:
        path = self.folder / f"{content_hash(self.identity, str(self.dtype), *key)}.json"
        if not path.is_file():
            write_json(path, dataclasses.asdict(measure()))
        return Outcome(**read_json(path))

    def _train(self, name: str, method: MethodConfig, settings: TrainConfig, *, random: bool) -> Outcome:
        started = time.monotonic()
        loaded = self._load(random=random, seed=settings.seed)
        trainable = short_run(loaded, method, settings, self.sets[name].train)
        seconds = time.monotonic() - started
        print(f"{name}: {method.name}, seed {settings.seed}, {seconds:.0f} s", file=sys.stderr, flush=True)
        return self._measure(loaded, name, trainable.num_trainable, seconds)

    def _measure(self, loaded: LoadedModel, name: str, num_trainable: int, seconds: float) -> Outcome:
        held_out = self.sets[name].held_out
        scores = LocalScorer(loaded).score([ScoreRequest(text) for text in samples.general_texts()])
        general = sum(score.nll for score in scores) / sum(len(score.logprobs) for score in scores)
        return Outcome(nll_per_document(held_out, score_answers(LocalModel(loaded), None, held_out)), general, num_trainable, seconds)


def gains(base: Sequence[Outcome], tuned: Sequence[Outcome]) -> dict[str, float]:
    """Nats per token gained on each held-out document, averaged over seeds."""
    return {
        document: float(np.mean([before.held_out[document] - after.held_out[document] for before, after in zip(base, tuned)]))
        for document in base[0].held_out
    }


def interval_of(values: Mapping[str, float]) -> Interval:
    return bootstrap(np.array(list(values.values())), list(values))


def shown(interval: Interval, unit: str = "nats/token") -> str:
    return f"{interval.point:+.3f} [{interval.low:+.3f} to {interval.high:+.3f}] {unit}"


def judged(holds: bool) -> str:
    return REPRODUCED if holds else NOT_REPRODUCED


def bert(hidden_size: int, num_layers: int) -> tuple[int, int]:
    """(parameters, biases) of BERT with its pooler, by arithmetic (Devlin et al. 2018, 1810.04805, section 3)."""
    vocabulary, positions, types, d, f = 30522, 512, 2, hidden_size, 4 * hidden_size
    biases_per_layer = 4 * d + f + d + 2 * d
    layer = 4 * d * d + 2 * d * f + 2 * d + biases_per_layer
    biases = num_layers * biases_per_layer + d + d
    return (vocabulary + positions + types) * d + 2 * d + num_layers * layer + d * d + d, biases


def adapters(study: Study) -> Finding:
    """Condition: the interval of gain(bottleneck) - 0.95 gain(full) lies above 0."""
    width = 122
    share = 24 * 2 * (2 * width * 1024 + width + 1024) / bert(1024, 24)[0]
    base, small = study.base(NEAR), study.tuned(NEAR, name="bottleneck")
    of_full, of_small = gains(base, study.tuned(NEAR, name="full")), gains(base, small)
    difference = interval_of({document: of_small[document] - ENOUGH_OF_FULL * of_full[document] for document in of_full})
    return Finding(
        "Adapters (1902.00751)", "within 0.4 % of full fine-tuning with 3.6 % of the parameters",
        f"BERT-Large with adapters of width {width}: {share:.1%} by arithmetic; here {small[0].num_trainable / study.shape.num_parameters:.1%} "
        f"gain {shown(interval_of(of_small))}, full fine-tuning {shown(interval_of(of_full))}",
        judged(difference.low > 0), "GLUE",
    )  # fmt: skip


def bitfit(study: Study) -> Finding:
    shares = [biases / total for total, biases in (bert(768, 12), bert(1024, 24))]
    return Finding(
        "BitFit (2106.10199)", "under 0.1 % of the parameters, competitive with little data",
        f"biases are {shares[0]:.3%} of BERT-Base and {shares[1]:.3%} of BERT-Large by arithmetic; the bundled base has none",
        REPRODUCED if max(shares) < 1e-3 else NOT_REPRODUCED, "the share alone; quality needs a family with biases",
    )  # fmt: skip


def lora_size(study: Study) -> Finding:
    trainable = 96 * 2 * 2 * 12288 * 4
    loaded = load_model(study.config, dtype=torch.float32)
    tokens = torch.tensor([loaded.tokenizer("The kettle stood on the stove.")["input_ids"]])
    applied = METHODS["lora"].apply(loaded.model, resolve_training(MethodConfig(), TrainConfig(), study.shape, 64).method, seed=0)
    loaded.model.eval()
    with torch.no_grad():
        for parameter in applied.parameters.values():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        before = loaded.model(tokens).logits
        merged = applied.merge()
        difference = float((merged(tokens).logits - before).abs().max() / before.abs().max())
    linears = sum(isinstance(module, torch.nn.Linear) for module in merged.modules())
    plain = sum(isinstance(module, torch.nn.Linear) for module in load_model(study.config, dtype=torch.float32).model.modules())
    return Finding(
        "LoRA (2106.09685)", "10,000 times fewer trainable parameters on GPT-3, no latency once merged",
        f"{175e9 / trainable:,.0f} times by arithmetic (rank 4 on two matrices of 96 layers); merged: {linears} matrices as in the base "
        f"({plain}), logits differ by {difference:.0e} of the largest",
        judged(175e9 / trainable > 9000 and linears == plain and difference < 1e-5), "GPT-3's memory and quality",
    )  # fmt: skip


def learns_less_forgets_less(study: Study) -> Finding:
    """Conditions: LoRA gains less than full at equal passes, and forgets less where both have gained the same."""
    base = study.base(NEAR)

    def path(**method: Any) -> list[tuple[float, float]]:
        steps = [study.tuned(NEAR, epochs=epochs, **method) for epochs in (1, 2, 4, 8)]
        points = [
            (float(np.mean(list(gains(base, step).values()))), float(np.mean([after.general - before.general for before, after in zip(base, step)])))
            for step in steps
        ]  # fmt: skip
        return [(0.0, 0.0), *points]

    lora, full = path(name="lora"), path(name="full")
    equal = min(max(gain for gain, _ in lora), max(gain for gain, _ in full))
    forgotten = [float(np.interp(equal, *zip(*sorted(points)))) for points in (lora, full)]
    less_learnt = lora[3][0] < full[3][0]
    return Finding(
        "LoRA learns less and forgets less (2405.09673)", "below full fine-tuning on the target, above it on what was known",
        f"at 4 passes LoRA gains {lora[3][0]:+.3f} and full {full[3][0]:+.3f}; at an equal gain of {equal:.3f} general text has become "
        f"{forgotten[0]:+.3f} (LoRA) and {forgotten[1]:+.3f} (full) nats per token harder",
        judged(less_learnt and forgotten[0] < forgotten[1]), "benchmarks of knowledge; long continued pretraining",
    )  # fmt: skip


def rank_matters_little(study: Study) -> Finding:
    base = study.base(NEAR)
    low, high = (gains(base, study.tuned(NEAR, name="lora", lora_r=rank)) for rank in (2, 32))
    difference = interval_of({document: high[document] - low[document] for document in low})
    return Finding(
        "A higher rank gives little (2402.17193)", "finetuning scales with data and base, hardly with the rank",
        f"rank 32 over rank 2: {shown(difference)} of {shown(interval_of(low))}",
        judged(abs(difference.point) < 0.1 * abs(interval_of(low).point)), "more data, larger bases",
    )  # fmt: skip


def prompt_tuning(study: Study) -> Finding:
    base = study.base(NEAR)
    full, soft = gains(base, study.tuned(NEAR, name="full")), gains(base, study.tuned(NEAR, name="prompt_tuning"))
    gap = interval_of({document: full[document] - soft[document] for document in full})
    return Finding(
        "Prompt tuning (2104.08691)", "its gap to full fine-tuning closes as models grow past billions of parameters",
        f"at 14 M parameters the gap is {shown(gap)}", NOT_TESTABLE, "one size only: the small end, where the gap is expected",
    )  # fmt: skip


def qlora_bytes(study: Study) -> Finding:
    claim, said, limits = "QLoRA (2305.14314)", "0.52 bytes per weight: 4-bit NF4 with its constants quantised too", "65B on one GPU"
    try:
        from bitsandbytes.functional import quantize_4bit
    except ImportError:
        return Finding(claim, said, "bitsandbytes is not installed", NOT_TESTABLE, limits)
    weights = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0))
    packed, state = quantize_4bit(weights, quant_type="nf4", compress_statistics=True)
    constants = [state.absmax, state.state2.absmax, state.state2.code, state.code, state.offset]
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in [packed, *constants]) / weights.numel()
    return Finding(
        claim, said, f"{num_bytes:.3f} bytes per weight, measured on a matrix of 2,048 x 2,048", judged(num_bytes < 0.53), limits
    )


QWEN = {
    "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
    "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True, "max_position_embeddings": 32768,
}  # fmt: skip


def training_needs_many_times_the_weights(study: Study) -> Finding:
    shape: ModelShape = shape_from_config(QWEN)
    weights = 2 * shape.num_parameters
    ratios = {
        tokens: training_memory(shape, "full", num_trainable_parameters(shape, "full"), tokens, "bfloat16", max_row_tokens=512).needed_bytes / weights
        for tokens in (512, 4096, 16384, 65536)
    }  # fmt: skip
    return Finding(
        "Training needs 12 to 20 times the memory of the weights (2303.15647)", "for full fine-tuning",
        "by giong's estimate for the shape of Qwen2.5-0.5B in bf16: "
        + ", ".join(f"{ratio:.1f} times at {tokens:,} tokens per pack" for tokens, ratio in ratios.items()),
        judged(min(ratios.values()) < 20 and max(ratios.values()) > 12), "it depends on the pack: no constant",
    )  # fmt: skip


def better_than_from_scratch(study: Study) -> Finding:
    """Condition: the tuned base is better than random weights trained for four times as many passes, interval above 0."""
    base = study.base(NEAR)
    tuned, scratch = study.tuned(NEAR, name="full"), study.tuned(NEAR, name="full", random=True, epochs=16, rate=1e-3)
    difference = interval_of(gains(scratch, tuned))
    seconds = [float(np.mean([outcome.seconds for outcome in outcomes])) for outcomes in (tuned, scratch)]
    return Finding(
        "Fine-tuning is cheaper and better than training from scratch", "with the same rows",
        f"{shown(difference)} better than random weights after four times the passes ({seconds[1] / seconds[0]:.1f} times the time); "
        f"the untuned base is at {np.mean(list(base[0].held_out.values())):.2f}",
        judged(difference.low > 0), "what a from-scratch run reaches with more text",
    )  # fmt: skip


def alike_tasks_need_fewer_layers(study: Study) -> Finding:
    """Condition: the last layer alone reaches a larger share of all layers' gain on the near task than on the far one."""
    shares = {}
    for name in (NEAR, FAR):
        base = study.base(name)
        one, every = (
            float(np.mean(list(gains(base, study.tuned(name, name="last_layers", num_layers=count)).values())))
            for count in (1, study.shape.num_hidden_layers)
        )
        shares[name] = one / every
    return Finding(
        "The more alike the tasks, the fewer layers have to move", "(1411.1792 and after)",
        ", ".join(f"{name}: the last layer reaches {share:.0%} of what all layers gain" for name, share in shares.items()),
        judged(shares[NEAR] > shares[FAR]), "two tasks of one base",
    )  # fmt: skip


CLAIMS: dict[str, Callable[[Study], Finding]] = {
    "adapters": adapters,
    "bitfit": bitfit,
    "lora": lora_size,
    "forgetting": learns_less_forgets_less,
    "rank": rank_matters_little,
    "prompt_tuning": prompt_tuning,
    "qlora": qlora_bytes,
    "memory": training_needs_many_times_the_weights,
    "scratch": better_than_from_scratch,
    "layers": alike_tasks_need_fewer_layers,
}


WITHOUT_TRAINING = ("bitfit", "lora", "qlora", "memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CLAIMS, help="one claim alone; no page is changed")
    parser.add_argument("--arithmetic", action="store_true", help="only the claims that need no training")
    parser.add_argument("--quick", action="store_true", help="one seed, eight rows; no page is changed")
    options = parser.parse_args()
    sets = {data.name: data for data in bundled() if data.name in (NEAR, FAR)}
    if options.quick:
        sets = {name: dataclasses.replace(data, train=data.train[:8], held_out=data.held_out[:6]) for name, data in sets.items()}
    study = Study(BUILD / "claims", sets, 1 if options.quick else NUM_SEEDS)
    findings = [CLAIMS[name](study) for name in ([options.case] if options.case else WITHOUT_TRAINING if options.arithmetic else CLAIMS)]
    rows = [[finding.claim, finding.said, finding.found, f"**{finding.verdict}**", finding.limits] for finding in findings]
    text = table(["claim", "what was said", "what was found here", "verdict", "not tested"], rows)
    if options.arithmetic:
        text += f"\n\nThe other {len(CLAIMS) - len(findings)} claims need trainings, which have not been run on this version."
    if options.quick or options.case:
        print(text)
    else:
        write_json(
            RESULTS / "claims.json",
            {"benchmark": "claims", "machine": describe_machine("cpu"), "num_seeds": NUM_SEEDS, "findings": [dataclasses.asdict(f) for f in findings]},
        )  # fmt: skip
        page = replace_between(PAGE.read_text(encoding="utf-8"), text, str(PAGE), markers("benchmarks/claims.py"))
        PAGE.write_text(page, encoding="utf-8")
    counts = {verdict: sum(finding.verdict == verdict for finding in findings) for verdict in (REPRODUCED, NOT_REPRODUCED, NOT_TESTABLE)}
    print(last_line(reproduced=counts[REPRODUCED], not_reproduced=counts[NOT_REPRODUCED], not_testable=counts[NOT_TESTABLE]))


if __name__ == "__main__":
    main()
