"""An initialisation with which a tiny Llama can look back from the first step.

Copying needs two heads in a row: one that looks at the token before, and one that looks for the place where the present
token stood earlier and takes what followed it ("induction", Elhage et al. 2021; Olsson et al. 2022, 2209.11895). Random
weights find them only after millions of tokens. Here both are written down, in the spirit of mimetic initialisation
(Trockman & Kolter 2023, 2305.09828); everything else stays random, and training is free to change all of it. The
measured effect is in docs/decisions/0003-base-model-recipe.md.
"""

from __future__ import annotations

import torch
from transformers import LlamaForCausalLM

CONSTANT = 0
"""Width that every embedding shares: what a head reads that wants position and not content."""
OUT = 6.0
"""How strongly the token that is looked up is written, relative to the embedding of the present one."""
FAST_PAIRS = 8
"""Rotary pairs that turn fast enough to tell neighbouring positions apart."""


@torch.no_grad()
def write_copying_heads(model: LlamaForCausalLM, *, previous_layer: int = 0, induction_layer: int = 1, seed: int = 0) -> None:
    """Make head 0 and the first head of each further key-value group of two layers a copying pair, in place."""
    config = model.config
    width, head_dim = config.hidden_size, config.head_dim
    groups, per_group = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    generator = torch.Generator().manual_seed(seed)
    embedding = model.model.embed_tokens.weight
    scale = embedding[:, 1:].square().mean().sqrt()
    embedding[:, CONSTANT] = 4 * scale
    rms = embedding.square().mean(1).sqrt().mean()
    constant = float(4 * scale / rms)

    theta = config.rope_parameters["rope_theta"]
    frequencies = theta ** (-torch.arange(head_dim // 2) / (head_dim // 2))
    slow = [pair for pair in range(head_dim // 2) if float(frequencies[pair]) < 0.004]
    slow_rows = torch.tensor(slow + [pair + head_dim // 2 for pair in slow])

    # Orthogonal directions: identities that are read, and the room they are written to.
    basis = torch.linalg.qr(torch.randn(width - 1, width - 1, generator=generator))[0]
    basis = torch.cat([torch.zeros(width - 1, 1), basis], dim=1)
    identity = basis[: groups * head_dim].view(groups, head_dim, width)
    room = torch.linalg.qr(torch.randn(width, groups * head_dim, generator=generator))[0].T.reshape(groups, head_dim, width)
    room[:, :, CONSTANT] = 0

    # Blocks begin as the identity: with 0.02-sized embeddings, random outputs would drown what the heads read.
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()

    previous = model.model.layers[previous_layer].self_attn
    induction = model.model.layers[induction_layer].self_attn
    for group in range(groups):
        head = group * per_group
        rows = slice(head * head_dim, (head + 1) * head_dim)
        key_rows = slice(group * head_dim, (group + 1) * head_dim)
        query = torch.zeros(head_dim, width)
        key = torch.zeros(head_dim, width)
        for pair in range(FAST_PAIRS):
            query[pair, CONSTANT] = 6.0 / constant
            key[pair, CONSTANT] = 6.0 / constant * torch.cos(frequencies[pair])
            key[pair + head_dim // 2, CONSTANT] = 6.0 / constant * torch.sin(frequencies[pair])
        previous.q_proj.weight[rows] = query
        previous.k_proj.weight[key_rows] = key
        previous.v_proj.weight[key_rows] = identity[group]
        previous.o_proj.weight[:, rows] = float(rms) * room[group].T

        query, key = torch.zeros(head_dim, width), torch.zeros(head_dim, width)
        query[slow_rows] = 1.8 * identity[group, slow_rows]
        key[slow_rows] = 1.8 * room[group, slow_rows]
        induction.q_proj.weight[rows] = query
        induction.k_proj.weight[key_rows] = key
        induction.v_proj.weight[key_rows] = identity[group]
        induction.o_proj.weight[:, rows] = OUT * float(rms) * identity[group].T
