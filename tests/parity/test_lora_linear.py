"""The engine's LoRA layer against PEFT's own forward on the same module, fp32: outputs, every gradient, and what is kept."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import product

import pytest
import torch
from lora_dropout import kept_storages
from parity.tolerances import PLANTED_FACTOR, allowed, relative_error
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

import giong.engine.lora_linear as lora_linear
from giong.engine.lora_dropout import draw_dropout, dropped
from giong.engine.lora_linear import LinearWeights, apply_linear, column_norm, linear_backward, lora_linear_forward, lora_weights

# No two of them, nor their products, are equal: a tensor's shape says what it is.
TOKENS, IN, OUT, RANK = 14, 40, 56, 4
METHODS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
BASES = ("linear", "linear without bias", "conv1d")


class Holder(torch.nn.Module):
    """One layer with a name for PEFT to find."""

    def __init__(self, base: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = Conv1D(OUT, IN) if base == "conv1d" else torch.nn.Linear(IN, OUT, bias=base == "linear")
        self.to(dtype)
        with torch.no_grad():
            self.layer.weight.normal_(0, 0.3)
            if self.layer.bias is not None:
                self.layer.bias.normal_()


def tuned(method: str = "lora", base: str = "linear", dtype: torch.dtype = torch.float32, **settings: object) -> PeftModel:
    """A module with one adapted layer whose update is as large as its weight."""
    torch.manual_seed(2)
    config = LoraConfig(r=RANK, lora_alpha=6, target_modules=["layer"], **METHODS[method] | settings)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        model = get_peft_model(Holder(base, dtype), config, autocast_adapter_dtype=False)
    with torch.no_grad():
        layer = layer_of(model)
        layer.lora_B["default"].weight.normal_(0, 0.3)
        if method == "dora":
            layer.lora_magnitude_vector["default"].weight.mul_(torch.rand(OUT) + 0.5)
    return model


def layer_of(model: PeftModel) -> PeftLinear:
    layer = model.base_model.model.layer
    assert type(layer) is PeftLinear
    return layer


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """(x, gradient of the output), two rows of seven tokens."""
    generator = torch.Generator().manual_seed(5)
    x, grad = (torch.randn(2, TOKENS // 2, width, generator=generator) for width in (IN, OUT))
    return x.to(dtype), grad.to(dtype)


def figures(layer: PeftLinear, forward: Callable, seed: int = 0, rounded: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Output and the gradients of x and of everything that is trained; `rounded` is what x has been rounded to before."""
    dtype = layer.base_layer.weight.dtype
    x, grad = (tensor.to(dtype) for tensor in inputs(rounded or dtype))
    trained = {name: parameter for name, parameter in layer.named_parameters() if parameter.requires_grad}
    torch.manual_seed(seed)
    x.requires_grad_(True)
    output = forward(layer, x)
    gradients = torch.autograd.grad(output, [x, *trained.values()], grad)
    return {"output": output.detach(), **dict(zip(["x", *trained], gradients))}


def error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    assert all(found[name].shape == expected[name].shape for name in found)
    return max(relative_error(found[name], expected[name]) for name in found)


def refuse(*args: object, **kwargs: object) -> None:
    raise AssertionError("the other way was taken")


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_output_and_gradients_equal_peft(method: str, base: str, monkeypatch: pytest.MonkeyPatch):
    layer = layer_of(tuned(method, base))
    expected = figures(layer, PeftLinear.forward)
    assert len(expected) == (5 if method == "dora" else 4)
    monkeypatch.setattr(PeftLinear, "forward", refuse)
    assert error(figures(layer, lora_linear_forward), expected) < allowed("lora_linear")


def planted(name: str) -> Callable:
    """A forward with one of the mistakes that such a layer invites."""

    def forward(layer: PeftLinear, x: torch.Tensor) -> torch.Tensor:
        weights = lora_weights(layer)
        if name == "scale of plain lora":
            return apply_linear(x, weights._replace(scale=6 / RANK))
        if name == "update forgotten":
            return apply_linear(x, weights._replace(scale=0.0))
        magnitude = layer.lora_magnitude_vector["default"].weight
        if name == "norm of the frozen weight":
            return apply_linear(x, weights._replace(bias=None)) * (magnitude / weights.weight.norm(dim=1)) + weights.bias
        if name == "bias under the magnitude":
            return apply_linear(x, weights) * (magnitude / column_norm(weights))
        assert name == "norm with a gradient"
        norm = (weights.weight + weights.scale * weights.lora_b @ weights.lora_a).norm(dim=1)
        return apply_linear(x, weights._replace(bias=None)) * (magnitude / norm) + weights.bias

    return forward


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("rslora", "scale of plain lora"),
        ("lora", "update forgotten"),
        ("dora", "norm of the frozen weight"),
        ("dora", "bias under the magnitude"),
        ("dora", "norm with a gradient"),
    ],
)
def test_a_planted_error_is_seen(method: str, name: str):
    layer = layer_of(tuned(method))
    assert error(figures(layer, planted(name)), figures(layer, PeftLinear.forward)) > PLANTED_FACTOR * allowed("lora_linear")


def test_gradients_equal_finite_differences():
    torch.manual_seed(0)
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in [(3, 5), (4, 5), (4,), (2, 5), (4, 2)]]
    assert torch.autograd.gradcheck(lambda x, w, bias, a, b: apply_linear(x, LinearWeights(w, bias, a, b, 0.7)), leaves)
    assert torch.autograd.gradcheck(lambda x, w, bias: apply_linear(x, LinearWeights(w, bias)), leaves[:3])


@pytest.mark.parametrize("masked", [False, True])
def test_only_what_is_asked_for_is_computed_and_it_is_always_the_same(masked: bool):
    """All 32 sets of wanted gradients."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, lora_a, lora_b, grad = (
        torch.randn(shape, generator=generator) for shape in [(TOKENS, IN), (OUT, IN), (OUT,), (RANK, IN), (OUT, RANK), (TOKENS, OUT)]
    )
    mask = -torch.randint(2, x.shape, generator=generator, dtype=torch.int32) if masked else None
    weights = LinearWeights(weight, bias, lora_a, lora_b, 1.5)
    every = linear_backward(grad, x, weights, (True,) * 5, mask)
    for needs in product([False, True], repeat=5):
        found = linear_backward(grad, x, weights, needs, mask)
        for name, needed in zip(found._fields, needs):
            value = getattr(found, name)
            assert (value is not None) == needed
            assert value is None or torch.equal(value, getattr(every, name))


@pytest.mark.parametrize("base", ["linear", "conv1d"])
def test_in_bf16_the_error_is_no_larger_than_pefts(base: str):
    layer = layer_of(tuned("lora", base, torch.bfloat16))
    found, peer = figures(layer, lora_linear_forward), figures(layer, PeftLinear.forward)
    for name, wanted in figures(layer.double(), PeftLinear.forward, rounded=torch.bfloat16).items():
        assert found[name].dtype == torch.bfloat16
        errors = [float((figure[name].double() - wanted).norm()) for figure in (found, peer)]
        assert errors[0] < allowed("bf16_error_ratio") * errors[1], name


# ---- dropout ---------------------------------------------------------------------------------------------------------


class GivenMask(torch.nn.Module):
    """Stands in for the dropout of a PEFT layer: the next mask that the engine would draw from this seed."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        drawn = draw_dropout(0.4)
        kept = dropped(torch.ones_like(x), drawn.mask(x))
        return x * kept * drawn.scale


@pytest.mark.parametrize("base", BASES)
def test_dropout_is_pefts_with_the_engines_mask(base: str):
    """Forward and backward; another seed is another mask."""
    layer = layer_of(tuned("lora", base, lora_dropout=0.4)).train()
    found, other = (figures(layer, lora_linear_forward, seed=seed) for seed in (3, 4))
    layer.lora_dropout["default"] = GivenMask()
    expected = figures(layer, PeftLinear.forward, seed=3)
    assert error(found, expected) < allowed("lora_linear")
    assert error(other, expected) > PLANTED_FACTOR * allowed("lora_linear")


@pytest.mark.parametrize(
    "mistake", [None, "mask on the frozen path too", "not scaled", "backward without the mask", "another mask backward"]
)
def test_dropout_equals_autograd(mistake: str | None, monkeypatch: pytest.MonkeyPatch):
    layer = layer_of(tuned("lora", lora_dropout=0.4)).train()

    def by_hand(layer: PeftLinear, x: torch.Tensor) -> torch.Tensor:
        drawn = draw_dropout(0.4)
        kept = dropped(torch.ones_like(x), drawn.mask(x))
        low = layer.lora_A["default"](x * kept * (1.0 if mistake == "not scaled" else drawn.scale))
        return layer.base_layer(x * kept if mistake == "mask on the frozen path too" else x) + low @ layer.lora_B["default"].weight.T * 1.5

    if mistake == "backward without the mask":
        monkeypatch.setattr(lora_linear, "linear_backward", lambda *args: linear_backward(*args[:4]))
    if mistake == "another mask backward":
        monkeypatch.setattr(lora_linear, "linear_backward", lambda *args: linear_backward(*args[:4], args[4].flip(0)))
    difference = error(figures(layer, lora_linear_forward), figures(layer, by_hand))
    if mistake is None:
        assert difference < allowed("lora_linear")
    else:
        assert difference > PLANTED_FACTOR * allowed("lora_linear")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("probability", [0.05, 0.4])
def test_the_mask_keeps_its_share_wherever_one_looks(probability: float, dtype: torch.dtype):
    """A million elements: the share kept has a standard deviation of 0.0005 at most; that of a row or a column 0.016, and of the
    products of neighbours 0.0005 too."""
    torch.manual_seed(0)
    drawn, ones = draw_dropout(probability), torch.ones(1000, 1000, dtype=dtype)
    kept = dropped(ones, drawn.mask(ones)).double()
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    share = 1 - probability
    assert float(kept.mean()) == pytest.approx(share, abs=0.0025)
    assert float(kept.mean()) * drawn.scale == pytest.approx(1, abs=0.0045)
    for axis in (0, 1):
        assert torch.allclose(kept.mean(axis), torch.tensor(share, dtype=torch.float64), atol=0.08)
        assert float((kept * kept.roll(1, axis)).mean()) == pytest.approx(share**2, abs=0.003)
    assert torch.equal(kept, dropped(ones, drawn.mask(ones)).double())
    assert not torch.equal(kept, dropped(ones, draw_dropout(probability).mask(ones)).double())


def test_a_dropped_element_is_zero_whatever_it_was():
    drawn = draw_dropout(0.5)
    x = torch.tensor([float("nan"), float("inf"), -2.0, 3.0]).repeat(64, 1)
    mask = drawn.mask(x)
    found = dropped(x, mask)
    assert torch.equal(found[mask == 0], torch.zeros(int((mask == 0).sum())))
    assert torch.equal(found[mask != 0].nan_to_num(), x[mask != 0].nan_to_num())


def test_nothing_to_drop_draws_nothing():
    state = torch.get_rng_state()
    assert (draw_dropout(0.0).mask(torch.ones(2, 2)), draw_dropout(0.0).scale) == (None, 1.0)
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_is_dropped_outside_training():
    layer = layer_of(tuned("lora", lora_dropout=0.4)).eval()
    assert lora_weights(layer).dropout == 0.0
    assert lora_weights(layer.train()).dropout == 0.4
    layer.eval()
    assert error(figures(layer, lora_linear_forward), figures(layer, PeftLinear.forward)) < allowed("lora_linear")


# ---- what is left to PEFT --------------------------------------------------------------------------------------------


def disabled(model: PeftModel) -> None:
    layer_of(model).enable_adapters(False)


def merged(model: PeftModel) -> None:
    layer_of(model).merge()


def several_active(model: PeftModel) -> None:
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=4, target_modules=["layer"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])


def none_active(model: PeftModel) -> None:
    layer_of(model).set_adapter([])


def adapter_in_fp64(model: PeftModel) -> None:
    layer_of(model).lora_A.double()
    layer_of(model).lora_B.double()


LEFT_TO_PEFT: dict[str, tuple[dict, Callable[[PeftModel], None]]] = {
    "disabled": ({}, disabled),
    "merged": ({}, merged),
    "none active": ({}, none_active),
    "bias in the update": ({"lora_bias": True}, lambda model: None),
    "another dtype": ({}, adapter_in_fp64),
}


@pytest.mark.parametrize("case", LEFT_TO_PEFT)
def test_what_is_no_single_update_is_left_to_peft(case: str, monkeypatch: pytest.MonkeyPatch):
    settings, change = LEFT_TO_PEFT[case]
    model = tuned("lora", **settings)
    before = layer_of(model)(inputs()[0])
    change(model)
    layer, x = layer_of(model), inputs()[0]
    expected = PeftLinear.forward(layer, x)
    assert lora_weights(layer) is None
    monkeypatch.setattr(lora_linear, "apply_linear", refuse)
    assert torch.equal(lora_linear_forward(layer, x), expected)
    if case in ("disabled", "none active"):
        assert relative_error(before, expected) > PLANTED_FACTOR * allowed("lora_linear")


def test_dora_with_dropout_is_left_to_peft(monkeypatch: pytest.MonkeyPatch):
    """PEFT drops there what goes into the frozen weight as well."""
    layer = layer_of(tuned("dora", lora_dropout=0.4)).train()
    monkeypatch.setattr(lora_linear, "apply_linear", refuse)
    assert error(figures(layer, lora_linear_forward, seed=3), figures(layer, PeftLinear.forward, seed=3)) == 0
    monkeypatch.undo()
    assert error(figures(layer.eval(), lora_linear_forward), figures(layer, PeftLinear.forward)) < allowed("lora_linear")


def test_one_of_several_adapters_is_the_active_one(monkeypatch: pytest.MonkeyPatch):
    model = tuned("lora")
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=4, target_modules=["layer"], init_lora_weights=False))
    found = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        expected = PeftLinear.forward(layer_of(model), inputs()[0])
        with monkeypatch.context() as patch:
            patch.setattr(PeftLinear, "forward", refuse)
            found[name] = lora_linear_forward(layer_of(model), inputs()[0])
        assert relative_error(found[name], expected) < allowed("lora_linear")
    assert relative_error(found["default"], found["other"]) > 0.01


@pytest.mark.parametrize("base", BASES)
def test_several_active_adapters_are_one_of_the_sum_of_their_ranks(base: str, monkeypatch: pytest.MonkeyPatch):
    model = tuned("lora", base)
    several_active(model)
    layer, first = layer_of(model), ["default"]
    expected = figures(layer, PeftLinear.forward)
    layer.set_adapter(first)
    alone = PeftLinear.forward(layer, inputs()[0]).detach()
    layer.set_adapter(["default", "other"])
    monkeypatch.setattr(PeftLinear, "forward", refuse)
    found = figures(layer, lora_linear_forward)
    assert len(found) == 6
    assert error(found, expected) < allowed("lora_linear")
    assert relative_error(alone, expected["output"]) > PLANTED_FACTOR * allowed("lora_linear")


@pytest.mark.parametrize("settings", [{"lora_dropout": 0.4}, {"use_dora": True}])
def test_several_with_masks_or_lengths_of_their_own_are_left_to_peft(settings: dict):
    model = tuned("lora", **settings)
    several_active(model)
    assert lora_weights(layer_of(model).train()) is None


# ---- DoRA's norm -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
def test_the_column_norm_is_pefts(base: str):
    layer = layer_of(tuned("dora", base))
    weights = lora_weights(layer)
    expected = layer.lora_magnitude_vector["default"].get_weight_norm(
        layer.base_layer.weight, (weights.lora_b @ weights.lora_a).detach(), weights.scale
    )
    assert relative_error(column_norm(weights), expected) < allowed("column_norm")
    for wrong in (weights._replace(scale=0.0), weights._replace(scale=-weights.scale), weights._replace(lora_b=2 * weights.lora_b)):
        assert relative_error(column_norm(wrong), expected) > PLANTED_FACTOR * allowed("column_norm")


def test_the_column_norm_by_hand():
    """W = (3 4; 0 1), B A = (1 0; 0 2), s = 2: W + 2 B A = (5 4; 0 5), norms sqrt(41) = 6.4031242 and 5."""
    eye = torch.eye(2)
    weights = LinearWeights(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), None, torch.tensor([[1.0, 0.0], [0.0, 2.0]]), eye, 2.0)
    assert column_norm(weights).tolist() == pytest.approx([6.4031242, 5.0], abs=allowed("hand_worked"))


def test_the_column_norm_of_bf16_weights_is_an_fp32_number():
    weights = lora_weights(layer_of(tuned("dora", dtype=torch.bfloat16)))
    weights = weights._replace(lora_b=weights.lora_b / 4)
    exact = (weights.weight.double() + weights.scale * weights.lora_b.double() @ weights.lora_a.double()).norm(dim=1)
    assert column_norm(weights).dtype == torch.float32
    assert relative_error(column_norm(weights), exact) < allowed("column_norm_bf16")
    assert relative_error(weights.weight.double().norm(dim=1), exact) > PLANTED_FACTOR * allowed("column_norm_bf16")


# ---- what is formed, and what is kept --------------------------------------------------------------------------------


class Shapes(TorchDispatchMode):
    """Shapes of every tensor that an operation makes; views of what is there already are none."""

    def __init__(self) -> None:
        super().__init__()
        self.made: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and not func.is_view:
                self.made.add(tuple(sorted(tensor.shape)))
        return result


def shapes_made(layer: PeftLinear, forward: Callable) -> set[tuple[int, ...]]:
    x, grad = inputs()
    with Shapes() as shapes:
        forward(layer, x.requires_grad_(True)).backward(grad)
    return shapes.made


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_nothing_of_the_size_of_the_frozen_weight_is_ever_formed(method: str, base: str):
    """Neither its gradient nor W + s B A. PEFT's DoRA forms the second; a weight that is trained has the first."""
    layer = layer_of(tuned(method, base))
    assert (IN, OUT) not in shapes_made(layer, lora_linear_forward)
    assert layer.base_layer.weight.grad is None
    if method == "dora":
        assert (IN, OUT) in shapes_made(layer, PeftLinear.forward)
    layer.base_layer.weight.requires_grad_(True)
    assert (IN, OUT) in shapes_made(layer, lora_linear_forward)


def bytes_kept(layer: PeftLinear, forward: Callable, x: torch.Tensor) -> tuple[int, set[int]]:
    """(bytes that autograd keeps beside parameters, where they lie); a storage counts once."""
    kept = kept_storages(layer, forward, x)
    return sum(kept.values()), set(kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", BASES)
def test_x_alone_is_kept(base: str, dtype: torch.dtype):
    layer, x = layer_of(tuned("lora", base, dtype)), inputs(dtype)[0].requires_grad_(True)
    assert bytes_kept(layer, lora_linear_forward, x) == (x.nbytes, {x.data_ptr()})
    assert bytes_kept(layer, PeftLinear.forward, x)[0] > x.nbytes


def test_with_dropout_x_alone_is_kept():
    layer, x = layer_of(tuned("lora", lora_dropout=0.1)).train(), inputs()[0].requires_grad_(True)
    assert bytes_kept(layer, lora_linear_forward, x) == (x.nbytes, {x.data_ptr()})
    assert bytes_kept(layer, PeftLinear.forward, x)[0] > 2 * x.nbytes


def test_dora_keeps_x_and_what_its_magnitude_multiplies():
    layer, x = layer_of(tuned("dora")), inputs()[0].requires_grad_(True)
    num_bytes, places = bytes_kept(layer, lora_linear_forward, x)
    assert x.data_ptr() in places
    assert num_bytes <= x.nbytes + TOKENS * OUT * 4 + 2 * OUT * 4
    assert bytes_kept(layer, PeftLinear.forward, x)[0] > 2 * num_bytes
