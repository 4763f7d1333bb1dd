"""What the engine replaces in each family, that it really runs, that a family with other formulas keeps its own, and that
nothing of it is left behind.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from parity.tolerances import PLANTED_FACTOR, allowed
from test_packing import UNEQUAL, logprobs_one_by_one, rows_of
from tiny_models import FAMILIES
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

import giong.engine.attention as attention
import giong.engine.fast_path as fast_path_module
from giong.config import MethodConfig
from giong.contracts import Sampling
from giong.engine.fast_path import fast_path
from giong.engine.packing import pack
from giong.engine.step import backward, forward_logprobs, hidden_states
from giong.errors import ModelError
from giong.generation.decoder import decode
from giong.methods import METHODS
from giong.objectives import sft

NUM_LAYERS = 2
NORMS = {"llama": 5, "qwen2": 5, "qwen3": 9, "gemma": 5, "gemma2": 9, "mistral": 5}
"""Two layers with two norms each (Gemma 2: four; Qwen 3: two more on the heads) and the last one."""
DTYPES = ["float32", "bfloat16"]


def replaced(model: torch.nn.Module) -> dict[str, str]:
    """Name -> class of every module that has another forward at this moment."""
    return {name: type(module).__name__ for name, module in model.named_modules() if "forward" in module.__dict__}


def replaced_inside(model: torch.nn.Module) -> dict[str, str]:
    with fast_path(model):
        return replaced(model)


def modelling(model: torch.nn.Module) -> ModuleType:
    return sys.modules[type(model).__module__]


def with_lora(tiny_model: Callable, family: str, dtype: str = "float32", dropout: float = 0.0) -> torch.nn.Module:
    config = MethodConfig(name="lora", lora_r=4, lora_alpha=8.0, lora_dropout=dropout)
    model = METHODS["lora"].apply(tiny_model(family, dtype=dtype).model, config, seed=1).model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
    return model


def difference(model: torch.nn.Module) -> float:
    """Packed on the fast path against plain transformers, one row at a time, in nats."""
    rows = rows_of(UNEQUAL)
    with torch.no_grad():
        return float((forward_logprobs(model, pack(rows))["logprobs_N"] - torch.cat(logprobs_one_by_one(model, rows))).abs().max())


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """How often each of the engine's layers ran."""
    counter: Counter = Counter()

    def count(module: ModuleType, name: str) -> None:
        true = getattr(module, name)

        def counted(*args: object, **kwargs: object) -> object:
            counter[name] += 1
            return true(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)

    for name in ("rms_norm", "gated_down", "rotary", "lora_linear_forward"):
        count(fast_path_module, name)
    count(attention, "row_attention")
    monkeypatch.setattr(fast_path_module, "_rotaries", {})
    return counter


# ---- what is replaced ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", NORMS)
def test_norms_and_gated_mlps_are_replaced(tiny_model: Callable, family: str, dtype: str):
    model = tiny_model(family, dtype=dtype).model
    kinds = Counter("norm" if kind.endswith("RMSNorm") else kind[-3:] for kind in replaced_inside(model).values())
    assert kinds == {"norm": NORMS[family], "MLP": NUM_LAYERS}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", NORMS)
def test_they_run_and_so_do_rotary_positions_and_attention(tiny_model: Callable, family: str, dtype: str, calls: Counter):
    model = tiny_model(family, dtype=dtype).model
    with fast_path(model):
        pass
    calls.clear()
    hidden_states(model, pack(rows_of(UNEQUAL)))
    # Gemma 2 caps its scores, which attention leaves to PyTorch.
    expected = {"rms_norm": NORMS[family], "gated_down": NUM_LAYERS, "rotary": 2 * NUM_LAYERS, "row_attention": NUM_LAYERS}
    assert calls == {name: number for name, number in expected.items() if (family, name) != ("gemma2", "row_attention")}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", NORMS)
def test_lora_layers_run_as_one_function(tiny_model: Callable, family: str, dtype: str, calls: Counter, monkeypatch: pytest.MonkeyPatch):
    """Seven per layer; the one behind the gate is part of the gated MLP. None is left to PEFT."""
    model = with_lora(tiny_model, family, dtype)
    kinds = Counter(replaced_inside(model).values())
    assert kinds["Linear"] == 7 * NUM_LAYERS
    calls.clear()
    monkeypatch.setattr("peft.tuners.lora.Linear.forward", None)
    hidden_states(model, pack(rows_of(UNEQUAL)))
    assert (calls["lora_linear_forward"], calls["gated_down"]) == (6 * NUM_LAYERS, NUM_LAYERS)


def test_gpt2_runs_on_its_own_layers(tiny_model: Callable, calls: Counter, monkeypatch: pytest.MonkeyPatch):
    """Layer norm, no gate, learned positions: nothing to replace but attention and, with LoRA, its linear layers."""
    model = tiny_model("gpt2").model
    assert replaced_inside(model) == {}
    assert not hasattr(modelling(model), "apply_rotary_pos_emb")
    hidden_states(model, pack(rows_of(UNEQUAL)))
    assert calls == {"row_attention": NUM_LAYERS}
    model = with_lora(tiny_model, "gpt2")
    calls.clear()
    monkeypatch.setattr("peft.tuners.lora.Linear.forward", None)
    hidden_states(model, pack(rows_of(UNEQUAL)))
    assert calls == {"row_attention": NUM_LAYERS, "lora_linear_forward": 4 * NUM_LAYERS}


@pytest.mark.parametrize("family", [*FAMILIES, "neox"])
def test_with_an_adapter_the_numbers_are_those_of_peft(tiny_model: Callable, family: str):
    assert difference(with_lora(tiny_model, family)) < allowed("packed_logprobs")


@pytest.mark.parametrize("planted", ["norm", "gate", "rotation", "update"])
def test_a_wrong_layer_is_seen(tiny_model: Callable, planted: str, monkeypatch: pytest.MonkeyPatch):
    """The trial is passed first, so that the wrong layer is really in place."""
    model = with_lora(tiny_model, "llama")
    replaced_inside(model)
    true_norm, true_down, true_rotary = fast_path_module.rms_norm, fast_path_module.gated_down, fast_path_module.rotary
    wrong: dict[str, tuple[str, Callable]] = {
        "norm": ("rms_norm", lambda x, weight, *, epsilon, offset: true_norm(x, weight, epsilon=1e-2, offset=offset)),
        "gate": ("gated_down", lambda gate, up, weights, activation: true_down(gate, up, weights, "gelu")),
        "rotation": ("rotary", lambda x, cos, sin: true_rotary(x, cos, 0.99 * sin)),
        "update": ("lora_linear_forward", lambda layer, x: layer.base_layer(x)),
    }
    monkeypatch.setattr(fast_path_module, *wrong[planted])
    assert difference(model) > PLANTED_FACTOR * allowed("packed_logprobs")


@pytest.mark.parametrize(("width", "dtype"), [(896, "float32"), (4096, "float32"), (4096, "bfloat16"), (8192, "float32")])
def test_wide_norms_pass_the_trial_too(width: int, dtype: str):
    """Sums of more squares are rounded more often: a trial that is too strict would quietly leave large models slow."""
    norm = LlamaRMSNorm(width, eps=1e-5)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(width) + 0.5)
    norm.to(getattr(torch, dtype))
    assert any(fast_path_module._agree(norm, make(norm)) for make in fast_path_module._NORMS)


# ---- what keeps its own code -----------------------------------------------------------------------------------------


class CentredRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states - hidden_states.mean(-1, keepdim=True))


class BiasedRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) + 0.1


class OutsideRMSNorm(LlamaRMSNorm):
    """Epsilon outside the root: the same for large inputs, half as much for inputs as small as epsilon."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.weight * hidden_states / (hidden_states.square().mean(-1, keepdim=True).sqrt() + self.variance_epsilon)


class OtherwayMLP(LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


class ScaledMLP(LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * super().forward(x)


@pytest.mark.parametrize("kind", [CentredRMSNorm, BiasedRMSNorm, OutsideRMSNorm, OtherwayMLP, ScaledMLP])
def test_a_layer_that_computes_something_else_keeps_its_own(tiny_model: Callable, kind: type):
    model = tiny_model("llama").model
    base = kind.__mro__[1]
    assert base.__name__ in replaced_inside(tiny_model("llama").model).values()
    for module in model.modules():
        if type(module) is base:
            module.__class__ = kind
    assert kind.__name__ not in replaced_inside(model).values()
    assert difference(model) < allowed("packed_logprobs")


@pytest.mark.parametrize("layer", range(NUM_LAYERS))
def test_one_layer_with_another_activation_keeps_its_own(tiny_model: Callable, layer: int):
    """The class is the same as that of its neighbours, of which the first is not the one that differs."""
    model = tiny_model("llama").model
    model.model.layers[layer].mlp.act_fn = torch.nn.Tanh()
    assert f"model.layers.{layer}.mlp" not in replaced_inside(model)
    assert difference(model) < allowed("packed_logprobs")


def test_a_rotation_of_neighbouring_pairs_keeps_its_own(tiny_model: Callable, monkeypatch: pytest.MonkeyPatch, calls: Counter):
    model = tiny_model("llama").model

    def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        even, odd = x[..., ::2], x[..., 1::2]
        half = x.shape[-1] // 2
        cos, sin = cos[:, None, :, :half], sin[:, None, :, :half]
        return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)

    monkeypatch.setattr(modelling(model), "apply_rotary_pos_emb", lambda q, k, cos, sin: (rotate(q, cos, sin), rotate(k, cos, sin)))
    assert difference(model) < allowed("packed_logprobs")
    # The trial itself calls the engine's function once for queries and once for keys.
    assert calls["rotary"] <= 2


def test_partial_rotation_keeps_its_own(tiny_model: Callable, calls: Counter):
    model = tiny_model("neox").model
    hidden_states(model, pack(rows_of(UNEQUAL)))
    assert calls["rotary"] <= 2


def test_an_adapter_that_is_switched_off_gives_the_base(tiny_model: Callable):
    """The adapter's state is asked at every call, not when the plan is made."""
    model, base, rows = with_lora(tiny_model, "llama"), tiny_model("llama").model, pack(rows_of(UNEQUAL))
    layers = [module for module in model.modules() if hasattr(module, "enable_adapters") and hasattr(module, "lora_A")]
    with torch.no_grad():
        tuned = hidden_states(model, rows)
        for layer in layers:
            layer.enable_adapters(False)
        off = hidden_states(model, rows)
        for layer in layers:
            layer.enable_adapters(True)
        assert torch.allclose(off, hidden_states(base, rows), atol=allowed("packed_logprobs"))
        assert torch.equal(tuned, hidden_states(model, rows))
        assert float((tuned - off).abs().max()) > 0.01


# ---- what is left behind: nothing ------------------------------------------------------------------------------------


def traces(model: torch.nn.Module) -> tuple:
    """All that the block changes, and what its trials might."""
    return (
        replaced(model),
        getattr(modelling(model), "apply_rotary_pos_emb", None),
        model.config._attn_implementation,
        [module.training for module in model.modules()],
        torch.get_rng_state().tolist(),
    )


@pytest.mark.parametrize("family", [*FAMILIES, "neox"])
def test_everything_is_as_it_was_after_the_block(tiny_model: Callable, family: str):
    model = with_lora(tiny_model, family, dropout=0.1).train()
    before = traces(model)
    assert before[0] == {}
    with fast_path(model):
        assert model.config._attn_implementation == attention.IMPLEMENTATION
    assert traces(model) == before
    with fast_path(model), fast_path(model):
        pass
    assert traces(model) == before


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_everything_is_as_it_was_after_an_error(tiny_model: Callable, family: str):
    model = with_lora(tiny_model, family)
    before = traces(model)
    with pytest.raises(RuntimeError, match="on purpose"), fast_path(model):
        raise RuntimeError("on purpose")
    assert traces(model) == before
    # One from inside the model: a row that is not what `lengths` says.
    made = pack(rows_of((7,)))
    with pytest.raises((RuntimeError, IndexError)), fast_path(model):
        model.base_model(input_ids=made.input_ids_T[None] + 10_000, use_cache=False, lengths=made.lengths)
    assert traces(model) == before


def test_a_family_that_is_refused_is_left_as_it_was():
    from transformers import MptConfig, MptForCausalLM

    model = MptForCausalLM(MptConfig(d_model=32, n_heads=2, n_layers=1, vocab_size=64, max_seq_len=64))
    before = traces(model)
    with pytest.raises(ModelError, match="mpt"), fast_path(model):
        pass
    assert traces(model) == before


def test_submodules_keep_their_training_mode(tiny_model: Callable):
    """A model in training may hold parts that somebody has set to evaluation."""
    model = with_lora(tiny_model, "llama", dropout=0.1).train()
    model.model.layers[0].mlp.down_proj.eval()
    before = traces(model)
    with fast_path(model):
        pass
    assert traces(model) == before


def test_a_model_that_was_let_go_is_freed(tiny_model: Callable):
    """The plans are kept per model, and a server loads many."""
    import gc
    import weakref

    model = tiny_model("llama").model
    with fast_path(model):
        pass
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("family", [*FAMILIES, "neox"])
def test_a_model_decodes_the_same_bytes_before_and_after_training_passes(tiny_model: Callable, family: str):
    model = with_lora(tiny_model, family)
    prompts, ids = [[5, 60, 200, 7], [9, 31]], torch.arange(3, 43)[None]

    def outputs() -> tuple[list[list[int]], torch.Tensor]:
        answers = decode(model, prompts, [Sampling(max_new_tokens=12)] * 2, [])
        with torch.no_grad():
            return [answer.tokens for answer in answers], model(input_ids=ids).logits

    tokens, logits = outputs()
    backward(model, rows_of(UNEQUAL), sft.loss, 60)
    after_tokens, after_logits = outputs()
    assert after_tokens == tokens
    assert torch.equal(after_logits, logits)
