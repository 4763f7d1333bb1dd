"""Random-weight tiny twins of real families, as folders on disk: what a user's model folder looks like, 2 layers deep.

Weights are drawn wide (and gains and biases are not left at 1 and 0), because a model whose layers hardly matter would let
a wrong mask or a wrong position pass.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM
from transformers import logging as transformers_logging

FAMILIES = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "mistral", "gpt2")
"""Families with a twin. "neox" is one more, which `sizing.shapes` does not know and which has two norms and partial rotary."""

VOCAB_SIZE = 448
SLIDING_WINDOW = 12
CONTEXT = 512

_SENTENCES = (
    "The kettle sang before anyone had asked it to, and the whole kitchen pretended not to listen.",
    "Rewrite the following text in the author's own voice and keep every fact, number and name.",
    "Nobody in the village could say who had painted the bridge blue, but everyone had an opinion.",
    "Trời hôm nay trong xanh và gió thổi nhè nhẹ qua cánh đồng lúa chín vàng.",
    "我们走了一整天的路，直到太阳落到山的后面。",
    "User: what is it that you want? Assistant: I want the answer, and I want it to be short.",
)

# GPT-2's own pattern and the one that Llama 3 and Qwen share; neither lets a token cross a line break into a word.
_GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
_QWEN_PATTERN = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING_CHATML = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' and loop.last %}"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n{{ message['content'].lstrip('\n') }}<|im_end|>\n"
    "{% else %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "<start_of_turn>{{ role }}\n{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}[INST] {{ (system if loop.first else '') + message['content'] }} [/INST]"
    "{% else %} {{ message['content'] | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)

# Per family: chat template, special tokens (the first is the end of text), end of turn, begin of text.
_CHAT = {
    "llama": (LLAMA, ["<|end_of_text|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|eot_id|>", "<|begin_of_text|>"),
    "qwen2": (CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|im_end|>", None),
    "qwen3": (THINKING_CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|im_end|>", None),
    "gemma": (GEMMA, ["<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"], "<end_of_turn>", "<bos>"),
    "mistral": (MISTRAL, ["</s>", "<s>", "[INST]", "[/INST]"], "</s>", "<s>"),
    "gpt2": (None, ["<|endoftext|>"], "<|endoftext|>", None),
}  # fmt: skip
_CHAT["gemma2"] = _CHAT["gemma"]
_CHAT |= dict.fromkeys(("neox", "lfm2", "minimax", "doge", "phimoe", "hyperclovax"), _CHAT["gpt2"])
_CHAT["modernbert-decoder"] = _CHAT["mistral"]

_SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT, "vocab_size": VOCAB_SIZE,
}  # fmt: skip
_CONFIGS = {
    "llama": _SMALL | {"rope_theta": 1000.0},
    "qwen2": _SMALL | {"tie_word_embeddings": True},
    "qwen3": _SMALL | {"tie_word_embeddings": True, "head_dim": 24},
    "gemma": _SMALL | {"head_dim": 24, "num_key_value_heads": 1},
    "gemma2": _SMALL | {
        "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": SLIDING_WINDOW,
        # Low enough that random logits of this size are visibly capped.
        "attn_logit_softcapping": 2.0, "final_logit_softcapping": 6.0,
    },
    "mistral": _SMALL | {"sliding_window": SLIDING_WINDOW},
    "gpt2": {
        "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT, "vocab_size": VOCAB_SIZE,
        "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
    },
    "neox": {key: value for key, value in _SMALL.items() if key != "num_key_value_heads"},
    # Families that compute more than attention, or have a head of their own kind.
    "lfm2": _SMALL | {"layer_types": ["conv", "full_attention"]},
    "minimax": _SMALL | {"num_local_experts": 2, "head_dim": 16},
    "doge": _SMALL,
    "phimoe": _SMALL | {"num_local_experts": 2, "sliding_window": 3 * SLIDING_WINDOW, "tie_word_embeddings": False},
    "hyperclovax": _SMALL | {"logits_scaling": 2.0},
    "modernbert-decoder": _SMALL,
}  # fmt: skip


ENCODERS = {
    "bert": {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": CONTEXT,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    },
    "modernbert": {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": CONTEXT,
        # Every third layer sees all, the others six tokens to either side.
        "local_attention": SLIDING_WINDOW, "global_attn_every_n_layers": 3, "classifier_pooling": "mean",
    },
    "distilbert": {
        "dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4, "max_position_embeddings": CONTEXT, "dropout": 0.0, "attention_dropout": 0.0,
    },
}  # fmt: skip
ENCODERS |= dict.fromkeys(("roberta", "xlm-roberta", "camembert"), ENCODERS["bert"])
ENCODERS["electra"] = ENCODERS["bert"] | {"embedding_size": 48}
_ENCODER_SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@functools.cache
def _trained_word_pieces() -> str:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=VOCAB_SIZE, special_tokens=_ENCODER_SPECIALS, show_progress=False)
    tokenizer.train_from_iterator(_SENTENCES * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer.to_str()


def save_encoder(family: str, folder: Path, *, seed: int = 0, **changes: object) -> Path:
    """Write an encoder's folder as it is published: with the head of masked language modelling, and none for a task."""
    transformers_logging.disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_str(_trained_word_pieces())
    tokenizer.save(str(folder / "tokenizer.json"))
    named = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), _ENCODER_SPECIALS))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": CONTEXT, **named}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    config = AutoConfig.for_model(
        family, **ENCODERS[family] | changes, vocab_size=tokenizer.get_vocab_size(), pad_token_id=0, cls_token_id=2, sep_token_id=3,
        bos_token_id=2, eos_token_id=3, initializer_range=0.15, initializer_cutoff_factor=2.0,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = AutoModelForMaskedLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


@functools.cache
def _trained_vocabulary(num_specials: int) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - num_specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(_SENTENCES * 3, trainer)
    return tokenizer.to_str()


def save_tokenizer(family: str, folder: Path) -> dict[str, int]:
    """Write tokenizer.json and tokenizer_config.json of a family's twin; returns the ids of its special tokens."""
    template, specials, end_of_turn, begin = _CHAT[family]
    tokenizer = Tokenizer.from_str(_trained_vocabulary(len(specials)))
    if family.startswith("qwen"):
        tokenizer.normalizer = normalizers.NFC()
    pattern = _GPT2_PATTERN if family in ("gpt2", "neox") else _QWEN_PATTERN
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end_of_turn, "pad_token": specials[0], "bos_token": begin,
        "model_max_length": CONTEXT, "clean_up_tokenization_spaces": False, "chat_template": template,
    }  # fmt: skip
    settings = {key: value for key, value in settings.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return {token: tokenizer.token_to_id(token) for token in specials}


def save_model(family: str, folder: Path, *, seed: int = 0, **changes: object) -> Path:
    """Write a whole model folder: config.json, safetensors weights, tokenizer. `changes` overrides config keys."""
    transformers_logging.disable_progress_bar()
    ids = save_tokenizer(family, folder)
    _, specials, end_of_turn, begin = _CHAT[family]
    model_type = "gpt_neox" if family == "neox" else family
    config = AutoConfig.for_model(
        model_type, **_CONFIGS[family] | changes, eos_token_id=ids[end_of_turn], pad_token_id=ids[specials[0]],
        bos_token_id=ids[begin] if begin else None, initializer_range=0.15,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
                if family == "gemma2" and "post_" in name:
                    parameter.add_(1.0)
            elif ".layers." in name or ".h." in name:
                # Otherwise a tied head would see little but the last token's own embedding and repeat it for ever.
                parameter.mul_(2.0)
    model.generation_config.eos_token_id = sorted({ids[end_of_turn], ids[specials[0]]})
    model.save_pretrained(folder)
    return folder
