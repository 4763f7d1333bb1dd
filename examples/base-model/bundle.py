"""Copy the newest checkpoint of a base-model run into a model folder (bf16), whether or not the run has ended.

python examples/base-model/bundle.py --work build/base --to src/giong/models/bundled
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from train import PHASES, checkpoints_folder, make_model
from transformers import AutoTokenizer

from giong.engine.checkpoint import list_checkpoints, load_checkpoint

KEPT_FILES = (
    "ATTRIBUTION.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "README.md",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=512)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.work)
    model = make_model(len(tokenizer), layers=arguments.layers, width=arguments.width, copying_heads=False, seed=0)
    found = [path for phase in PHASES for path in list_checkpoints(checkpoints_folder(arguments.work, phase))]
    tensors, state = load_checkpoint(found[-1])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"master/{name}"])
    model.to(torch.bfloat16)
    arguments.to.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(arguments.to)
    tokenizer.save_pretrained(arguments.to)
    for path in arguments.to.iterdir():
        if path.name not in KEPT_FILES:
            path.unlink()
    print(f"step {state['step']}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters -> {arguments.to}")


if __name__ == "__main__":
    main()
