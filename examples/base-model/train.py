"""Train the bundled tiny base with giong's own engine. One resumable command:

    python examples/base-model/train.py --data DIR --work build/base

DIR holds base/mix-en-60mb.train.jsonl.gz, base/mix-en-60mb.valid.jsonl.gz and chat/instruct.jsonl.gz. Stopped or killed, the
same command goes on from the last checkpoint (at most ten minutes old). With `--start-from MODEL` only the last phase is trained,
on from that model's weights and with its tokenizer. `card.py` evaluates the result and writes its card.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import tasks
import torch
from initialise import write_copying_heads
from prepare import END_OF_TEXT, TASK_SHARE, VOCAB_SIZE, RowWriter, prepare, read_rows
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from giong.contracts import Event, LossSum
from giong.engine.checkpoint import list_checkpoints
from giong.engine.compiled import can_compile, elementwise_of_run
from giong.engine.distributed import connect
from giong.engine.loop import train
from giong.engine.loop_config import LoopConfig
from giong.engine.packing import pack, plan_steps
from giong.engine.step import evaluate_rows, hidden_states, output_head
from giong.errors import Interrupted
from giong.jobs.supervisor import worker_environment
from giong.models.rows import Row

FIRST_STEPS = 510
"""Where the first phase of the bundled model ended; the later ones run to the end of their rows."""
THIRD_TOKENS, FOURTH_TOKENS = 20_500_000, 29_300_000
RAW_CHARACTERS = 1500
PHASES = ("first", "second", "third", "fourth")
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
            batch = pack(rows[start : start + 8])
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


def second_rows(work: Path, first: LoopConfig, first_steps: int, num_tokens: int) -> list[Row]:
    """All long rows, and rows that the first phase has not reached, `num_tokens` in all."""
    rows = load_rows(work / "rows_long.npz")
    return rows + unseen_rows(load_rows(work / "rows.npz"), first, first_steps, num_tokens - sum(map(len, rows)))


def unseen_rows(rows: list[Row], config: LoopConfig, num_steps: int, num_tokens: int) -> list[Row]:
    """Rows that a phase over `rows` has not reached after `num_steps`, in its order, up to `num_tokens`."""
    chosen, total = [], 0
    for index in np.concatenate(plan_steps(len(rows), config.batch_rows, config.num_epochs, config.seed)[num_steps:]):
        if total >= num_tokens:
            break
        chosen.append(rows[index])
        total += len(rows[index])
    return chosen


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
    """Prints the run's figures and probes, and asks for a stop at `last_step` or on a signal."""

    def __init__(self, model: LlamaForCausalLM, probes: dict[str, list[Row]]) -> None:
        self.model, self.probes = model, probes
        self.last_step: int | None = None
        self.step, self.tokens, self.started, self.signalled = 0, 0, time.monotonic(), False
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, lambda *_: setattr(self, "signalled", True))

    def should_stop(self) -> bool:
        return self.signalled or (self.last_step is not None and self.step >= self.last_step)

    def __call__(self, event: Event) -> None:
        data = event.data
        if event.kind == "notice":
            self.step = data["step"]
            print(event.message, flush=True)
        if event.kind != "step":
            return
        self.step = step = data["step"]
        self.tokens += data["num_tokens"]
        if step % 10 == 0:
            rate = self.tokens / (time.monotonic() - self.started)
            print(
                f"step {step}/{data['num_steps']} loss {data['loss']:.3f} norm {data['grad_norm']:.2f} "
                f"{self.tokens / 1e6:.2f} M tokens, {rate:.0f} tokens/s", flush=True,
            )  # fmt: skip
        if step % 100 == 0 or step in (10, 30):
            print(f"  {probe(self.model, self.probes)}", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=10_600_000, help="tokens in the rows of the first phase")
    parser.add_argument("--long-tokens", type=int, default=3_600_000, help="tokens in the second phase's rows of up to 2,048 tokens")
    parser.add_argument("--second-tokens", type=int, default=6_850_000, help="tokens that the second phase sees")
    parser.add_argument("--third-tokens", type=int, default=THIRD_TOKENS, help="tokens that the third phase sees, a fifth in long rows")
    parser.add_argument("--fourth-tokens", type=int, default=FOURTH_TOKENS, help="tokens that the fourth phase sees, loops among them")
    parser.add_argument("--first-steps", type=int, default=FIRST_STEPS, help="steps of the first phase")
    parser.add_argument("--only-first", action="store_true", help="end with the first phase, to compare recipes at small scale")
    parser.add_argument("--start-from", type=Path, help="train the last phase alone, on from this model")
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE)
    parser.add_argument("--task-share", type=float, default=TASK_SHARE, help="of the tokens in short rows")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--plain-initialisation", action="store_true", help="without the copying heads, to compare")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> None:
    work, data = arguments.work, arguments.data
    processes = connect()
    tokenizer, model = begin(arguments, processes.first(faster_dtype))
    probes = probe_rows(tokenizer, list(read_rows(data / "base/mix-en-60mb.valid.jsonl.gz")))
    parameters = dict(model.named_parameters())
    if processes.is_first:
        print(f"{sum(p.numel() for p in parameters.values()) / 1e6:.1f} M parameters; {probe(model, probes)}", flush=True)

    first = LoopConfig(
        learning_rate=arguments.learning_rate, num_epochs=1, batch_rows=32, max_tokens_per_pack=4096, warmup_share=0.05,
        schedule="cosine", fsdp=False, optimizer="muon", weight_decay=0.01, max_grad_norm=1.0, seed=arguments.seed, save_seconds=540, save_steps=None, keep_checkpoints=1,
    )  # fmt: skip
    second = dataclasses.replace(first, batch_rows=36, warmup_share=0.02)
    # The rate rises once more, less high: the weights are no longer random.
    third = dataclasses.replace(first, learning_rate=0.8 * arguments.learning_rate, batch_rows=128, warmup_share=0.03)
    fourth = dataclasses.replace(third, learning_rate=0.6 * arguments.learning_rate, schedule="linear")
    phases = {
        "first": (first, None if arguments.only_first else arguments.first_steps, lambda: load_rows(work / "rows.npz")),
        "second": (second, None, lambda: second_rows(work, first, arguments.first_steps, arguments.second_tokens)),
        "third": (third, None, lambda: load_rows(work / "rows_third.npz") + load_rows(work / "rows_third_long.npz")),
        "fourth": (fourth, None, lambda: load_rows(work / "rows_fourth.npz") + load_rows(work / "rows_fourth_long.npz")),
    }
    watch = Watch(model, probes)
    muon_excluded = frozenset(name for name in parameters if "embed" in name)
    compiled = can_compile()
    for phase in phases_left(arguments):
        config, num_steps, rows = phases[phase]
        watch.last_step, watch.step = num_steps, 0
        try:
            with elementwise_of_run(model, compiled=compiled):
                train(
                    model, parameters, rows(), loss, config, checkpoints=checkpoints_folder(work, phase), emit=watch,
                    should_stop=watch.should_stop, muon_excluded=muon_excluded, processes=processes,
                )  # fmt: skip
        except Interrupted:
            if watch.signalled:
                raise
        if processes.is_first:
            print(f"{phase} phase done; {probe(model, probes)}", flush=True)
    if processes.is_first:
        model.to(torch.bfloat16).save_pretrained(work / "model")
        tokenizer.save_pretrained(work / "model")


def make_rows(arguments: argparse.Namespace) -> None:
    """Tokenizer and rows, where they do not lie in the work folder yet."""
    work, data = arguments.work, arguments.data
    if arguments.start_from and not (work / "tokenizer.json").is_file():
        work.mkdir(parents=True, exist_ok=True)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(arguments.start_from / name, work)
    first = [("rows", arguments.tokens, False, 0)]
    second = [("rows_long", arguments.long_tokens, True, 1)]
    third = [("rows_third", 4 * arguments.third_tokens // 5, False, 2), ("rows_third_long", arguments.third_tokens // 5, True, 3)]
    fourth = [("rows_fourth", 4 * arguments.fourth_tokens // 5, False, 4), ("rows_fourth_long", arguments.fourth_tokens // 5, True, 5)]
    chosen = fourth if arguments.start_from else first if arguments.only_first else first + second + third + fourth
    prose, instruct = data / "base/mix-en-60mb.train.jsonl.gz", data / "chat/instruct.jsonl.gz"
    shape = {"vocab_size": arguments.vocab_size, "task_share": arguments.task_share}
    for name, num_tokens, long, seed in chosen:
        if not (work / f"{name}.npz").is_file():
            prepare(prose, instruct, work, name, num_tokens, long=long, loops=name == "rows_fourth", seed=seed, **shape)


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
    if arguments.start_from:
        return PHASES[-1:]
    if arguments.only_first:
        return PHASES[:1]
    return PHASES[max((i for i, phase in enumerate(PHASES) if list_checkpoints(checkpoints_folder(arguments.work, phase))), default=0) :]


if __name__ == "__main__":
    asked = parse()
    if "RANK" in os.environ:
        main(asked)
    else:
        make_rows(asked)
        # So small a model uses two threads no better than one: each core gets a process of its own. The allocator, too, reads its
        # settings when a process starts.
        cores = os.cpu_count() or 1
        started = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(cores), *sys.argv]
        os.execve(sys.executable, started, worker_environment(cores))
