"""One setting for every way in which a method moves something, and the families that it is for: what the laws of methods run over."""

from __future__ import annotations

from tiny_models import FAMILIES

from giong.config import MethodConfig

CASES = {
    "lora": MethodConfig(name="lora", lora_r=4, lora_alpha=8.0, lora_dropout=0.0),
    "lora, dora": MethodConfig(name="lora", lora_r=4, lora_alpha=8.0, lora_dropout=0.0, use_dora=True),
    "lora, pissa": MethodConfig(
        name="lora",
        lora_r=6,
        lora_alpha=6.0,
        lora_dropout=0.0,
        init_lora_weights="pissa",
        use_rslora=True,
        rank_pattern={"0.self_attn.q_proj|0.attn.c_attn": 3},
        alpha_pattern={"(down|c)_proj": 9.0},
    ),
    "lora, bias": MethodConfig(name="lora", lora_r=4, lora_alpha=8.0, lora_dropout=0.0, bias="all"),
    "qlora": MethodConfig(name="qlora", lora_r=4, lora_alpha=8.0, lora_dropout=0.0),
    "full": MethodConfig(name="full"),
    "last_layers": MethodConfig(name="last_layers", num_layers=1),
    "last_layers, first": MethodConfig(name="last_layers", num_layers=1, layers_from="first"),
    "last_layers, norm": MethodConfig(name="last_layers", num_layers=1, train_norms=True),
    "last_layers, head": MethodConfig(name="last_layers", num_layers=1, train_head=True),
    "bias": MethodConfig(name="bias"),
    "norm": MethodConfig(name="norm"),
    "prompt_tuning": MethodConfig(name="prompt_tuning", num_virtual_tokens=8, prompt_tuning_init_text="The kettle sang"),
    "prefix_tuning": MethodConfig(name="prefix_tuning", num_virtual_tokens=8, prompt_tuning_init_text="The kettle sang"),
    "sparse": MethodConfig(name="sparse", sparse_share=0.02, sparse_score="magnitude"),
    "bottleneck": MethodConfig(name="bottleneck", adapter_size=5),
    "bottleneck, one": MethodConfig(name="bottleneck", adapter_size=5, adapter_placement="pfeiffer"),
}
"""The twins have two layers, so that one is a part of them."""

BIASED = ("qwen2", "gpt2")
UNTIED = ("llama", "mistral")

ADAPTERS = ("lora", "lora, dora", "lora, pissa", "lora, bias")

SOFT_PROMPTS = ("prompt_tuning", "prefix_tuning")
"""What the model's own forward pass knows nothing of: `unit/test_soft_prompts.py` has their laws."""

OWN_LAWS = (*SOFT_PROMPTS, "qlora")
"""And `unit/test_qlora.py` those of the method that changes its base."""

DIFFERENCES = {name: config for name, config in CASES.items() if config.name in ("last_layers", "bias", "norm")}
"""What is saved as the tensors that moved."""

BOTTLENECKS = ("bottleneck", "bottleneck, one")


def families_of(case: str) -> tuple[str, ...]:
    """The families that have what the case moves."""
    if case == "bias":
        return BIASED
    if case in ADAPTERS[1:]:
        return BIASED
    return UNTIED if CASES[case].train_head else FAMILIES


def pairs(*cases: str) -> list[tuple[str, str]]:
    """(case, family) for some cases, or for all that have no page of laws of their own."""
    chosen = cases or [case for case in CASES if case not in OWN_LAWS]
    return [(case, family) for case in chosen for family in families_of(case)]
