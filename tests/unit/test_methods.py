"""The laws that every method obeys, over every family: see `giong.methods`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from moving_parts import ADAPTERS, BIASED, BOTTLENECKS, CASES, DIFFERENCES, OWN_LAWS, SOFT_PROMPTS, UNTIED, pairs
from parity.tolerances import PLANTED_FACTOR, allowed
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import ENCODERS, FAMILIES, save_encoder, save_model
from transformers import AutoModelForCausalLM

from giong.config import MethodConfig, ModelConfig
from giong.engine.optimizer import MasterOptimizer
from giong.engine.packing import pack
from giong.engine.step import backward, evaluate_rows, forward_logprobs
from giong.errors import ConfigError, ModelError
from giong.generation.local import LocalModel
from giong.methods import METHODS, Trainable
from giong.models.load import load_model
from giong.models.parts import task_head
from giong.models.row_model import label_settings, load_row_model, load_trained_row_model
from giong.models.rows import Row
from giong.models.trained import load_trained
from giong.objectives import classify, sft
from giong.sizing.shapes import num_trainable_parameters
from giong.workspace import read_json

IDS = torch.arange(3, 40)[None]

over_cases = pytest.mark.parametrize(("case", "family"), pairs())
over_differences = pytest.mark.parametrize(("case", "family"), pairs(*DIFFERENCES))
over_families = pytest.mark.parametrize("family", FAMILIES)


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def take_steps(trainable: Trainable, count: int = 2) -> None:
    """A few real training steps; two are needed for LoRA's A to move, because B starts at zero."""
    rows = [Row(np.arange(start, start + 20), np.r_[np.zeros(5), np.ones(15)].astype(np.float32)) for start in (5, 60)]
    optimizer = MasterOptimizer(trainable.parameters, optimizer="adamw", learning_rate=1e-2, weight_decay=0.0)
    trainable.model.train()
    for _ in range(count):
        backward(trainable.model, rows, sft.loss, 64)
        optimizer.step(1e-2, 1.0)
    optimizer.close()
    trainable.model.eval()


def applied(tiny_model: Callable, case: str, family: str, **options: object) -> Trainable:
    return METHODS[CASES[case].name].apply(tiny_model(family).model, CASES[case], seed=1, **options)


def test_every_method_has_a_case_and_says_how_it_is_saved(tiny_model: Callable):
    assert {config.name for config in CASES.values()} == set(METHODS) == set(get_args(MethodConfig.model_fields["name"].annotation))
    for case, family in [*pairs(), *pairs(*SOFT_PROMPTS)]:
        if family == "qwen2":
            trainable = applied(tiny_model, case, family)
            assert trainable.format == METHODS[CASES[case].name].FORMAT
            # What `engine.sharding.shard` asks of a model; a run is planned and estimated by the method's name.
            assert all(parameter.requires_grad for parameter in trainable.model.parameters()) == (CASES[case].name == "full")


def test_every_method_has_a_page_that_the_index_lists():
    folder = Path(__file__).parents[2] / "docs" / "methods"
    assert {path.stem for path in folder.glob("*.md")} == {"index", "claims", *METHODS}
    index = (folder / "index.md").read_text(encoding="utf-8")
    assert all(f"[`{name}`]({name}.md)" in index for name in METHODS)


@over_cases
def test_it_starts_as_the_base(tiny_model: Callable, case: str, family: str):
    found, base = logits_of(applied(tiny_model, case, family).model), logits_of(tiny_model(family).model)
    if case == "lora, pissa":
        # Its two updates cancel, each of them rounded.
        assert 0 < float((found - base).abs().max()) < allowed("merged_logits")
    else:
        assert torch.equal(found, base)


@over_differences
def test_a_start_that_is_off_in_one_tensor_is_seen(tiny_model: Callable, case: str, family: str):
    """Planted, one after the other in every tensor that moves."""
    trainable, base = applied(tiny_model, case, family), logits_of(tiny_model(family).model)
    for parameter in trainable.parameters.values():
        before = parameter.detach().clone()
        parameter.data.add_(0.1)
        assert not torch.equal(logits_of(trainable.model), base)
        parameter.data.copy_(before)
    assert torch.equal(logits_of(trainable.model), base)


def declared_and_moved(trainable: Trainable) -> tuple[set[str], set[str]]:
    """Names of what the method says it moves, and of what two steps move."""
    tensors = {id(parameter) for parameter in trainable.parameters.values()}
    before = {name: parameter.detach().clone() for name, parameter in trainable.model.named_parameters()}
    declared = {name for name, parameter in trainable.model.named_parameters() if id(parameter) in tensors}
    assert len(declared) == len(trainable.parameters)
    take_steps(trainable)
    return declared, {name for name, parameter in trainable.model.named_parameters() if not torch.equal(before[name], parameter)}


@pytest.mark.parametrize(("case", "family"), pairs(*(case for case in CASES if case not in ("sparse", *OWN_LAWS))))
def test_only_declared_parameters_move_and_all_of_them_do(tiny_model: Callable, case: str, family: str):
    declared, moved = declared_and_moved(applied(tiny_model, case, family))
    assert moved == declared


@over_differences
def test_a_frozen_parameter_that_is_declared_is_seen(tiny_model: Callable, case: str, family: str):
    """Planted: one tensor is declared and gets no gradient."""
    trainable = applied(tiny_model, case, family)
    name = next(iter(trainable.parameters))
    trainable.parameters[name].requires_grad_(False)
    declared, moved = declared_and_moved(trainable)
    assert declared - moved == {name}


EXPECTED = {
    "last_layers": lambda name: ".1." in name,
    "last_layers, first": lambda name: ".0." in name,
    "last_layers, norm": lambda name: ".1." in name or name in ("model.norm.weight", "transformer.ln_f.weight", "transformer.ln_f.bias"),
    "last_layers, head": lambda name: ".1." in name or name == "lm_head.weight",
    "bias": lambda name: name.endswith(".bias"),
    "norm": lambda name: "norm" in name or ".ln_" in name,
}


@over_differences
def test_what_moves_is_what_the_method_is_named_for(tiny_model: Callable, case: str, family: str):
    trainable = applied(tiny_model, case, family)
    assert set(trainable.parameters) == {name for name, _ in trainable.model.named_parameters() if EXPECTED[case](name)}


@pytest.mark.parametrize(
    ("case", "family"),
    [
        *pairs(),
        *pairs(*SOFT_PROMPTS),
        *((case, "neox") for case in ("lora", "sparse", *BOTTLENECKS, *DIFFERENCES) if case != "last_layers, head"),
    ],
)
def test_as_many_numbers_move_as_sizing_says(tiny_model: Callable, case: str, family: str):
    loaded = tiny_model(family)
    expected = num_trainable_parameters(loaded.shape, CASES[case])
    assert METHODS[CASES[case].name].apply(loaded.model, CASES[case]).num_trainable == expected
    # Planted: what any other method would move is another number.
    others = [other for other, _ in pairs() if CASES[other].name != CASES[case].name]
    assert expected not in [num_trainable_parameters(loaded.shape, CASES[other]) for other in others]


@pytest.mark.parametrize(("case", "family"), pairs(*ADAPTERS))
def test_a_saved_adapter_loads_in_plain_peft_and_here(tiny_model: Callable, tiny_folder: Callable, tmp_path: Path, case: str, family: str):
    """Over the base as it is on the disk, whatever the method did to the one that it trained."""
    trainable = applied(tiny_model, case, family, base_name="somewhere/base")
    take_steps(trainable)
    trainable.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert trainable.format == "adapter"
    base = AutoModelForCausalLM.from_pretrained(
        tiny_folder(family), attn_implementation=tiny_model(family).model.config._attn_implementation
    )
    reloaded = PeftModel.from_pretrained(base, tmp_path)
    expected, local = logits_of(trainable.model), LocalModel(tiny_model(family))
    local.add_adapter("mine", tmp_path)
    with local.using("mine"):
        assert torch.equal(logits_of(local.loaded.model), logits_of(reloaded))
    difference = float((logits_of(reloaded) - expected).abs().max())
    assert difference <= (allowed("merged_logits") if case == "lora, pissa" else 0.0)
    assert reloaded.peft_config["default"].base_model_name_or_path == "somewhere/base"
    moved = (expected - logits_of(tiny_model(family).model)).abs().max()
    assert moved > PLANTED_FACTOR * allowed("merged_logits")


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_an_adapter_made_by_peft_loads_here(tiny_model: Callable, tmp_path: Path, family: str):
    """With what giong itself never makes: rank-stabilised scale, other rank per layer, only two kinds of layer."""
    loaded = tiny_model(family)
    targets = ["c_attn", "c_fc"] if family == "gpt2" else ["q_proj", "up_proj"]
    config = LoraConfig(
        r=6, lora_alpha=3, use_rslora=True, rank_pattern={targets[0]: 3}, target_modules=targets, init_lora_weights=False,
        task_type="CAUSAL_LM", fan_in_fan_out=family == "gpt2",
    )  # fmt: skip
    tuned = get_peft_model(loaded.model, config)
    tuned.save_pretrained(tmp_path)
    expected = logits_of(tuned)
    local = LocalModel(tiny_model(family))
    local.add_adapter("theirs", tmp_path)
    with local.using("theirs"):
        assert torch.equal(logits_of(local.loaded.model), expected)
    with local.using(None):
        assert torch.equal(logits_of(local.loaded.model), logits_of(tiny_model(family).model))


@over_families
def test_full_weights_save_and_load_exactly(tiny_model: Callable, tiny_folder: Callable, tmp_path: Path, family: str):
    trainable = applied(tiny_model, "full", family)
    take_steps(trainable)
    trainable.save(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_folder(family) / name).read_bytes())
    reloaded = load_model(ModelConfig(name_or_path=str(tmp_path))).model
    expected = trainable.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in reloaded.state_dict().items())
    assert torch.equal(logits_of(reloaded), logits_of(trainable.model))
    assert trainable.format == "weights"


@over_differences
def test_the_tensors_that_moved_save_and_load_exactly(tiny_model: Callable, tiny_folder: Callable, tmp_path: Path, case: str, family: str):
    base = ModelConfig(name_or_path=str(tiny_folder(family)))
    trainable = applied(tiny_model, case, family, base_name="somewhere/base")
    take_steps(trainable)
    expected, folder = logits_of(trainable.model), tmp_path / trainable.format
    trainable.save(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["partial_config.json", "partial_model.safetensors"]
    assert read_json(folder / "partial_config.json") == {"method": CASES[case].name, "base_model_name_or_path": "somewhere/base"}
    saved = load_file(folder / "partial_model.safetensors")
    assert set(saved) == set(trainable.parameters)
    assert torch.equal(logits_of(load_trained(base, folder, dtype=torch.float32).model), expected)
    # Planted: any one tensor that is left out is missed.
    for name in (next(iter(saved)), list(saved)[-1]):
        save_file({other: tensor for other, tensor in saved.items() if other != name}, folder / "partial_model.safetensors")
        assert not torch.equal(logits_of(load_trained(base, folder, dtype=torch.float32).model), expected)


@pytest.mark.parametrize(("case", "family"), pairs(*(case for case in CASES if case not in (*BOTTLENECKS, *OWN_LAWS))))
def test_merged_equals_unmerged(tiny_model: Callable, case: str, family: str):
    trainable = applied(tiny_model, case, family)
    take_steps(trainable)
    unmerged, base = logits_of(trainable.model), logits_of(tiny_model(family).model)
    merged = trainable.merge()
    assert not [name for name, _ in merged.named_parameters() if "lora" in name]
    assert float((logits_of(merged) - unmerged).abs().max()) < allowed("merged_logits")
    # Planted: merging nothing would give the base.
    assert float((base - unmerged).abs().max()) > PLANTED_FACTOR * allowed("merged_logits")


@pytest.mark.parametrize(("case", "family"), pairs(*(case for case in CASES if case not in ("full", *OWN_LAWS))))
def test_detached_is_the_base_again(tiny_model: Callable, case: str, family: str):
    loaded = tiny_model(family)
    before = logits_of(loaded.model)
    names = set(loaded.model.state_dict())
    trainable = METHODS[CASES[case].name].apply(loaded.model, CASES[case])
    take_steps(trainable)
    # Planted: what is left in place shows.
    assert not torch.equal(logits_of(loaded.model), before)
    assert trainable.detach() is True
    assert torch.equal(logits_of(loaded.model), before)
    assert set(loaded.model.state_dict()) == names
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in loaded.model.parameters())
    assert all(torch.equal(tensor, loaded.model.state_dict()[name]) for name, tensor in tiny_model(family).model.state_dict().items())


def test_full_training_says_that_the_base_is_gone(tiny_model: Callable):
    assert applied(tiny_model, "full", "llama").detach() is False


@pytest.mark.parametrize(("case", "family"), [("lora", "llama"), ("lora", "gpt2"), ("lora, dora", "qwen2"), ("lora, bias", "gpt2")])
def test_a_bf16_base_keeps_its_dtype_and_saves_what_was_trained(tiny_model: Callable, tmp_path: Path, case: str, family: str):
    loaded = tiny_model(family, dtype="bfloat16")
    trainable = METHODS["lora"].apply(loaded.model, CASES[case], seed=1)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
    take_steps(trainable)
    trainable.save(tmp_path)
    expected = logits_of(trainable.model)
    assert all(tensor.dtype == torch.bfloat16 for tensor in load_file(tmp_path / "adapter_model.safetensors").values())
    local = LocalModel(tiny_model(family, dtype="bfloat16"))
    local.add_adapter("mine", tmp_path)
    with local.using("mine"):
        assert torch.equal(logits_of(local.loaded.model), expected)


@pytest.mark.parametrize(("case", "family"), pairs("sparse", *BOTTLENECKS, *DIFFERENCES))
def test_a_bf16_base_is_put_back_and_its_moved_tensors_are_saved(
    tiny_model: Callable, tiny_folder: Callable, tmp_path: Path, case: str, family: str
):
    loaded = tiny_model(family, dtype="bfloat16")
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    trainable = METHODS[CASES[case].name].apply(loaded.model, CASES[case])
    take_steps(trainable)
    expected, folder = logits_of(loaded.model), tmp_path / "partial"
    trainable.save(folder)
    base = ModelConfig(name_or_path=str(tiny_folder(family)))
    assert torch.equal(logits_of(load_trained(base, folder, dtype=torch.bfloat16).model), expected)
    trainable.detach()
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.model.state_dict().items())


def test_the_seed_decides_where_lora_starts(tiny_model: Callable):
    first, again, other = (METHODS["lora"].apply(tiny_model("llama").model, CASES["lora"], seed=seed).parameters for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("targets", [["nonsense"], ["q_proj", "nonsense"], ["lm_head"], ["embed_tokens"], ["proj"], []])
def test_wrong_target_modules_name_the_layers_that_there_are(tiny_model: Callable, targets: list[str]):
    model = tiny_model("llama").model
    before = set(dict(model.named_modules()))
    with pytest.raises(ConfigError, match="matches no layer") as caught:
        METHODS["lora"].apply(model, CASES["lora"].model_copy(update={"target_modules": targets}))
    assert caught.value.remedy == "Layers here: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj."
    assert set(dict(model.named_modules())) == before
    if targets:
        assert targets[-1] in caught.value.message


def test_wrong_target_modules_of_gpt2_name_its_own_layers(tiny_model: Callable):
    with pytest.raises(ConfigError) as caught:
        METHODS["lora"].apply(tiny_model("gpt2").model, CASES["lora"].model_copy(update={"target_modules": ["q_proj"]}))
    assert caught.value.remedy == "Layers here: c_attn, c_fc, c_proj."


def test_chosen_target_modules_are_the_only_ones(tiny_model: Callable):
    config = CASES["lora"].model_copy(update={"target_modules": ["self_attn.q_proj", "v_proj"]})
    trainable = METHODS["lora"].apply(tiny_model("llama").model, config)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in trainable.parameters} == {"q_proj", "v_proj"}


# ---- methods that move the model's own tensors ------------------------------------------------------------------------


def kept_by_layer(model: torch.nn.Module, layers: torch.nn.ModuleList) -> list[int]:
    """How many tensors, weights aside, autograd keeps while each decoder layer computes; the last number is of what follows them."""
    own = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
    counts, place, alive = [0] * (len(layers) + 1), len(layers), []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        counts[place] += tensor.untyped_storage()._cdata not in own
        return tensor

    def enter(index: int) -> Callable[..., None]:
        def hook(*given: object) -> None:
            nonlocal place
            place = index

        return hook

    hooks = [layer.register_forward_pre_hook(enter(index)) for index, layer in enumerate(layers)]
    hooks.append(layers[-1].register_forward_hook(enter(len(layers))))
    rows = [Row(np.arange(20), np.r_[np.zeros(5), np.ones(15)].astype(np.float32))]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward_logprobs(model.train(), pack(rows))
    for hook in hooks:
        hook.remove()
    return counts


@over_families
def test_layers_below_those_that_move_keep_nothing(tiny_model: Callable, family: str):
    depth = {"n_layer": 4} if family == "gpt2" else {"num_hidden_layers": 4}
    for config, silent in (
        (MethodConfig(name="last_layers", num_layers=2), [0, 1]),
        (MethodConfig(name="last_layers", num_layers=1), [0, 1, 2]),
        # Planted: these have to pass a gradient down.
        (MethodConfig(name="last_layers", num_layers=1, layers_from="first"), []),
        (MethodConfig(name="norm"), []),
    ):
        model = METHODS[config.name].apply(tiny_model(family, **depth).model, config).model
        layers = model.transformer.h if family == "gpt2" else model.model.layers
        counts = kept_by_layer(model, layers)
        assert [index for index, count in enumerate(counts) if not count] == silent


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in BIASED])
def test_a_model_without_biases_is_refused(tiny_model: Callable, family: str):
    model = tiny_model(family).model
    with pytest.raises(ConfigError, match=f"This model \\({family}\\) has no biases") as caught:
        METHODS["bias"].apply(model, CASES["bias"])
    assert (caught.value.place, caught.value.remedy) == ("method.name", "Set method.name to norm, which is as small, or to lora.")
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_more_layers_than_there_are_and_a_tied_head_are_refused(tiny_model: Callable):
    for family in FAMILIES:
        model = tiny_model(family).model
        METHODS["last_layers"].apply(model, MethodConfig(name="last_layers", num_layers=2)).detach()
        with pytest.raises(ConfigError, match="3 layers cannot be trained: the model has 2") as caught:
            METHODS["last_layers"].apply(model, MethodConfig(name="last_layers", num_layers=3))
        assert caught.value.place == "method.num_layers"
        if family not in UNTIED:
            with pytest.raises(ConfigError, match="is its embedding matrix") as caught:
                METHODS["last_layers"].apply(model, CASES["last_layers, head"])
            assert caught.value.place == "method.train_head"


def test_tensors_of_another_base_are_refused(tiny_model: Callable, tiny_folder: Callable, tmp_path: Path):
    folder = tmp_path / "partial"
    applied(tiny_model, "norm", "llama").save(folder)
    for changes, message in (
        ({"hidden_size": 32, "head_dim": 16}, r"has shape \(64,\), and the base has shape \(32,\)"),
        ({"num_hidden_layers": 1}, "no such tensor"),
    ):
        other = ModelConfig(name_or_path=str(tiny_folder("llama", **changes)))
        with pytest.raises(ModelError, match=message) as caught:
            load_trained(other, folder, dtype=torch.float32)
        assert caught.value.place == str(folder)
    base, path = ModelConfig(name_or_path=str(tiny_folder("llama"))), folder / "partial_model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ModelError, match="cannot be read"):
        load_trained(base, folder, dtype=torch.float32)
    path.unlink()
    with pytest.raises(ModelError, match="has no partial_model.safetensors"):
        load_trained(base, folder, dtype=torch.float32)


# ---- adapters by name ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapters(tiny_model: Callable, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters for the Llama twin, and three that do not fit it."""
    tmp_path = tmp_path_factory.mktemp("adapters")
    made = {"one": tmp_path / "one", "two": tmp_path / "two"}
    for number, folder in enumerate(made.values(), start=1):
        trainable = applied(tiny_model, "lora", "llama")
        take_steps(trainable, 1 + number)
        trainable.save(folder)
    for name, model in {
        "deeper": tiny_model("llama", num_hidden_layers=3).model,
        "narrower": tiny_model("llama", hidden_size=32, head_dim=16).model,
        "other family": tiny_model("gpt2").model,
    }.items():
        made[name] = tmp_path / name
        METHODS["lora"].apply(model, CASES["lora"]).save(made[name])
    return made


def test_adapters_by_name_differ_and_the_base_is_restored(tiny_model: Callable, adapters: dict[str, Path]):
    local = LocalModel(tiny_model("llama"))
    base = logits_of(local.loaded.model)
    local.add_adapter("one", adapters["one"])
    # Names that PEFT itself would refuse or take for something else.
    local.add_adapter("my.voice v2", adapters["two"])
    local.add_adapter("weight", adapters["one"])
    assert local.adapters == ["my.voice v2", "one", "weight"]
    with local.using("one"):
        one = logits_of(local.loaded.model)
    with local.using("my.voice v2"):
        two = logits_of(local.loaded.model)
    with local.using("weight"):
        assert torch.equal(logits_of(local.loaded.model), one)
    with local.using(None):
        assert torch.equal(logits_of(local.loaded.model), base)
    assert not torch.equal(one, two)
    assert not torch.equal(one, base)
    local.remove_adapter("one")
    assert local.adapters == ["my.voice v2", "weight"]
    with local.using("my.voice v2"):
        assert torch.equal(logits_of(local.loaded.model), two)
    local.add_adapter("weight", adapters["two"])
    with local.using("weight"):
        assert torch.equal(logits_of(local.loaded.model), two)
    local.remove_adapter("weight")
    local.remove_adapter("my.voice v2")
    assert local.adapters == []
    assert torch.equal(logits_of(local.loaded.model), base)
    for call in (local.using("one").__enter__, lambda: local.remove_adapter("one")):
        with pytest.raises(ModelError, match="No adapter named 'one'"):
            call()


@pytest.mark.parametrize("kind", ["deeper", "narrower", "other family"])
@pytest.mark.parametrize("order", ["first", "second"])
def test_an_adapter_that_does_not_fit_is_refused_and_leaves_no_trace(
    tiny_model: Callable, adapters: dict[str, Path], kind: str, order: str
):
    local = LocalModel(tiny_model("llama"))
    base = logits_of(local.loaded.model)
    if order == "second":
        local.add_adapter("one", adapters["one"])
    with pytest.raises(ModelError, match="does not fit this base") as caught:
        local.add_adapter("bad", adapters[kind])
    assert caught.value.place == str(adapters[kind])
    assert "bad" not in local.adapters
    with local.using(None):
        assert torch.equal(logits_of(local.loaded.model), base)
    if order == "first":
        local.add_adapter("one", adapters["one"])
    with local.using("one"):
        one = logits_of(local.loaded.model)
    alone = LocalModel(tiny_model("llama"))
    alone.add_adapter("one", adapters["one"])
    with alone.using("one"):
        assert torch.equal(logits_of(alone.loaded.model), one)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_incomplete_or_broken_adapter_is_refused(tiny_model: Callable, adapters: dict[str, Path], tmp_path: Path, file: str):
    local = LocalModel(tiny_model("llama"))
    folder = tmp_path / "copy"
    shutil.copytree(adapters["one"], folder)
    path = folder / file
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError):
        local.add_adapter("torn", folder)
    path.unlink()
    with pytest.raises(ModelError, match=file):
        local.add_adapter("missing", folder)
    assert local.adapters == []


def test_clearing_takes_every_adapter_out(tiny_model: Callable, adapters: dict[str, Path]):
    local = LocalModel(tiny_model("llama"))
    modules = set(dict(local.loaded.model.named_modules()))
    local.clear_adapters()
    local.add_adapter("one", adapters["one"])
    local.add_adapter("two", adapters["two"])
    local.clear_adapters()
    assert local.adapters == []
    assert set(dict(local.loaded.model.named_modules())) == modules


# ---- classifiers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "family"), [("sparse", "bert"), ("bottleneck", "bert"), ("bottleneck", "modernbert"), ("sparse", "llama")]
)
def test_the_head_of_a_classifier_moves_along(case: str, family: str, tmp_path: Path):
    save = save_encoder if family in ENCODERS else save_model
    base, settings = ModelConfig(name_or_path=str(save(family, tmp_path / "base"))), label_settings(["a", "b"], "single_label")
    rows = [
        Row(np.arange(3, length), np.zeros(length - 3, dtype=np.float32), target=np.array([index], dtype=np.float32))
        for index, length in enumerate((23, 33))
    ]

    def outputs(model: torch.nn.Module) -> torch.Tensor:
        return torch.stack(evaluate_rows(model, rows, 64))

    model = load_row_model(base, settings, dtype=torch.float32).model
    before = outputs(model)
    trainable = METHODS[CASES[case].name].apply(model, CASES[case])
    assert torch.equal(outputs(model), before)
    heads = {f"{name}.{part}" for name, head in task_head(model).items() for part, _ in head.named_parameters()}
    assert heads and heads <= set(trainable.parameters)
    optimizer = MasterOptimizer(trainable.parameters, optimizer="adamw", learning_rate=1e-2, weight_decay=0.0)
    for _ in range(2):
        backward(model, rows, classify.loss, 64)
        optimizer.step(1e-2, 1.0)
    optimizer.close()
    trained = outputs(model)
    trainable.save(tmp_path / "partial")
    load = lambda: load_trained_row_model(base, settings, tmp_path / "partial", "partial", dtype=torch.float32).model  # noqa: E731
    assert torch.equal(outputs(load()), trained) and not torch.equal(trained, before)
    assert trainable.detach() and torch.equal(outputs(model), before)
    # Planted: a file without the head.
    saved = load_file(tmp_path / "partial" / "partial_model.safetensors")
    save_file({name: tensor for name, tensor in saved.items() if name not in heads}, tmp_path / "partial" / "partial_model.safetensors")
    assert not torch.equal(outputs(load()), trained)
