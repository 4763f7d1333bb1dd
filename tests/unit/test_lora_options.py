"""What LoRA can be told: where its update starts, at what scale and rank, and how fast each side of it learns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from parity.tolerances import PLANTED_FACTOR, allowed, relative_error
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from pydantic import ValidationError

import giong.engine.lora_linear as lora_linear
from giong.config import MethodConfig, TrainConfig
from giong.engine.loop import train
from giong.engine.loop_config import LoopConfig
from giong.engine.packing import pack
from giong.engine.step import backward, forward_logprobs
from giong.errors import ConfigError, ModelError
from giong.generation.local import LocalModel
from giong.methods import METHODS
from giong.methods.lora import main_part
from giong.models.rows import Row
from giong.objectives import sft
from giong.sizing.defaults import resolve_training
from giong.sizing.moving import check_method

LORA = MethodConfig(name="lora", lora_r=4, lora_alpha=8.0, lora_dropout=0.0)
PISSA = LORA.model_copy(update={"lora_alpha": 4.0, "init_lora_weights": "pissa"})


def rows() -> list[Row]:
    weights = np.r_[np.zeros(5), np.ones(15)].astype(np.float32)
    return [Row(np.arange(start, start + 20), weights) for start in (5, 60)]


def layers_of(model: torch.nn.Module) -> dict[str, PeftLinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, PeftLinear)}


# ---- PiSSA -----------------------------------------------------------------------------------------------------------


def test_the_main_part_by_hand():
    """W = diag(4, 1): the main direction is the first, B A = 4 e1 e1^T / s, and both sides have the root of 4 / s."""
    lora_a, lora_b = main_part(torch.diag(torch.tensor([4.0, 1.0])), 1, 2.0)
    assert torch.allclose(lora_b @ lora_a, torch.diag(torch.tensor([2.0, 0.0])), atol=allowed("hand_worked"))
    assert float(lora_a.norm()) == pytest.approx(2**0.5) == pytest.approx(float(lora_b.norm()))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_pissa_is_pefts(tiny_model: Callable, family: str):
    """PEFT takes the main part out of the weights: its update, its gradients and what is left are those here."""
    ours, theirs = tiny_model(family).model, tiny_model(family).model
    METHODS["lora"].apply(ours, PISSA.model_copy(update={"lora_r": 32, "lora_alpha": 16.0}), seed=1)
    settings = LoraConfig(r=32, lora_alpha=16.0, target_modules="all-linear", init_lora_weights="pissa", task_type="CAUSAL_LM")
    theirs = get_peft_model(theirs, settings).get_base_model()
    for model in (ours, theirs):
        backward(model.train(), rows(), sft.loss, 64)
    found, wanted = layers_of(ours), layers_of(theirs)
    assert found.keys() == wanted.keys()
    for name, layer in found.items():
        peer = wanted[name]
        assert relative_error(layer.get_delta_weight("default"), peer.get_delta_weight("default")) < allowed("main_part")
        left = layer.base_layer.weight + layer.get_delta_weight("start")
        assert float((left - peer.base_layer.weight).detach().abs().max()) < allowed("main_part")
        # Planted: the base itself is another matrix.
        assert float((layer.base_layer.weight - peer.base_layer.weight).abs().max()) > PLANTED_FACTOR * allowed("main_part")
        for side, peer_side in ((layer.lora_A, peer.lora_A), (layer.lora_B, peer.lora_B)):
            # A singular vector may be turned round.
            gradient, peer_gradient = (part["default"].weight.grad.abs() for part in (side, peer_side))
            assert relative_error(gradient, peer_gradient) < allowed("main_part_gradients")
            assert relative_error(gradient.flip(0, 1), peer_gradient) > PLANTED_FACTOR * allowed("main_part_gradients")
        assert layer.lora_A["start"].weight.grad is None


def test_pissa_runs_on_the_engines_layer(tiny_model: Callable, monkeypatch: pytest.MonkeyPatch):
    model = METHODS["lora"].apply(tiny_model("llama").model, PISSA).model.eval()
    with torch.no_grad():
        for layer in layers_of(model).values():
            layer.lora_B["default"].weight.mul_(1.5)
        expected = model(input_ids=torch.from_numpy(rows()[0].input_ids)[None]).logits.log_softmax(-1)[0]
    monkeypatch.setattr(PeftLinear, "forward", None)
    found = forward_logprobs(model, pack(rows()[:1]))["logprobs_N"]
    wanted = expected[torch.arange(4, 19), torch.from_numpy(rows()[0].input_ids[5:])]
    assert float((found - wanted).detach().abs().max()) < allowed("packed_logprobs")


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_an_adapter_over_changed_weights_is_refused(tiny_model: Callable, tmp_path: Path, kind: str):
    """PEFT would change the base for it, and every other adapter with it."""
    settings = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=kind, task_type="CAUSAL_LM")
    get_peft_model(tiny_model("llama").model, settings).save_pretrained(tmp_path)
    local = LocalModel(tiny_model("llama"))
    before = {name: tensor.clone() for name, tensor in local.loaded.model.state_dict().items()}
    with pytest.raises(ModelError, match=f"trained over changed weights of the base \\(init_lora_weights {kind}\\)"):
        local.add_adapter("theirs", tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in local.loaded.model.state_dict().items())


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_an_adapter_with_biases_of_its_own_is_refused(tiny_model: Callable, tmp_path: Path, bias: str):
    """PEFT would put them into the base and leave them there when another adapter is chosen."""
    tuned = get_peft_model(tiny_model("qwen2").model, LoraConfig(r=2, target_modules=["q_proj"], bias=bias, task_type="CAUSAL_LM"))
    tuned.base_model.model.model.layers[0].self_attn.q_proj.base_layer.bias.data.add_(1.0)
    tuned.save_pretrained(tmp_path)
    local = LocalModel(tiny_model("qwen2"))
    before = {name: tensor.clone() for name, tensor in local.loaded.model.state_dict().items()}
    with pytest.raises(ModelError, match=f"brings biases of its own for the base's matrices \\(bias {bias}\\)"):
        local.add_adapter("theirs", tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in local.loaded.model.state_dict().items())


# ---- scale, rank, length ---------------------------------------------------------------------------------------------


def test_ranks_and_scales_are_those_of_the_patterns(tiny_model: Callable):
    """Scale alpha / sqrt(r) with rsLoRA: 8 / 2 by default, 8 / 3 at rank 9, 6 / 2 at alpha 6."""
    config = LORA.model_copy(update={"use_rslora": True, "rank_pattern": {"down_proj": 9}, "alpha_pattern": {"1.self_attn.q_proj": 6.0}})
    layers = layers_of(METHODS["lora"].apply(tiny_model("llama").model, config).model)
    found = {name.partition("layers.")[2]: (layer.r["default"], layer.scaling["default"]) for name, layer in layers.items()}
    expected = {name: (9, 8 / 3) if "down" in name else (4, 3.0) if name == "1.self_attn.q_proj" else (4, 4.0) for name in found}
    assert found == expected
    assert len(found) == 14


def test_scale_and_dropout_that_are_chosen(tiny_model: Callable):
    """Twice the rank; with rsLoRA twice its root; with PiSSA a scale of one and no dropout, as with DoRA no dropout."""
    shape = tiny_model("llama").shape
    found = []
    for settings in ({}, {"use_rslora": True}, {"init_lora_weights": "pissa"}, {"use_dora": True}):
        method = resolve_training(MethodConfig(name="lora", **settings), TrainConfig(), shape, 200).method
        found.append((method.lora_r, method.lora_alpha, method.lora_dropout))
    assert found == [(16, 32.0, 0.05), (16, 8.0, 0.05), (16, 16.0, 0.0), (16, 32.0, 0.0)]


def test_dora_in_bf16_starts_as_the_base_on_the_engines_layer(tiny_model: Callable, monkeypatch: pytest.MonkeyPatch):
    def logprobs(loaded) -> torch.Tensor:  # type: ignore[no-untyped-def]
        with torch.no_grad():
            return forward_logprobs(loaded.model.eval(), pack(rows()))["logprobs_N"]

    base, tuned = (tiny_model("llama", dtype="bfloat16") for _ in range(2))
    METHODS["lora"].apply(tuned.model, LORA.model_copy(update={"use_dora": True}))
    assert torch.equal(logprobs(tuned), logprobs(base))
    # Planted: a norm that is off by one step of bf16.
    norm = lora_linear.column_norm
    monkeypatch.setattr(lora_linear, "column_norm", lambda weights: norm(weights) * (1 + 2**-7))
    assert not torch.equal(logprobs(tuned), logprobs(base))


# ---- LoRA+ -----------------------------------------------------------------------------------------------------------


def test_loraplus_moves_b_faster_and_nothing_else(tiny_model: Callable, tmp_path: Path):
    """AdamW's first step is the learning rate, whatever the gradient. DoRA's lengths move from the start as well."""
    config = LoopConfig(
        learning_rate=1e-3, num_epochs=1, batch_rows=2, max_tokens_per_pack=64, warmup_share=0.0, schedule="constant", optimizer="adamw",
        weight_decay=0.0, max_grad_norm=1e9, seed=0, save_seconds=1e9, save_steps=None, keep_checkpoints=1,
    )  # fmt: skip
    moved = {}
    for ratio in (1.0, 4.0):
        trainable = METHODS["lora"].apply(tiny_model("llama").model, LORA.model_copy(update={"use_dora": True, "loraplus_lr_ratio": ratio}))
        before = {name: parameter.detach().clone() for name, parameter in trainable.parameters.items()}
        train(
            trainable.model, trainable.parameters, rows(), sft.loss, config, checkpoints=tmp_path / str(ratio), emit=lambda event: None,
            learning_rate_factors=trainable.learning_rate_factors,
        )  # fmt: skip
        moved[ratio] = {name: float((tensor - before[name]).detach().abs().max()) for name, tensor in trainable.parameters.items()}
    for name, plain in moved[1.0].items():
        assert moved[4.0][name] == pytest.approx((4 if ".lora_B." in name else 1) * plain, rel=1e-3)
    assert {round(value, 5) for name, value in moved[4.0].items() if ".lora_B." in name} == {4e-3}


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message", "place", "remedy"),
    [
        ({"lora_r": 33}, "Rank 33 is above the size of .*k_proj \\(32 x 64\\)", "method.lora_r", "Give at most 32"),
        ({"rank_pattern": {"up_proj": 65}}, "Rank 65 is above the size of .*up_proj \\(96 x 64\\)", "method.rank_pattern", "Give at most 64"),
        ({"rank_pattern": {"c_proj": 2}}, "'c_proj' matches no layer", "method.rank_pattern", "Layers here: down_proj, gate_proj"),
        ({"alpha_pattern": {"(": 2.0}}, "'\\(' is no regular expression", "method.alpha_pattern", "the end of a layer's name"),
        ({"target_modules": ["q_proj"], "rank_pattern": {"v_proj": 2}}, "matches no layer with", "method.rank_pattern", "here: q_proj."),
    ],
)  # fmt: skip
def test_ranks_that_cannot_be_are_refused_before_and_after_loading(
    tiny_model: Callable, settings: dict, message: str, place: str, remedy: str
):
    loaded, config = tiny_model("llama"), LORA.model_copy(update=settings)
    modules = set(dict(loaded.model.named_modules()))
    for check in (lambda: check_method(loaded.shape, config), lambda: METHODS["lora"].apply(loaded.model, config)):
        with pytest.raises(ConfigError, match=message) as caught:
            check()
        assert caught.value.place == place
        assert remedy in caught.value.remedy
    assert set(dict(loaded.model.named_modules())) == modules


@pytest.mark.parametrize("other", [{"use_dora": True}, {"lora_dropout": 0.1}])
def test_pissa_stands_alone(other: dict):
    with pytest.raises(ValidationError, match=f"init_lora_weights pissa does not go with {next(iter(other))}"):
        MethodConfig(init_lora_weights="pissa", **other)
