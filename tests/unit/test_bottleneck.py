"""What is the method `bottleneck`'s own: what an adapter computes, where it stands, how large it is, and that it cannot be merged."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from moving_parts import CASES
from safetensors.torch import load_file, save_file
from test_methods import applied, logits_of, take_steps

import giong.models.bottleneck as bottleneck
from giong.config import MethodConfig, ModelConfig, TrainConfig, parse
from giong.contracts import Sampling
from giong.errors import ConfigError, ModelError
from giong.generation.local import LocalModel
from giong.methods import METHODS
from giong.models.bottleneck import NAME, Bottleneck
from giong.models.trained import load_trained
from giong.sizing.defaults import resolve_training
from giong.sizing.moving import check_method
from giong.sizing.shapes import num_trainable_parameters
from giong.workspace import read_json

some = pytest.mark.parametrize(("case", "family"), [("bottleneck", "llama"), ("bottleneck, one", "gemma2"), ("bottleneck", "gpt2")])


def test_an_adapter_by_hand():
    """x = (1, 2): down (1, -1) gives -1 + 3 = 2; GELU(2) = 2 Phi(2); up (2, 0.5) with biases (0, 1)."""
    adapter = Bottleneck(2, 1)
    x = torch.tensor([1.0, 2.0])
    assert torch.equal(adapter(x), x)
    with torch.no_grad():
        for parameter, values in (
            (adapter.down.weight, [[1.0, -1.0]]), (adapter.down.bias, [3.0]), (adapter.up.weight, [[2.0], [0.5]]), (adapter.up.bias, [0.0, 1.0]),
        ):  # fmt: skip
            parameter.copy_(torch.tensor(values))
    inner = 2 * 0.5 * (1 + math.erf(2 / math.sqrt(2)))
    assert adapter(x).tolist() == pytest.approx([1 + 2 * inner, 2 + 0.5 * inner + 1], rel=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "neox"])
def test_adapters_stand_behind_attention_and_mlp(tiny_model: Callable, family: str):
    """What a sublayer gives passes through them, before anything is added to it."""
    for case, ends in (("bottleneck", ("attn", "attention", "mlp")), ("bottleneck, one", ("mlp",))):
        model = applied(tiny_model, case, family).model
        adapters = {name.removesuffix(f".{NAME}"): module for name, module in model.named_modules() if isinstance(module, Bottleneck)}
        assert len(adapters) == 2 * (2 if case == "bottleneck" else 1)
        assert all(place.endswith(ends) for place in adapters)
        base = tiny_model(family).model
        for place, adapter in adapters.items():
            given: list[torch.Tensor] = []
            for other in (base, model):
                # Of several hooks the latest sees what leaves the module.
                other.get_submodule(place).register_forward_hook(partial(keep_output, given))
            adapter.up.bias.data.fill_(0.5)
            logits_of(base), logits_of(model)
            assert torch.allclose(given[1], given[0] + 0.5, atol=1e-5)
            adapter.up.bias.data.zero_()


def keep_output(given: list[torch.Tensor], module: torch.nn.Module, inputs: tuple, output: torch.Tensor | tuple) -> None:
    given.append(output[0] if isinstance(output, tuple) else output)


@some
def test_adapters_are_saved_loaded_and_written_with(tiny_model: Callable, tiny_folder: Callable, tmp_path: Path, case: str, family: str):
    base, folder = ModelConfig(name_or_path=str(tiny_folder(family))), tmp_path / "partial"
    trainable = applied(tiny_model, case, family, base_name="somewhere/base")
    take_steps(trainable)
    expected = logits_of(trainable.model)
    trainable.save(folder)
    assert read_json(folder / "partial_config.json") == {
        "method": "bottleneck", "base_model_name_or_path": "somewhere/base", "adapter_size": 5,
        "adapter_placement": CASES[case].adapter_placement,
    }  # fmt: skip
    saved = load_file(folder / "partial_model.safetensors")
    assert set(saved) == set(trainable.parameters)
    loaded = load_trained(base, folder, dtype=torch.float32)
    assert torch.equal(logits_of(loaded.model), expected)
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    # Token by token with a cache, as it is served: the same as all at once.
    prompt = list(range(3, 20))
    written = LocalModel(loaded).generate([prompt], [Sampling(max_new_tokens=6)], None)[0].tokens
    with torch.no_grad():
        whole = trainable.model(input_ids=torch.tensor([[*prompt, *written]])).logits[0]
    assert whole.argmax(-1)[len(prompt) - 1 : -1].tolist() == list(written)
    for name in (next(iter(saved)), list(saved)[-1]):
        save_file({other: tensor for other, tensor in saved.items() if other != name}, folder / "partial_model.safetensors")
        assert not torch.equal(logits_of(load_trained(base, folder, dtype=torch.float32).model), expected)


def test_it_cannot_be_merged_which_is_said_before_training(tiny_model: Callable):
    trainable = applied(tiny_model, "bottleneck", "llama")
    with pytest.raises(ModelError, match="cannot be merged"):
        trainable.merge()
    for formats in (["merged"], ["adapter"], ["adapter", "merged"]):
        with pytest.raises(ConfigError, match="cannot be made of method.name bottleneck: its adapters cannot be merged"):
            parse({"method": {"name": "bottleneck"}, "export": {"formats": formats}})
        parse({"method": {"name": "lora"}, "export": {"formats": formats}})
    parse({"method": {"name": "bottleneck"}})


def test_the_size_is_the_largest_within_its_share(tiny_model: Callable):
    loaded = tiny_model("llama")
    for share, placement in ((None, "houlsby"), (0.1, "houlsby"), (0.1, "pfeiffer")):
        method = MethodConfig(name="bottleneck", adapter_share=share, adapter_placement=placement)
        resolved = resolve_training(method, TrainConfig(), loaded.shape, 200)
        size, room = resolved.method.adapter_size, (share or 0.036) * loaded.shape.num_parameters
        assert resolved.reasons["adapter_size"].startswith(f"adapter_size {size}: all adapters within {share or 0.036:g} of")
        wider = resolved.method.model_copy(update={"adapter_size": size + 1})
        assert num_trainable_parameters(loaded.shape, resolved.method) <= room < num_trainable_parameters(loaded.shape, wider)
        # Without being resolved it comes to the same.
        assert METHODS["bottleneck"].apply(tiny_model("llama").model, method).num_trainable == num_trainable_parameters(
            loaded.shape, method
        )
        assert resolved.method == MethodConfig(**resolved.method.model_dump())
    assert resolve_training(CASES["bottleneck"], TrainConfig(), loaded.shape, 200).method == CASES["bottleneck"]


@pytest.mark.parametrize(("settings", "message", "place"), [
    ({"adapter_size": 64}, "64 wide are no bottleneck in a model 64 wide", "method.adapter_size"),
    ({"adapter_share": 0.9}, "are no bottleneck", "method.adapter_share"),
    ({"adapter_share": 0.001}, "more than 0.001 of this model's parameters", "method.adapter_share"),
])  # fmt: skip
def test_sizes_that_cannot_be_are_refused(tiny_model: Callable, settings: dict, message: str, place: str):
    loaded, method = tiny_model("llama"), MethodConfig(name="bottleneck", **settings)
    before = set(dict(loaded.model.named_modules()))
    for refuse in (lambda: check_method(loaded.shape, method), lambda: METHODS["bottleneck"].apply(loaded.model, method)):
        with pytest.raises(ConfigError, match=message) as caught:
            refuse()
        assert caught.value.place == place
    assert set(dict(loaded.model.named_modules())) == before


def test_two_sizes_and_unknown_sublayers_are_refused(tiny_model: Callable, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match="give one of them"):
        parse({"method": {"name": "bottleneck", "adapter_size": 8, "adapter_share": 0.01}})
    model = tiny_model("llama").model
    monkeypatch.setattr(bottleneck, "sublayers", lambda layer: None)
    with pytest.raises(ConfigError, match="Attention and MLP of the llama family cannot be told apart"):
        METHODS["bottleneck"].apply(model, CASES["bottleneck"])
    assert not any(NAME in name for name, _ in model.named_modules())
