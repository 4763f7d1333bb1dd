"""Train the bundled tiny base with giong's own engine. One resumable command:

    python examples/base-model/train.py --data DIR --work build/base --tokens 10600000

DIR holds base/mix-en-60mb.train.jsonl.gz, base/mix-en-60mb.valid.jsonl.gz and chat/instruct.jsonl.gz. Stopped or killed, the
same command goes on from the last checkpoint (at most ten minutes old). `card.py` evaluates the result and writes its card.
"""

from __future__ import annotations

import argparse
import random
import signal
import time
from pathlib import Path

import numpy as np
import tasks
import torch
from initialise import write_copying_heads
from prepare import END_OF_TEXT, RowWriter, prepare, read_rows
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from giong.contracts import Event
from giong.engine.loop import LoopConfig, train
from giong.engine.packing import pack
from giong.engine.step import evaluate_rows, hidden_states, output_head
from giong.models.rows import Row
from giong.objectives import pretrain


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
    """Held-out rows: raw text, a passage to be repeated, a padded passage to be made plain (loss on the answer only)."""
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
        writer.raw(document["text"][:1500])
    probes["raw"] = [Row(i.astype(np.int64), w.astype(np.float32)) for i, w in zip(writer.ids, writer.weights)]
    return probes


@torch.no_grad()
def probe(model: LlamaForCausalLM, probes: dict[str, list[Row]]) -> str:
    model.eval()
    parts = []
    for name, rows in probes.items():
        nll = -torch.cat(evaluate_rows(model, rows, 4096)).mean()
        hits = total = 0
        for start in range(0, len(rows), 8):
            batch = pack(rows[start : start + 8])
            hidden = hidden_states(model, batch).index_select(0, batch.loss_positions_N)
            predicted = (hidden @ output_head(model).weight_VD.T).argmax(-1)
            hits += int((predicted == batch.targets_N).sum())
            total += len(batch.targets_N)
        parts.append(f"{name}: nll {nll:.3f} accuracy {hits / total:.3f}")
    model.train()
    return "; ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=10_600_000)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--batch-rows", type=int, default=32)
    parser.add_argument("--plain-initialisation", action="store_true")
    parser.add_argument("--max-steps", type=int, help="stop after so many steps (for comparing recipes)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if not (arguments.work / "rows.npz").is_file():
        prepare(
            arguments.data / "base/mix-en-60mb.train.jsonl.gz", arguments.data / "chat/instruct.jsonl.gz", arguments.work, arguments.tokens
        )
    tokenizer = AutoTokenizer.from_pretrained(arguments.work)
    assert tokenizer.convert_tokens_to_ids(END_OF_TEXT) == 0
    rows = load_rows(arguments.work / "rows.npz")
    probes = probe_rows(tokenizer, list(read_rows(arguments.data / "base/mix-en-60mb.valid.jsonl.gz")))
    model = make_model(
        len(tokenizer),
        layers=arguments.layers,
        width=arguments.width,
        copying_heads=not arguments.plain_initialisation,
        seed=arguments.seed,
    ).to(torch.bfloat16)
    parameters = dict(model.named_parameters())
    print(f"{sum(p.numel() for p in parameters.values()) / 1e6:.1f} M parameters, {len(rows)} rows; {probe(model, probes)}", flush=True)

    stop = []
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: stop.append(True))
    seen = {"tokens": 0, "started": time.monotonic()}

    def emit(event: Event) -> None:
        if event.kind == "notice":
            print(event.message, flush=True)
        if event.kind != "step":
            return
        step = event.data["step"]
        seen["tokens"] += event.data["num_tokens"]
        if step % 10 == 0:
            rate = seen["tokens"] / (time.monotonic() - seen["started"])
            print(
                f"step {step}/{event.data['num_steps']} loss {event.data['loss']:.3f} norm {event.data['grad_norm']:.2f} {rate:.0f} tokens/s",
                flush=True,
            )
        if step % 100 == 0 or step in (10, 30):
            print(f"  {probe(model, probes)}", flush=True)

    config = LoopConfig(
        learning_rate=arguments.learning_rate, num_epochs=1, batch_rows=arguments.batch_rows, max_tokens_per_pack=4096, warmup_share=0.05,
        schedule="cosine", optimizer="muon", weight_decay=0.01, max_grad_norm=1.0, seed=arguments.seed, save_seconds=540, save_steps=None, keep_checkpoints=1,
    )  # fmt: skip
    limit = arguments.max_steps
    train(
        model, parameters, rows, pretrain.loss, config, checkpoints=arguments.work / "checkpoints", emit=emit,
        should_stop=lambda: bool(stop), muon_excluded=frozenset(name for name in parameters if "embed" in name),
    ) if limit is None else _short(model, parameters, rows[: limit * arguments.batch_rows], config, arguments.work, emit)  # fmt: skip
    model.save_pretrained(arguments.work / "model")
    tokenizer.save_pretrained(arguments.work / "model")
    print(probe(model, probes))


def _short(model, parameters, rows, config, work, emit):  # type: ignore[no-untyped-def]
    train(
        model, parameters, rows, pretrain.loss, config, checkpoints=work / f"trial-{time.time_ns()}", emit=emit,
        muon_excluded=frozenset(name for name in parameters if "embed" in name),
    )  # fmt: skip


if __name__ == "__main__":
    main()
