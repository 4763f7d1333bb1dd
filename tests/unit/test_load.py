"""Loading a model folder: what is refused, and with which sentence; what is only said in a notice."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tiny_models import CONTEXT, FAMILIES
from tokenizers import Tokenizer

from giong.config import ModelConfig
from giong.errors import ConfigError, ModelError
from giong.models.folder import looks_like_path
from giong.models.load import load_model, model_identity


@pytest.fixture
def folder(tiny_folder: Callable, tmp_path: Path) -> Path:
    """A copy of the Qwen2 twin that a test may break."""
    return Path(shutil.copytree(tiny_folder("qwen2"), tmp_path / "model"))


def refusal(path: str | Path, **settings: object) -> ModelError:
    with pytest.raises(ModelError) as caught:
        load_model(ModelConfig(name_or_path=str(path), **settings))
    error = caught.value
    assert error.place
    assert error.remedy
    assert "\n" not in str(error)
    return error


@pytest.mark.parametrize("family", FAMILIES)
def test_a_twin_of_every_family_loads_as_it_is(tiny_model: Callable, tiny_folder: Callable, family: str):
    loaded = tiny_model(family)
    assert loaded.shape.num_parameters == sum(parameter.numel() for parameter in loaded.model.parameters())
    assert 50_000 < loaded.shape.num_parameters < 170_000
    assert loaded.max_seq_length == CONTEXT
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    saved = load_file(tiny_folder(family) / "model.safetensors")
    own = loaded.model.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in saved.items())


def test_gemma_2_keeps_its_soft_caps_when_it_decodes(tiny_model: Callable):
    """Torch's scaled dot-product attention cannot cap scores: the model must not use it."""
    assert tiny_model("gemma2").model.config._attn_implementation == "eager"
    assert tiny_model("llama").model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["./nowhere", "~/nowhere-at-all", "/nowhere/at/all"])
def test_a_path_that_does_not_exist(name: str):
    assert "no model at this path" in str(refusal(name))


def test_a_folder_without_config(folder: Path):
    (folder / "config.json").unlink()
    assert "no config.json" in str(refusal(folder))


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b'{"model_type": "qwen2",', b"[1, 2]", b"\xff\xfe\x00"])
def test_broken_json_is_named(folder: Path, file: str, content: bytes):
    (folder / file).write_bytes(content)
    error = refusal(folder)
    assert f"{file} is not valid JSON" in error.message
    assert error.place == str(folder / file)


def test_a_folder_without_tokenizer(folder: Path):
    (folder / "tokenizer.json").unlink()
    error = refusal(folder)
    assert "no tokenizer" in error.message
    assert "tokenizer.json" in error.remedy


def test_only_pickle_weights_are_refused_unread(folder: Path):
    """The file is a pickle bomb in spirit: opening it as one would raise another error."""
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    error = refusal(folder)
    assert "only pickle weights (pytorch_model.bin)" in error.message
    assert ".safetensors" in error.remedy


def test_no_weights_at_all(folder: Path):
    (folder / "model.safetensors").unlink()
    assert "no .safetensors weights" in str(refusal(folder))


def test_torn_weights(folder: Path):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert "could not be loaded" in str(refusal(folder))


def test_incomplete_weights_are_not_filled_with_random_numbers(folder: Path):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "1 tensors are missing, the first is model.layers.1.mlp.up_proj.weight" in str(refusal(folder))


def test_weights_of_another_shape(folder: Path):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    assert "could not be loaded" in str(refusal(folder))


def test_a_tokenizer_of_a_larger_vocabulary(folder: Path):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(["<one more>", "<and one>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    assert "The tokenizer has 450 tokens and the model 448" in str(refusal(folder))


@pytest.mark.parametrize(
    "changes",
    [{"model_type": "no-such-family"}, {"model_type": None}, {"auto_map": {"AutoModelForCausalLM": "code.Model"}, "model_type": "own"}],
)
def test_an_architecture_that_transformers_does_not_know_or_remote_code(folder: Path, changes: dict):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    (folder / "code.py").write_text("raise SystemExit('remote code was run')")
    assert "could not be loaded" in str(refusal(folder))


def test_a_family_without_a_size_formula_is_counted_with_a_notice(tiny_model: Callable):
    loaded = tiny_model("neox")
    assert any("gpt_neox" in notice and "counted" in notice for notice in loaded.notices)
    assert loaded.shape.model_type == "gpt_neox"
    assert loaded.shape.num_parameters == sum(parameter.numel() for parameter in loaded.model.parameters())
    assert (loaded.shape.hidden_size, loaded.shape.num_hidden_layers, loaded.shape.head_dim) == (64, 2, 16)


def test_a_chat_template_that_does_not_exist(folder: Path):
    with pytest.raises(ConfigError, match="no chat template at this path"):
        load_model(ModelConfig(name_or_path=str(folder), chat_template=str(folder / "none.jinja")))


def test_a_longer_context_than_the_model_has_is_cut_with_a_notice(folder: Path):
    loaded = load_model(ModelConfig(name_or_path=str(folder), max_seq_length=9999))
    assert loaded.max_seq_length == CONTEXT
    assert any("9999" in notice for notice in loaded.notices)
    assert load_model(ModelConfig(name_or_path=str(folder), max_seq_length=100)).max_seq_length == 100


# ---- names of the hub ------------------------------------------------------------------------------------------------


def test_a_hub_name_in_offline_mode_is_one_sentence_at_once():
    started = time.monotonic()
    error = refusal("nobody/no-such-model")
    assert time.monotonic() - started < 5
    assert error.place == "nobody/no-such-model"
    assert "network" in error.remedy


def test_a_hub_name_without_a_network_is_one_sentence_at_once(monkeypatch: pytest.MonkeyPatch):
    """The hub's address is a closed port here; its own client would try for most of a minute."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()
    error = refusal("nobody/no-such-model")
    assert time.monotonic() - started < 5
    assert "http://127.0.0.1:9 does not answer" in error.message


def test_a_hub_model_that_was_fetched_before_needs_no_network(tiny_folder: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--tiny"
    shutil.copytree(tiny_folder("qwen2"), repository / "snapshots" / "0123456789")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123456789")
    started = time.monotonic()
    loaded = load_model(ModelConfig(name_or_path="someone/tiny"))
    assert time.monotonic() - started < 5
    assert loaded.name_or_path == "someone/tiny"


@pytest.mark.parametrize(
    ("name", "expected"),
    [("./model", True), ("/model", True), ("~/model", True), ("a/b/c", True), ("Qwen/Qwen2.5-3B-Instruct", False), ("gpt2", False)],
)
def test_paths_and_hub_names_are_told_apart(name: str, expected: bool):
    assert looks_like_path(name) is expected


# ---- identity --------------------------------------------------------------------------------------------------------


def test_the_identity_follows_a_tensor_in_the_middle_of_a_large_file(folder: Path):
    """Neither the size nor the ends of the file tell."""
    config, path = ModelConfig(name_or_path=str(folder)), folder / "model.safetensors"
    found = []
    for factor in (1.0, 2.0):
        tensors = {name: torch.full((512, 512), 0.5) for name in ("a", "c")} | {"b": torch.full((512, 512), factor)}
        save_file(tensors, path, metadata={"format": "pt"})
        found.append(model_identity(config))
    assert found[0] != found[1]
    # What is no such file has an identity too: it is refused in a sentence of its own when it is read.
    broken = [
        b"no tensors at all",
        *(len(header).to_bytes(8, "little") + header for header in (b'{"a":{"data_offsets":[-9,-99]}}', b'{"a":{"data_offsets":7}}')),
    ]
    for content in broken:
        path.write_bytes(content)
        found.append(model_identity(config))
    assert len(set(found)) == len(found)


def test_the_identity_follows_what_a_template_says(folder: Path, tmp_path: Path):
    template = tmp_path / "template.jinja"
    config, found = ModelConfig(name_or_path=str(folder), chat_template=str(template)), set()
    for text in ("one", "two"):
        template.write_text(text)
        found.add(model_identity(config))
    assert len(found) == 2


def test_the_identity_follows_weights_config_and_settings(folder: Path):
    config = ModelConfig(name_or_path=str(folder))
    identity = model_identity(config)
    assert model_identity(config) == identity
    assert model_identity(config.model_copy(update={"max_seq_length": 64})) != identity
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] += 1.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    changed = model_identity(config)
    assert changed != identity
    settings = folder / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace("helpful", "helpless"))
    assert model_identity(config) not in (identity, changed)
