"""Compare recipes of the tiny base at small scale: the same tokens seen, one thing changed at a time.

    python examples/base-model/compare.py --data DIR --work build/recipes [--tokens 1500000] [--only NAME,NAME]

Each variant trains its first phase in a folder of its own under `--work`, where a stopped one goes on, and is measured on held-out text:
bits per byte of running text (comparable between tokenizers), next-token accuracy on a passage to be repeated and on a padded
one to be made plain. Ends with the table of docs/decisions/0003-base-model-recipe.md.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import torch
from prepare import read_rows
from train import RAW_CHARACTERS, measure_probes, probe_rows
from transformers import AutoTokenizer, LlamaForCausalLM

VARIANTS = {
    "4 layers of 512, half tasks, 8,192 tokens": ["--layers", "4"],
    "deeper and narrower: 8 layers of 384": ["--layers", "8", "--width", "384"],
    "a quarter tasks": ["--layers", "4", "--task-share", "0.25"],
    "vocabulary of 4,096": ["--layers", "4", "--vocab-size", "4096"],
    "without the copying heads": ["--layers", "4", "--plain-initialisation"],
}


def measured(folder: Path, documents: list[dict]) -> dict[str, float]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    found = measure_probes(model, probe_rows(tokenizer, documents))
    num_bytes = sum(len(document["text"][:RAW_CHARACTERS].encode()) for document in documents[:24])
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        "bits_per_byte": found["raw"]["nll_sum"] / math.log(2) / num_bytes,
        "repeat": found["repeat"]["accuracy"], "plain": found["plain"]["accuracy"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=1_500_000)
    parser.add_argument("--only", help="numbers of the variants, from 0, separated by commas")
    arguments = parser.parse_args()
    chosen = [int(number) for number in arguments.only.split(",")] if arguments.only else range(len(VARIANTS))
    documents = list(read_rows(arguments.data / "base/mix-en-60mb.valid.jsonl.gz"))
    lines = ["| recipe | M parameters | bits per byte | repeat | make plain |", "|---|---:|---:|---:|---:|"]
    for number in chosen:
        name, options = list(VARIANTS.items())[number]
        work = arguments.work / f"variant-{number}"
        if not (work / "measured.json").is_file():
            script = [sys.executable, str(Path(__file__).with_name("train.py")), "--data", str(arguments.data), "--work", str(work)]
            subprocess.run(
                [*script, "--only-first", "--epochs", "1", "--batch-rows", "32", "--tokens", str(arguments.tokens), *options], check=True
            )
            (work / "measured.json").write_text(json.dumps(measured(work / "model", documents)), encoding="utf-8")
        row = json.loads((work / "measured.json").read_text(encoding="utf-8"))
        lines.append(
            f"| {name} | {row['parameters']:.1f} | {row['bits_per_byte']:.3f} | {row['repeat']:.3f} | {row['plain']:.3f} |"
        )  # fmt: skip
    print("\n".join(lines))


if __name__ == "__main__":
    main()
