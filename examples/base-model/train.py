"""Train the bundled tiny base with giong's own engine. One resumable command:

    python examples/base-model/train.py --data DIR --work build/base

DIR holds base/mix-en-60mb.train.jsonl.gz, base/mix-en-60mb.valid.jsonl.gz and chat/instruct.jsonl.gz. Stopped or killed, the
same command goes on from the last checkpoint (at most ten minutes old). With `--start-from MODEL` only the last phase is trained,
on from that model's weights and with its tokenizer. `card.py` evaluates the result and writes its card.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import os
import random
import shutil
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import tasks
import torch
from initialise import write_copying_heads
from prepare import END_OF_TEXT, PARAPHRASE_SHARES, TASK_SHARE, TASK_SHARES, VOCAB_SIZE, RowWriter, make_tokenizer, prepare, read_rows
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from giong.contracts import Event, LossSum
from giong.engine.checkpoint import list_checkpoints
from giong.engine.devices import on_device
from giong.engine.distributed import connect
from giong.engine.kernel_choice import elementwise_of_run
from giong.engine.loop import train
from giong.engine.loop_config import LoopConfig
from giong.engine.packing import pack
from giong.engine.step import evaluate_rows, hidden_states, output_head
from giong.errors import Interrupted
from giong.jobs.supervisor import worker_environment
from giong.models.devices import resolve_device
from giong.models.rows import Row
from giong.workspace import atomic_write

FIRST_TOKENS, LAST_TOKENS, EPOCHS = 80_000_000, 40_000_000, 1.4
SHARD_TOKENS, LONG_SHARDS = 10_000_000, 5
"""Rows are made in files of so many tokens, one process each; every fifth file has rows of up to 2,048 tokens instead of 512."""
PACK_TOKENS = {"cpu": 4096, "cuda": 131_072}
"""Tokens per pass: on a GPU a whole step."""
FIRST_SHARE = 0.68
"""Of the time that `--seconds` gives."""
SPARE = 0.9
"""Of what is left of it, for the last phase's steps: rows have to be read, probes measured, and weights written."""
RAW_CHARACTERS = 1500
PHASES = ("first", "last")
"""Each leaves its checkpoints in a folder of its own, `checkpoints_folder`."""


def checkpoints_folder(work: Path, phase: str) -> Path:
    return work / f"checkpoints-{phase}"


def make_model(vocab_size: int, *, layers: int, width: int, copying_heads: bool, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=width // 64,
        num_key_value_heads=width // 128, max_position_embeddings=2048, tie_word_embeddings=True, rope_theta=100_000.0,
        bos_token_id=0, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if copying_heads:
        write_copying_heads(model, seed=seed)
    return model


def load_rows(path: Path) -> list[Row]:
    stored = np.load(path)
    ids, weights, ends = stored["ids"], stored["weights"], stored["ends"]
    starts = [0, *ends[:-1]]
    return [Row(ids[a:b].astype(np.int64), weights[a:b].astype(np.float32)) for a, b in zip(starts, ends)]


def probe_rows(tokenizer, documents: list[dict]) -> dict[str, list[Row]]:  # type: ignore[no-untyped-def]
    """Held-out rows: raw text (`RAW_CHARACTERS` of each document), a passage to be repeated, a padded passage to be made plain (loss on the answer only)."""
    rng = random.Random(1)
    passages = [p for d in documents for p in tasks.passages_of(d["text"], rng) if 50 <= len(p.split()) <= 75][:400]
    passages = rng.sample(passages, 24)
    probes: dict[str, list[Row]] = {}
    for kind in ("repeat", "plain"):
        writer = RowWriter(tokenizer)
        for passage in passages:
            content, answer = tasks.make_task(kind, passage, rng)
            writer.chat([(tasks.phrase(kind, content, rng), answer)], 0.0)
        probes[kind] = [Row(i.astype(np.int64), w.astype(np.float32)) for i, w in zip(writer.ids, writer.weights)]
    writer = RowWriter(tokenizer)
    for document in documents[:24]:
        writer.raw(document["text"][:RAW_CHARACTERS])
    probes["raw"] = [Row(i.astype(np.int64), w.astype(np.float32)) for i, w in zip(writer.ids, writer.weights)]
    return probes


@torch.no_grad()
def measure_probes(model: LlamaForCausalLM, probes: dict[str, list[Row]]) -> dict[str, dict[str, float]]:
    """Summed and mean negative log-likelihood in nats, and next-token accuracy, of each kind of held-out rows."""
    model.eval()
    found = {}
    for name, rows in probes.items():
        nll = -torch.cat(evaluate_rows(model, rows, 4096))
        hits = total = 0
        for start in range(0, len(rows), 8):
            batch = on_device(pack(rows[start : start + 8]), model.device)
            hidden = hidden_states(model, batch).index_select(0, batch.loss_positions_N)
            predicted = (hidden @ output_head(model).weight_VD.T).argmax(-1)
            hits += int((predicted == batch.targets_N).sum())
            total += len(batch.targets_N)
        found[name] = {"nll_sum": float(nll.sum()), "nll": float(nll.mean()), "accuracy": hits / total}
    model.train()
    return found


def probe(model: LlamaForCausalLM, probes: dict[str, list[Row]]) -> str:
    found = measure_probes(model, probes)
    return "; ".join(f"{name}: nll {values['nll']:.3f} accuracy {values['accuracy']:.3f}" for name, values in found.items())


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of rows: `name`.npz, of one phase."""

    name: str
    phase: str
    num_tokens: int
    long: bool
    seed: int


def shards_of(arguments: argparse.Namespace) -> list[Shard]:
    """The files of rows of all phases that are to be trained."""
    found: list[Shard] = []
    for phase, total in (("first", arguments.tokens), ("last", arguments.last_tokens)):
        if phase not in phases_of(arguments):
            continue
        for number, start in enumerate(range(0, total, SHARD_TOKENS)):
            long = number % LONG_SHARDS == 1
            found.append(
                Shard(f"rows-{phase}-{number:02d}", phase, min(SHARD_TOKENS, total - start), long, seed=arguments.seed + len(found))
            )
    return found


def phases_of(arguments: argparse.Namespace) -> tuple[str, ...]:
    return PHASES[:1] if arguments.only_first else PHASES[1:] if arguments.start_from else PHASES


def make_shard(arguments: argparse.Namespace, shard: Shard) -> None:
    """The rows of one file."""
    last = shard.phase == "last"
    prepare(
        *sources(arguments), arguments.work, shard.name, shard.num_tokens, long=shard.long, loops=last and not shard.long, seed=shard.seed,
        task_share=arguments.task_share, task_shares=PARAPHRASE_SHARES if last else TASK_SHARES,
    )  # fmt: skip


def sources(arguments: argparse.Namespace) -> tuple[Path, Path]:
    return arguments.data / "base/mix-en-60mb.train.jsonl.gz", arguments.data / "chat/instruct.jsonl.gz"


def loss(tensors: dict[str, torch.Tensor]) -> LossSum:
    """-sum(log p) of the tokens to be learnt, -sum(log(1 - p)) of those with a negative weight, which must not come (unlikelihood,
    Welleck et al. 2019, 1908.04319, equation 4). The weights of both count."""
    weights_N, logprobs_N = tensors["weights_N"], tensors["logprobs_N"]
    learnt = (weights_N.clamp(min=0) * logprobs_N).sum()
    if (weights_N > 0).all():
        return LossSum(-learnt, weights_N.sum())
    unlikely = (weights_N.clamp(max=0) * torch.log1p(-logprobs_N.exp().clamp(max=0.999))).sum()
    return LossSum(unlikely - learnt, weights_N.abs().sum())


class Watch:
    """Prints the run's figures and probes, and asks for a stop on a signal."""

    def __init__(self, model: LlamaForCausalLM, probes: dict[str, list[Row]]) -> None:
        self.model, self.probes = model, probes
        self.tokens, self.seconds, self.signalled = 0, 0.0, False
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, lambda *_: setattr(self, "signalled", True))

    @property
    def tokens_per_second(self) -> float:
        """Within steps: what lies between them is not counted. Infinite before the first."""
        return self.tokens / self.seconds if self.seconds else math.inf

    def __call__(self, event: Event) -> None:
        data = event.data
        if event.kind == "notice":
            print(event.message, flush=True)
        if event.kind != "step":
            return
        step = data["step"]
        self.tokens += data["num_tokens"]
        self.seconds += data["num_tokens"] / data["tokens_per_second"]
        if step % 20 == 0:
            print(
                f"step {step}/{data['num_steps']} loss {data['loss']:.3f} norm {data['grad_norm']:.2f} "
                f"{self.tokens / 1e6:.2f} M tokens, {self.tokens_per_second:.0f} tokens/s", flush=True,
            )  # fmt: skip
        if step % 200 == 0:
            print(f"  {probe(self.model, self.probes)}", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=FIRST_TOKENS, help="tokens in the rows of the first phase")
    parser.add_argument("--last-tokens", type=int, default=LAST_TOKENS, help="tokens in the rows of the last phase, loops among them")
    parser.add_argument("--only-first", action="store_true", help="end with the first phase, to compare recipes at small scale")
    parser.add_argument("--start-from", type=Path, help="train the last phase alone, on from this model")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that make rows")
    parser.add_argument("--only-rows", action="store_true", help="make the tokenizer and the rows, and end")
    parser.add_argument("--epochs", type=float, default=EPOCHS, help="passes over the rows of each phase")
    parser.add_argument("--seconds", type=float, help="of training at most, a third of them the last phase: for a machine that is lent")
    parser.add_argument("--batch-rows", type=int, default=384, help="rows per step")
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE)
    parser.add_argument("--task-share", type=float, default=TASK_SHARE, help="of the tokens in short rows")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=1.2e-3)
    parser.add_argument("--plain-initialisation", action="store_true", help="without the copying heads, to compare")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    if asked.seconds and asked.start_from:
        parser.error("--seconds sizes the last phase by the speed of the first, which --start-from leaves out: give --epochs instead")
    return asked


def main(arguments: argparse.Namespace) -> None:
    work, device = arguments.work, resolve_device()
    processes = connect()
    tokenizer, model = begin(arguments, torch.bfloat16 if device.type == "cuda" else processes.first(faster_dtype))
    model.to(device)
    probes = probe_rows(tokenizer, list(read_rows(arguments.data / "base/mix-en-60mb.valid.jsonl.gz")))
    parameters = dict(model.named_parameters())
    if processes.is_first:
        print(f"{sum(p.numel() for p in parameters.values()) / 1e6:.1f} M parameters; {probe(model, probes)}", flush=True)

    # The rate stands still while most of the rows go by and falls along a straight line to zero in the last phase.
    first = LoopConfig(
        learning_rate=arguments.learning_rate, num_epochs=arguments.epochs, batch_rows=arguments.batch_rows, max_tokens_per_pack=PACK_TOKENS[device.type],
        warmup_share=0.03, schedule="constant", fsdp=False, optimizer="muon", weight_decay=0.1, max_grad_norm=1.0, seed=arguments.seed,
        save_seconds=540, save_steps=None, keep_checkpoints=1,
    )  # fmt: skip
    configs = {"first": first, "last": dataclasses.replace(first, warmup_share=0.01, schedule="linear")}
    watch = Watch(model, probes)
    muon_excluded = frozenset(name for name in parameters if "embed" in name)
    # Compiling takes a minute on a GPU, where the fused kernels serve; where there is no compiler, the eager ones do.
    compiled = device.type == "cpu"
    begun = time.monotonic()
    for phase in phases_left(arguments):
        rows = [row for shard in shards_of(arguments) if shard.phase == phase for row in load_rows(work / f"{shard.name}.npz")]
        config, seconds = configs[phase], math.inf
        if arguments.seconds and phase == "first":
            seconds = FIRST_SHARE * arguments.seconds
        elif arguments.seconds:
            left = arguments.seconds - (time.monotonic() - begun)
            # The first process alone is told of steps.
            config = dataclasses.replace(config, num_epochs=processes.first(partial(sized_epochs, work, watch, left, rows, config)))
        try:
            with elementwise_of_run(model, compiled=compiled):
                train(
                    model, parameters, rows, loss, config, checkpoints=checkpoints_folder(work, phase), emit=watch,
                    should_stop=lambda until=begun + seconds: watch.signalled or time.monotonic() > until, muon_excluded=muon_excluded,
                    processes=processes,
                )  # fmt: skip
        except Interrupted:
            if watch.signalled:
                raise
        if processes.is_first:
            print(f"{phase} phase done; {probe(model, probes)}", flush=True)
            # A copy: the next phase goes on in the number format that is faster here.
            copy.deepcopy(model).to(torch.bfloat16).save_pretrained(work / "model")
            tokenizer.save_pretrained(work / "model")


def sized_epochs(work: Path, watch: Watch, seconds: float, rows: list[Row], config: LoopConfig) -> float:
    """Passes of the last phase that fit into so many seconds by the speed of the first; kept in the work folder, for a run that is stopped
    has to go on with the same plan."""
    kept = work / "last-epochs.txt"
    if not kept.is_file():
        fitting = SPARE * watch.tokens_per_second * seconds / sum(map(len, rows))
        with atomic_write(kept, "w") as stream:
            stream.write(str(min(config.num_epochs, fitting)))
    return float(kept.read_text(encoding="utf-8"))


def make_rows(arguments: argparse.Namespace) -> None:
    """Tokenizer and rows, where they do not lie in the work folder yet; a process per core, since each file is one's own."""
    if arguments.start_from and not (arguments.work / "tokenizer.json").is_file():
        arguments.work.mkdir(parents=True, exist_ok=True)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(arguments.start_from / name, arguments.work)
    make_tokenizer(*sources(arguments), arguments.work, arguments.vocab_size)
    missing = [shard for shard in shards_of(arguments) if not (arguments.work / f"{shard.name}.npz").is_file()]
    if missing:
        with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as pool:
            list(pool.map(partial(make_shard, arguments), missing))


def begin(arguments: argparse.Namespace, dtype: torch.dtype) -> tuple[PreTrainedTokenizerFast, LlamaForCausalLM]:
    """The tokenizer and the model to begin with."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.work)
    assert tokenizer.convert_tokens_to_ids(END_OF_TEXT) == 0
    if arguments.start_from:
        return tokenizer, LlamaForCausalLM.from_pretrained(arguments.start_from, dtype=dtype)
    heads = not arguments.plain_initialisation
    model = make_model(len(tokenizer), layers=arguments.layers, width=arguments.width, copying_heads=heads, seed=arguments.seed)
    return tokenizer, model.to(dtype)


def faster_dtype() -> torch.dtype:
    """bf16, or fp32 on a processor that has no instructions for bf16 and computes it more slowly."""
    seconds = {}
    for dtype in (torch.bfloat16, torch.float32):
        left, right = torch.ones(2048, 512, dtype=dtype), torch.ones(512, 1024, dtype=dtype)
        times = []
        for _ in range(5):
            started = time.perf_counter()
            left @ right
            times.append(time.perf_counter() - started)
        seconds[dtype] = min(times)
    return min(seconds, key=lambda dtype: seconds[dtype])


def phases_left(arguments: argparse.Namespace) -> tuple[str, ...]:
    """From the last phase that has begun, or the first; its checkpoint holds all that came before."""
    phases = phases_of(arguments)
    return phases[max((i for i, phase in enumerate(phases) if list_checkpoints(checkpoints_folder(arguments.work, phase))), default=0) :]


if __name__ == "__main__":
    asked = parse()
    if "RANK" in os.environ:
        main(asked)
    else:
        make_rows(asked)
        if asked.only_rows:
            sys.exit()
        if torch.cuda.is_available():
            main(asked)
            sys.exit()
        # So small a model uses two threads no better than one: each core gets a process of its own. The allocator, too, reads its
        # settings when a process starts.
        cores = os.cpu_count() or 1
        started = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(cores), *sys.argv]
        os.execve(sys.executable, started, worker_environment(cores))
