"""What LoRA can be told: where its update starts, at what scale and rank, and how fast each side of it learns."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from parity.tolerances import PLANTED_FACTOR, allowed, relative_error
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from tiny_models import save_encoder

import giong.engine.lora_linear as lora_linear
from giong.config import MethodConfig, ModelConfig, TrainConfig, parse
from giong.engine.loop import train
from giong.engine.loop_config import LoopConfig
from giong.engine.optimizer import MasterOptimizer
from giong.engine.packing import pack
from giong.engine.step import backward, forward_logprobs
from giong.errors import ConfigError, ModelError
from giong.generation.local import LocalModel
from giong.methods import METHODS
from giong.methods.lora import main_part
from giong.models.row_model import label_settings, load_row_model, load_trained_row_model
from giong.models.rows import Row
from giong.objectives import classify, sft
from giong.sizing.defaults import resolve_training
from giong.sizing.moving import check_method
from giong.sizing.shapes import num_trainable_parameters
from giong.workflow.starting import started
from giong.workspace import Project

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


# ---- biases beside it ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "targets"), [("qwen2", ["q_proj", "up_proj"]), ("gpt2", ["c_attn", "c_fc"])])
def test_the_biases_that_move_are_pefts(tiny_model: Callable, family: str, targets: list[str]):
    loaded, counts = tiny_model(family), set()
    for bias in ("none", "all", "lora_only"):
        config = LORA.model_copy(update={"bias": bias, "target_modules": targets})
        trainable = METHODS["lora"].apply(loaded.model, config)
        assert trainable.num_trainable == num_trainable_parameters(loaded.shape, config)
        found = set(trainable.parameters)
        trainable.detach()
        settings = LoraConfig(r=4, target_modules=targets, bias=bias, task_type="CAUSAL_LM", fan_in_fan_out=family == "gpt2")
        peer = get_peft_model(tiny_model(family).model, settings)
        assert found == {name for name, parameter in peer.named_parameters() if parameter.requires_grad}
        counts.add(trainable.num_trainable)
    # Planted: any other of the three is another number.
    assert len(counts) == 3


@pytest.fixture
def with_biases(tiny_model: Callable, tmp_path: Path) -> dict[str, Path]:
    """Adapters that PEFT saved for the Qwen twin; each of their biases lies off the base's by its own amount."""
    folders = {}
    for number, bias in enumerate(("all", "lora_only", "none"), start=1):
        settings = LoraConfig(r=2, target_modules=["q_proj"], bias=bias, init_lora_weights=False, task_type="CAUSAL_LM")
        tuned = get_peft_model(tiny_model("qwen2").model, settings)
        with torch.no_grad():
            for name, parameter in tuned.named_parameters():
                if name.endswith(".bias") and parameter.requires_grad:
                    parameter.add_(0.1 * number)
        folders[bias] = tmp_path / bias
        tuned.save_pretrained(folders[bias])
    return folders


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=torch.arange(3, 30)[None]).logits


def test_biases_are_there_for_their_own_adapter_alone(tiny_model: Callable, with_biases: dict[str, Path]):
    local, base = LocalModel(tiny_model("qwen2")), logits(tiny_model("qwen2").model)
    for name, folder in with_biases.items():
        local.add_adapter(name, folder)
    for name in (None, *with_biases, None, *reversed(with_biases)):
        with local.using(name):
            found = logits(local.loaded.model)
        if name is None:
            assert torch.equal(found, base)
            continue
        alone = PeftModel.from_pretrained(tiny_model("qwen2").model, with_biases[name])
        assert torch.equal(found, logits(alone))
        # Planted: PEFT's own way leaves the biases in the base that it switches to.
        with (
            pytest.warns(UserWarning, match="disabling adapter layers with bias") if name != "none" else contextlib.nullcontext(),
            alone.disable_adapter(),
        ):
            assert torch.equal(logits(alone), base) == (name == "none")
    local.clear_adapters()
    assert all(
        torch.equal(tensor, local.loaded.model.state_dict()[name]) for name, tensor in tiny_model("qwen2").model.state_dict().items()
    )


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_are_missing_or_of_another_size_are_refused(tiny_model: Callable, with_biases: dict[str, Path], bias: str):
    local, path = LocalModel(tiny_model("qwen2")), with_biases[bias] / "adapter_model.safetensors"
    tensors, own = load_file(path), "base_model.model.model.layers.1.self_attn.q_proj.base_layer.bias"
    for changed in (
        {name: tensor for name, tensor in tensors.items() if name != own},
        tensors | {own: tensors[own][:-1].clone()},
        tensors | {"base_model.model.model.layers.1.mlp.up_proj.bias": tensors[own].clone()},
    ):
        save_file(changed, path)
        with pytest.raises(ModelError, match=r"1 of its biases do not match, model.layers.1.(self_attn.q|mlp.up)_proj.bias among them"):
            local.add_adapter("theirs", with_biases[bias])
        assert local.adapters == []
        assert torch.equal(logits(local.loaded.model), logits(tiny_model("qwen2").model))


def test_a_run_goes_on_from_biases_too_and_puts_the_base_back(tiny_model: Callable, tmp_path: Path, with_biases: dict[str, Path]):
    method = started(Project(tmp_path), LORA.model_copy(update={"start_from": str(with_biases["all"]), "lora_r": None, "lora_alpha": None}))
    assert (method.bias, method.record()["bias"]) == ("all", "all")
    model = tiny_model("qwen2").model
    base, trainable = logits(model), METHODS["lora"].apply(model, method)
    alone = PeftModel.from_pretrained(tiny_model("qwen2").model, with_biases["all"])
    assert torch.equal(logits(model), logits(alone)) and not torch.equal(logits(model), base)
    assert trainable.detach() and torch.equal(logits(model), base)


def test_pissa_keeps_the_biases_apart_from_its_two_updates(tiny_model: Callable, tmp_path: Path):
    trainable = METHODS["lora"].apply(tiny_model("qwen2").model, PISSA.model_copy(update={"bias": "all"}))
    with torch.no_grad():
        for parameter in trainable.parameters.values():
            parameter.mul_(1.1)
    trainable.save(tmp_path)
    local = LocalModel(tiny_model("qwen2"))
    local.add_adapter("mine", tmp_path)
    with local.using("mine"):
        found = logits(local.loaded.model)
    assert float((found - logits(trainable.model)).abs().max()) < allowed("merged_logits")
    assert float((found - logits(tiny_model("qwen2").model)).abs().max()) > PLANTED_FACTOR * allowed("merged_logits")


def test_a_classifier_moves_its_head_and_its_biases(tmp_path: Path):
    base, settings = ModelConfig(name_or_path=str(save_encoder("bert", tmp_path / "base"))), label_settings(["a", "b"], "single_label")
    model = load_row_model(base, settings, dtype=torch.float32).model
    before = logits(model)
    trainable = METHODS["lora"].apply(model, LORA.model_copy(update={"bias": "all"}))
    optimizer = MasterOptimizer(trainable.parameters, optimizer="adamw", learning_rate=1e-2, weight_decay=0.0)
    examples = [replace(row, weights=row.weights * 0, target=np.array([index], dtype=np.float32)) for index, row in enumerate(rows())]
    start = {name: parameter.detach().clone() for name, parameter in trainable.parameters.items()}
    for _ in range(2):
        backward(model, examples, classify.loss, 64)
        optimizer.step(1e-2, 1.0)
    optimizer.close()
    assert not [name for name, parameter in trainable.parameters.items() if torch.equal(parameter, start[name])]
    trained = logits(model)
    trainable.save(tmp_path / "adapter")
    again = load_trained_row_model(base, settings, tmp_path / "adapter", "adapter", dtype=torch.float32).model
    assert float((logits(again) - trained).abs().max()) < allowed("merged_logits")
    assert float((trained - before).abs().max()) > PLANTED_FACTOR * allowed("merged_logits")
    assert trainable.detach() and torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("family", "settings", "message", "remedy"),
    [
        ("llama", {"bias": "all"}, "This model (llama) has no biases, and method.bias is all", "Leave it out."),
        (
            "qwen2",
            {"bias": "lora_only", "target_modules": ["o_proj"]},
            "No layer with an update has a bias in this model (qwen2), and method.bias is lora_only",
            "Set it to all, or leave it out.",
        ),
    ],
)
def test_biases_that_are_not_there_are_refused(tiny_model: Callable, family: str, settings: dict, message: str, remedy: str):
    loaded, config = tiny_model(family), LORA.model_copy(update=settings)
    for check in (lambda: check_method(loaded.shape, config), lambda: METHODS["lora"].apply(loaded.model, config)):
        with pytest.raises(ConfigError) as caught:
            check()
        assert (caught.value.message, caught.value.place, caught.value.remedy) == (message, "method.bias", remedy)


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


# ---- rates of their own ----------------------------------------------------------------------------------------------


def first_step(loaded, folder: Path, method: MethodConfig) -> dict[str, float]:  # type: ignore[no-untyped-def]
    """How far each parameter moves: AdamW's first step is the learning rate, whatever the gradient."""
    config = LoopConfig(
        learning_rate=1e-3, num_epochs=1, batch_rows=2, max_tokens_per_pack=64, warmup_share=0.0, schedule="constant", optimizer="adamw",
        weight_decay=0.0, max_grad_norm=1e9, seed=0, save_seconds=1e9, save_steps=None, keep_checkpoints=1,
    )  # fmt: skip
    trainable = METHODS["lora"].apply(loaded.model, method)
    before = {name: parameter.detach().clone() for name, parameter in trainable.parameters.items()}
    train(
        trainable.model, trainable.parameters, rows(), sft.loss, config, checkpoints=folder, emit=lambda event: None,
        learning_rate_factors=trainable.learning_rate_factors,
    )  # fmt: skip
    return {name: float((tensor - before[name]).detach().abs().max()) for name, tensor in trainable.parameters.items()}


@pytest.mark.parametrize(
    ("family", "settings", "ratio", "faster"),
    [("llama", {"use_dora": True}, "loraplus_lr_ratio", ".lora_B."), ("qwen2", {"bias": "all"}, "bias_lr_ratio", ".bias")],
)
def test_a_ratio_moves_its_own_group_faster_and_nothing_else(
    tiny_model: Callable, tmp_path: Path, family: str, settings: dict, ratio: str, faster: str
):
    """DoRA's lengths move from the start as well; the bias of the keys changes no softmax, and hardly moves."""
    plain, quick = (
        first_step(tiny_model(family), tmp_path / str(times), LORA.model_copy(update={**settings, ratio: times})) for times in (1.0, 4.0)
    )
    for name, distance in plain.items():
        assert quick[name] == pytest.approx((4 if faster in name else 1) * distance, rel=1e-3, abs=1e-6)
    assert {round(value, 5) for name, value in quick.items() if faster in name and "k_proj" not in name} == {4e-3}


def test_a_rate_of_biases_that_do_not_move_is_refused_and_one_that_is_left_out_is_no_setting():
    with pytest.raises(ConfigError, match="set bias to all or lora_only"):
        parse({"method": {"bias_lr_ratio": 10}})
    assert "bias_lr_ratio" not in MethodConfig(bias="all").record()
    assert MethodConfig(bias="all", bias_lr_ratio=10).record()["bias_lr_ratio"] == 10


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
