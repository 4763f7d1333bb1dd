"""Measure the bundled base on unseen text and write its card.

python examples/base-model/card.py --data DIR --model src/giong/models/bundled --tokens-seen 10250000
"""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path

import tasks
import torch
from prepare import read_rows

from giong import samples
from giong.config import ModelConfig
from giong.contracts import Message, Request, Sampling, ScoreRequest
from giong.engine.score import LocalScorer
from giong.evaluation.metrics.meaning import closed_words, key_recall
from giong.evaluation.metrics.text import rep_n, words
from giong.evaluation.probes import bundled_items, probe_scores
from giong.generation.local import LocalModel
from giong.models.load import load_model
from giong.workspace import atomic_write

NUM_PASSAGES = 240
CARD = """# giong-tiny

The tiny base model that ships with giong: a {parameters:.1f} M parameter Llama ({layers} layers, width {width}, byte-level BPE of
{vocabulary} tokens, context {context}), trained from random weights with giong's own engine on {tokens:.2f} M tokens of English text
and of copying and rewriting tasks derived from it (`examples/base-model`). It stands in for a real base model in the demo and in
the tests, so that neither needs a download.

| on unseen text ({passages} passages of 50 to 75 words, greedy) | |
|---|---:|
| bits per byte, validation text | {bpb:.3f} |
| passages copied exactly when asked to repeat | {copied:.0%} |
| key recall when padded prose is made plain again | {recall:.0%} |
| answers that end by themselves | {ended:.1%} |
| answers that loop (repeated 4-grams above 2 %) | {looped:.0%} |

| bundled probes, greedy | |
|---|---:|
{probes}

**What it can do**: carry names, numbers and words from a request into its answer; repeat, correct, and strip padding; stop.
**What it cannot do**: know facts, reason, follow instructions that it has not seen, write Vietnamese. It follows a style prompt no
better than chance and profits little from examples in the prompt; large models do both far better. Nothing that it shows about
prompting transfers to them.

Trained on the texts listed in ATTRIBUTION.md (public domain, CC BY, MIT), which must go along with the weights. Weights: Apache-2.0.
No measure of bias or safety has been taken; it writes in the manner of its sources, some of which are a century old.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens-seen", type=int, required=True)
    arguments = parser.parse_args()
    loaded = load_model(ModelConfig(name_or_path=str(arguments.model)), dtype=torch.bfloat16)
    local = LocalModel(loaded)
    documents = list(read_rows(arguments.data / "base/mix-en-60mb.valid.jsonl.gz"))
    rng = random.Random(1)
    unseen = [p for d in documents for p in tasks.passages_of(d["text"], rng) if 50 <= len(p.split()) <= 75]
    passages = rng.sample(unseen, NUM_PASSAGES)

    scores = LocalScorer(loaded).score([ScoreRequest(document["text"][:4000]) for document in documents])
    bpb = sum(score.nll for score in scores) / math.log(2) / sum(score.num_bytes for score in scores)

    def ask(kind: str) -> list:
        requests = [(tasks.make_task(kind, passage, rng) or ("", ""))[0] for passage in passages]
        prompts = [Request(str(i), (Message("user", tasks.phrase(kind, request, rng, bare=0)),)) for i, request in enumerate(requests)]
        return local.predictor(kind, None, Sampling(max_new_tokens=256)).predict(prompts)

    repeated, plain = ask("repeat"), ask("plain")
    replies = [*repeated, *plain]
    closed = closed_words(passages)
    score = score_probes(local)
    config = loaded.model.config
    figures = {
        "parameters": loaded.shape.num_parameters / 1e6, "layers": config.num_hidden_layers, "width": config.hidden_size,
        "vocabulary": config.vocab_size, "context": config.max_position_embeddings, "tokens": arguments.tokens_seen / 1e6,
        "passages": NUM_PASSAGES, "bpb": bpb, "copied": sum(r.text.strip() == p for r, p in zip(repeated, passages)) / NUM_PASSAGES,
        "recall": sum(key_recall(p, r.text, closed) for r, p in zip(plain, passages)) / NUM_PASSAGES,
        "ended": sum(reply.finish_reason == "stop" for reply in replies) / len(replies),
        "probes": "\n".join(f"| {kind} | {value:.0%} |" for kind, value in score.items()),
        "looped": sum(rep_n(words(reply.text), 4) > 0.02 for reply in replies) / len(replies),
    }  # fmt: skip
    card = CARD.format(**figures)
    (arguments.model / "README.md").write_text(card, encoding="utf-8")
    print(card)


def score_probes(local: LocalModel) -> dict[str, float]:
    """The mean score of each kind of the bundled probes; each item's own goes into the file of the probes."""
    items = bundled_items()
    requests = [Request(item.id, (Message("user", item.request),)) for item in items]
    replies = local.predictor("probes", None, Sampling(max_new_tokens=120)).predict(requests)
    scores = {item.id: round(item.score(reply), 3) for item, reply in zip(items, replies)}
    with atomic_write(samples.PROBES_PATH, "w") as stream:
        rows = [json.loads(line) for line in samples.PROBES_PATH.read_text(encoding="utf-8").splitlines()]
        stream.writelines(json.dumps({**row, "giong_tiny": scores[row["id"]]}, ensure_ascii=False) + "\n" for row in rows)
    return probe_scores(items, replies).tasks


if __name__ == "__main__":
    main()
