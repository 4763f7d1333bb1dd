"""Adapters of one base added into one, and training that goes on from an adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from parity.tolerances import PLANTED_FACTOR, allowed
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from giong.config import AdaptersConfig, MethodConfig, ModelConfig, load, with_settings
from giong.errors import ConfigError, ModelError
from giong.export.adapters import add_adapters
from giong.methods import METHODS
from giong.workflow import perform
from giong.workflow.starting import started
from giong.workflow.story import Story
from giong.workspace import Project, read_json

IDS = torch.arange(3, 40)[None]
SETTINGS = {
    "a": {"r": 3, "lora_alpha": 6},
    "b": {"r": 5, "lora_alpha": 4, "use_rslora": True, "rank_pattern": {"q_proj": 2}, "target_modules": ["q_proj", "up_proj"]},
}


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


@pytest.fixture(scope="module")
def project(tiny_folder: Callable, tiny_model: Callable, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Two models over the Llama twin: other ranks, other scales, other layers; the second has more adapted layers' kinds less."""
    root = tmp_path_factory.mktemp("project")
    base = str(tiny_folder("llama"))
    (root / "giong.yaml").write_text(yaml.safe_dump({"model": base}))
    for number, (name, settings) in enumerate(SETTINGS.items()):
        torch.manual_seed(number)
        every = {"target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
        get_peft_model(tiny_model("llama").model, LoraConfig(**{**every, **settings})).save_pretrained(root / "models" / name / "adapter")
        record = {
            "name": name, "base": base, "format": "adapter", "dtype": "float32", "sampling": {"temperature": 0.5}, "run": f"run-{name}",
            "created": 1, "consent": {"author": name.upper(), "granted": name == "a", "until": "2030-01-01" if name == "b" else ""},
        }  # fmt: skip
        (root / "models" / name / "model.json").write_text(json.dumps(record))
    return Project(root)


def loaded(project: Project, name: str, tiny_folder: Callable) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(tiny_folder("llama"))
    return PeftModel.from_pretrained(base, project.model_path(name) / "adapter")


def by_hand(project: Project, weights: dict[str, float], tiny_folder: Callable) -> torch.Tensor:
    """Logits of the base plus the weighted updates of its matrices."""
    base = AutoModelForCausalLM.from_pretrained(tiny_folder("llama"))
    for name, weight in weights.items():
        for path, layer in loaded(project, name, tiny_folder).base_model.model.named_modules():
            if hasattr(layer, "get_delta_weight"):
                base.get_submodule(path).weight.data += weight * layer.get_delta_weight("default").detach()
    return logits_of(base)


def test_the_sum_is_exact_and_loads_in_plain_peft(project: Project, tiny_folder: Callable):
    settings = {"adapters.merge": ["a", "b"], "adapters.weights": [0.75, -0.5], "adapters.name": "both"}
    perform(Story(project, with_settings(load(project.config_path), settings)), ["merge-adapters"])
    folder = project.model_path("both")
    assert sorted(path.name for path in (folder / "adapter").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    found, wanted = logits_of(loaded(project, "both", tiny_folder)), by_hand(project, {"a": 0.75, "b": -0.5}, tiny_folder)
    assert float((found - wanted).abs().max()) < allowed("merged_logits")
    # Planted: other weights.
    assert float((by_hand(project, {"a": 0.75, "b": 0.5}, tiny_folder) - wanted).abs().max()) > PLANTED_FACTOR * allowed("merged_logits")
    record = read_json(folder / "model.json")
    assert record["merged_from"] == {"a": 0.75, "b": -0.5}
    assert record["consent"] == {"author": "A and B", "granted": False, "until": "2030-01-01"}
    assert (record["name"], record["format"], record["sampling"]) == ("both", "adapter", {"temperature": 0.5})


def test_an_svd_of_full_rank_is_the_sum_and_a_lower_one_is_near(project: Project, tiny_folder: Callable, tmp_path: Path):
    base, folders = ModelConfig(name_or_path=str(tiny_folder("llama"))), [project.model_path(name) / "adapter" for name in SETTINGS]
    wanted, errors = by_hand(project, {"a": 0.5, "b": 0.5}, tiny_folder), []
    for rank in (8, 4, 1):
        (tmp_path / str(rank)).mkdir()
        add_adapters(base, folders, [0.5, 0.5], tmp_path / str(rank), combination="svd", rank=rank)
        tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder("llama")), tmp_path / str(rank))
        assert tuned.peft_config["default"].r == rank
        errors.append(float((logits_of(tuned) - wanted).abs().max()))
    assert errors[0] < 2 * allowed("merged_logits") < PLANTED_FACTOR * allowed("merged_logits") < errors[1] < errors[2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"merge": ["a"], "name": "new"}, "Two models and a name are needed"),
        ({"merge": ["a", "c"], "name": "new"}, "There is no model 'c'"),
        ({"merge": ["a", "b"], "name": "a"}, "There is a model 'a' already"),
    ],
)
def test_what_cannot_be_added_is_refused(project: Project, settings: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        perform(
            Story(project, with_settings(load(project.config_path), {f"adapters.{key}": value for key, value in settings.items()})),
            ["merge-adapters"],
        )
    with pytest.raises(ValidationError, match="3 weights for 2 models"):
        AdaptersConfig(merge=["a", "b"], weights=[1, 2, 3], name="new")


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "a prefix tuning adapter"),
        (LoraConfig(r=2, use_dora=True, task_type="CAUSAL_LM"), "a DoRA adapter"),
        (LoraConfig(r=2, bias="all", task_type="CAUSAL_LM"), "an adapter with biases"),
    ],
)
def test_what_is_no_sum_of_updates_is_refused(
    project: Project, tiny_model: Callable, tiny_folder: Callable, tmp_path: Path, config: LoraConfig, what: str
):
    get_peft_model(tiny_model("llama").model, config).save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match=f"This is {what}"):
        add_adapters(
            ModelConfig(name_or_path=str(tiny_folder("llama"))), [project.model_path("a") / "adapter", tmp_path / "other"], [1, 1],
            tmp_path, combination="cat", rank=None,
        )  # fmt: skip


# ---- going on from an adapter ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_starts_as_the_model_that_it_goes_on_from(project: Project, tiny_model: Callable, tiny_folder: Callable, name: str):
    for given in (name, f"models/{name}/adapter", str(project.model_path(name) / "adapter")):
        method = started(project, MethodConfig(start_from=given, lora_dropout=0.0))
        assert started(project, method) == method
    assert (method.lora_r, method.lora_alpha) == (SETTINGS[name]["r"], SETTINGS[name]["lora_alpha"])
    trainable = METHODS["lora"].apply(tiny_model("llama").model, method, seed=1)
    assert torch.equal(logits_of(trainable.model), logits_of(loaded(project, name, tiny_folder)))
    # Planted: a run that starts anew is the base.
    anew = METHODS["lora"].apply(tiny_model("llama").model, method.model_copy(update={"start_from": None}), seed=1)
    assert not torch.equal(logits_of(anew.model), logits_of(trainable.model))
    assert {name.rpartition(".base_model.")[2] for name in trainable.parameters} == set(anew.parameters)
    assert trainable.num_trainable == anew.num_trainable


def test_what_goes_on_is_saved_as_what_it_is(project: Project, tiny_model: Callable, tiny_folder: Callable, tmp_path: Path):
    method = started(project, MethodConfig(start_from="b", lora_dropout=0.25))
    loaded_base = tiny_model("llama", dtype="bfloat16")
    trainable = METHODS["lora"].apply(loaded_base.model, method, base_name="somewhere/base")
    assert {parameter.dtype for parameter in trainable.parameters.values()} == {torch.bfloat16}
    with torch.no_grad():
        for parameter in trainable.parameters.values():
            parameter.mul_(0.5)
    trainable.save(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tiny_folder("llama"), dtype=torch.bfloat16)
    again = PeftModel.from_pretrained(base, tmp_path, autocast_adapter_dtype=False)
    assert torch.equal(logits_of(again), logits_of(trainable.model))
    assert (again.peft_config["default"].lora_dropout, again.peft_config["default"].use_rslora) == (0.25, True)
    assert trainable.detach() is True
    assert torch.equal(logits_of(loaded_base.model), logits_of(tiny_model("llama", dtype="bfloat16").model))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start_from": "nobody"}, "'nobody' is neither a model of the project nor a folder with an adapter"),
        ({"start_from": "a", "name": "qlora"}, "The model 'a' has no nf4_adapter"),
        ({"start_from": "a", "name": "norm"}, "`norm` cannot go on from an adapter"),
        ({"start_from": "a", "lora_r": 4}, "method.lora_r is 4, and the adapter to start from has 3"),
        ({"start_from": "a", "use_rslora": True}, "method.use_rslora is True, and the adapter to start from has False"),
        ({"start_from": "a", "init_lora_weights": "pissa"}, "has its start"),
    ],
)
def test_a_start_that_cannot_be_is_refused(project: Project, settings: dict, message: str):
    with pytest.raises(ConfigError, match=message) as caught:
        started(project, MethodConfig(**settings))
    assert caught.value.place == "method.start_from"


def test_an_adapter_of_another_base_is_no_start(project: Project, tiny_model: Callable):
    method = started(project, MethodConfig(start_from="a", lora_dropout=0.0))
    with pytest.raises(ModelError, match="The adapter to start from does not fit this base"):
        METHODS["lora"].apply(tiny_model("llama", hidden_size=32, head_dim=16).model, method)
