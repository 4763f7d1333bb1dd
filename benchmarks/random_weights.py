"""Write a model folder with random bf16 weights and a stand-in tokenizer: `python random_weights.py FOLDER CONFIG_AS_JSON`.

A process of its own, so that whoever asks for it stays small: a child's peak memory begins with its parent's. Weights are
drawn wider than for training, so that every layer matters to the loss: a shifted mask or rows that see each other show in it.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch
from shapes import EOS_ID, PAD_ID
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers import logging as transformers_logging

from giong.workspace import atomic_folder

GAIN = 1.5
"""Standard deviation of a layer's output for an input of 1: logits of that size, attention scores of its square."""


def main() -> None:
    path, values = Path(sys.argv[1]), json.loads(sys.argv[2])
    transformers_logging.disable_progress_bar()
    spread = GAIN / math.sqrt(values["hidden_size"])
    config = AutoConfig.for_model(
        **values, initializer_range=spread, dtype="bfloat16", pad_token_id=PAD_ID, eos_token_id=EOS_ID, bos_token_id=None
    )
    torch.manual_seed(0)
    # A GPU draws billions of numbers in a second, a CPU in minutes.
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    words = Tokenizer(WordLevel({"<pad>": PAD_ID, "<eos>": EOS_ID, "<unk>": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    with atomic_folder(path) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
