"""Prompt tuning and prefix tuning: their laws, and PEFT's own forward pass and generation as the oracle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from moving_parts import CASES, SOFT_PROMPTS
from parity.tolerances import PLANTED_FACTOR, allowed, relative_error
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import CONTEXT, FAMILIES
from transformers import AutoModelForCausalLM

from giong.config import MethodConfig, TrainConfig
from giong.contracts import Sampling, ScoreRequest
from giong.engine.optimizer import MasterOptimizer
from giong.engine.packing import pack
from giong.engine.score import LocalScorer
from giong.engine.step import backward, forward_logprobs
from giong.errors import ConfigError, ModelError, StoryError
from giong.generation.local import LocalModel
from giong.methods import METHODS, Trainable
from giong.models.load import LoadedModel
from giong.models.rows import Row
from giong.objectives import sft
from giong.sizing.defaults import resolve_training
from giong.sizing.moving import check_anchor, check_method

over_methods = pytest.mark.parametrize("method", SOFT_PROMPTS)
over_both = pytest.mark.parametrize(("method", "family"), [(method, family) for family in FAMILIES for method in SOFT_PROMPTS])
LENGTHS = (20, 9, 31)
NUM_VIRTUAL = 8


def rows(lengths: tuple[int, ...] = LENGTHS) -> list[Row]:
    """Every token but the first carries loss: one that saw too little or too much would show."""
    generator = np.random.default_rng(1)
    return [Row(generator.integers(5, 400, length), (np.arange(length) > 0).astype(np.float32)) for length in lengths]


def applied(loaded: LoadedModel, method: str, **changes: object) -> Trainable:
    return METHODS[method].apply(loaded.model, CASES[method].model_copy(update=changes), seed=1, base_name="somewhere/base")


def shaken(trainable: Trainable) -> Trainable:
    """Away from its start, by as much as it is large."""
    (parameter,) = trainable.parameters.values()
    with torch.no_grad():
        parameter.add_(parameter.std() * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    return trainable


@torch.no_grad()
def logprobs(model: torch.nn.Module, chosen: list[Row] | None = None) -> torch.Tensor:
    return forward_logprobs(model.eval(), pack(rows() if chosen is None else chosen))["logprobs_N"]


def by_peft(folder: Path, base: Path, row: Row) -> torch.Tensor:
    """Log-probabilities of a row's tokens after its first, from plain PEFT over the base on the disk."""
    plain = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    tuned = PeftModel.from_pretrained(plain, folder).eval()
    ids = torch.from_numpy(row.input_ids)
    with torch.no_grad():
        logits = tuned(input_ids=ids[None], attention_mask=torch.ones(1, len(ids), dtype=torch.long)).logits[0, -len(ids) :]
    return logits.log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]]


@over_both
def test_a_pack_computes_what_peft_computes_row_by_row(
    tiny_model: Callable, tiny_folder: Callable, tmp_path: Path, method: str, family: str
):
    trainable = shaken(applied(tiny_model(family), method))
    found, base = logprobs(trainable.model), logprobs(tiny_model(family).model)
    trainable.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    wanted = torch.cat([by_peft(tmp_path, tiny_folder(family), row) for row in rows()])
    assert float((found - wanted).abs().max()) < allowed("packed_logprobs")
    # Planted: without the virtual tokens, and with their numbers out of place (the order of a prefix's tokens means nothing).
    assert float((base - wanted).abs().max()) > PLANTED_FACTOR * allowed("packed_logprobs")
    (parameter,) = trainable.parameters.values()
    parameter.data = parameter.data.roll(1, 1)
    assert float((logprobs(trainable.model) - wanted).abs().max()) > PLANTED_FACTOR * allowed("packed_logprobs")


@over_both
def test_it_starts_as_the_base_behind_the_text(tiny_model: Callable, method: str, family: str):
    """The text is shorter than the virtual tokens and comes again."""
    loaded = tiny_model(family)
    ids = loaded.tokenizer("The kettle sang", add_special_tokens=False)["input_ids"]
    assert len(ids) < 40
    start = np.array((ids * 40)[:40])
    behind = [Row(np.r_[start, row.input_ids], np.r_[np.zeros(40), row.weights].astype(np.float32)) for row in rows()]
    wanted = logprobs(tiny_model(family).model, behind)
    found = logprobs(applied(loaded, method, num_virtual_tokens=40).model)
    assert float((found - wanted).abs().max()) < allowed("packed_logprobs")
    other = applied(tiny_model(family), method, num_virtual_tokens=40, prompt_tuning_init_text=None)
    assert float((logprobs(other.model) - wanted).abs().max()) > PLANTED_FACTOR * allowed("packed_logprobs")


@over_methods
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradients_are_pefts(tiny_model: Callable, tiny_folder: Callable, tmp_path: Path, method: str, family: str):
    trainable = shaken(applied(tiny_model(family), method))
    trainable.save(tmp_path)
    (parameter,) = trainable.parameters.values()
    chosen = rows((20, 20))
    backward(trainable.model.train(), chosen, sft.loss, 64)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder(family)), tmp_path).train()
    embeddings = tuned.prompt_encoder["default"].embedding.weight.requires_grad_(True)
    ids = torch.from_numpy(np.stack([row.input_ids for row in chosen]))
    logits = tuned(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -20:]
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    assert relative_error(parameter.grad, embeddings.grad) < allowed("gradients")
    assert relative_error(parameter.grad.flip(0), embeddings.grad) > PLANTED_FACTOR * allowed("gradients")


@over_methods
def test_training_moves_the_soft_prompt_alone_and_lowers_the_loss(tiny_model: Callable, method: str):
    loaded, chosen = tiny_model("qwen2"), rows()
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    trainable = applied(loaded, method)
    assert {name for name, parameter in trainable.model.named_parameters() if parameter.requires_grad} == set(trainable.parameters)
    start = -float(logprobs(trainable.model).mean())
    optimizer = MasterOptimizer(trainable.parameters, optimizer="adamw", learning_rate=1e-2, weight_decay=0.0)
    for _ in range(8):
        backward(trainable.model.train(), chosen, sft.loss, 64)
        optimizer.step(1e-2, 1e9)
    optimizer.close()
    assert -float(logprobs(trainable.model).mean()) < start - 0.05
    moved = trainable.model.state_dict()
    assert all(torch.equal(moved[name], tensor) for name, tensor in before.items())
    # Taken out, the model is the base.
    with pytest.raises(StoryError, match="cannot be merged"):
        trainable.merge()
    assert trainable.detach() is True
    assert trainable.model.state_dict().keys() == before.keys()
    assert torch.equal(logprobs(trainable.model), logprobs(tiny_model("qwen2").model))


PROMPTS = [[7, 8, 9, 10, 11, 12], [20, 21, 22], [*range(100, 150)], [*range(100, 150), 33, 34]]


@over_both
def test_generation_is_pefts(tiny_model: Callable, tiny_folder: Callable, tmp_path: Path, method: str, family: str):
    """Prompts of unequal length, two of them with a shared beginning, decoded together; greedy, so to the token."""
    shaken(applied(tiny_model(family), method)).save(tmp_path)
    local = LocalModel(tiny_model(family))
    local.add_adapter("mine", tmp_path)
    samplings = [Sampling(temperature=0.0, max_new_tokens=8)] * len(PROMPTS)
    found = [one.tokens for one in local.generate(PROMPTS, samplings, "mine")]
    tuned = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_folder(family), attn_implementation="eager"), tmp_path
    ).eval()
    for prompt, tokens in zip(PROMPTS, found):
        ids = torch.tensor([prompt])
        for token in tokens:
            with torch.no_grad():
                best = int(tuned(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1].argmax())
            assert best == token
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    # Planted: the base writes something else.
    assert [one.tokens for one in local.generate(PROMPTS, samplings, None)] != found


def test_soft_prompts_and_lora_adapters_live_beside_each_other(tiny_model: Callable, tmp_path: Path):
    for method in SOFT_PROMPTS:
        shaken(applied(tiny_model("llama"), method)).save(tmp_path / method)
    tuned = get_peft_model(
        tiny_model("llama").model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    )
    tuned.save_pretrained(tmp_path / "lora")
    names = [*SOFT_PROMPTS, "lora", None]

    def answers(local: LocalModel) -> dict[str | None, list[float]]:
        found = {}
        for name in names:
            with local.using(name):
                request = ScoreRequest("Nobody in the village could say who had painted the bridge blue.", ())
                found[name] = list(LocalScorer(local.loaded).score([request])[0].logprobs)
        return found

    together = LocalModel(tiny_model("llama"))
    for name in names[:-1]:
        together.add_adapter(name, tmp_path / name)
    assert together.adapters == sorted(names[:-1])
    found = answers(together)
    assert len({tuple(values) for values in found.values()}) == 4
    for name in names[:-1]:
        alone = LocalModel(tiny_model("llama"))
        alone.add_adapter(name, tmp_path / name)
        with alone.using(name):
            request = ScoreRequest("Nobody in the village could say who had painted the bridge blue.", ())
            assert list(LocalScorer(alone.loaded).score([request])[0].logprobs) == found[name]
        together.remove_adapter(name)
    assert together.adapters == []
    assert "soft_prompt" not in dict(together.loaded.model.named_modules())


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
@over_methods
def test_a_soft_prompt_made_by_peft_loads_here(tiny_model: Callable, tiny_folder: Callable, tmp_path: Path, method: str, family: str):
    config = (PromptTuningConfig if method == "prompt_tuning" else PrefixTuningConfig)(num_virtual_tokens=7, task_type="CAUSAL_LM")
    get_peft_model(tiny_model(family).model, config).save_pretrained(tmp_path)
    wanted = torch.cat([by_peft(tmp_path, tiny_folder(family), row) for row in rows()])
    local = LocalModel(tiny_model(family))
    local.add_adapter("theirs", tmp_path)
    with local.using("theirs"):
        assert float((logprobs(local.loaded.model) - wanted).abs().max()) < allowed("packed_logprobs")


@over_methods
def test_a_soft_prompt_that_does_not_fit_or_cannot_be_read_is_refused(tiny_model: Callable, tmp_path: Path, method: str):
    applied(tiny_model("llama"), method).save(tmp_path)
    local = LocalModel(tiny_model("llama", hidden_size=32, head_dim=8))
    with pytest.raises(ModelError, match="The soft prompt does not fit this base") as caught:
        local.add_adapter("bad", tmp_path)
    assert caught.value.place == str(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({"other": tensors["prompt_embeddings"]}, path)
    with pytest.raises(ModelError, match="has no tensor prompt_embeddings"):
        local.add_adapter("bad", tmp_path)
    path.write_bytes(b"torn")
    with pytest.raises(ModelError, match="cannot be read"):
        local.add_adapter("bad", tmp_path)
    assert local.adapters == []


@over_methods
def test_virtual_tokens_take_positions_of_the_context(tiny_model: Callable, tmp_path: Path, method: str):
    """GPT-2 has no embedding for a position beyond its context."""
    applied(tiny_model("gpt2"), method).save(tmp_path)
    local = LocalModel(tiny_model("gpt2"))
    local.add_adapter("mine", tmp_path)
    assert (local.context(None), local.context("mine")) == (CONTEXT, CONTEXT - NUM_VIRTUAL)
    long = "The kettle sang before anyone had asked it to. " * 100
    with local.using("mine"):
        assert len(LocalScorer(local.loaded).score([ScoreRequest(long, ())])[0].logprobs) > CONTEXT
    with pytest.raises(ConfigError, match=f"{CONTEXT} virtual tokens fill the model's context of {CONTEXT}") as caught:
        check_method(local.loaded.shape, MethodConfig(name=method, num_virtual_tokens=CONTEXT))
    assert caught.value.place == "method.num_virtual_tokens"


@over_methods
def test_a_text_that_is_too_long_or_empty_is_refused(tiny_model: Callable, method: str):
    for text, message in (
        ("The kettle sang before anyone had asked it to, and", "The text has \\d+ tokens, and there are 8"),
        ("", "has 0 tokens"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            applied(tiny_model("llama"), method, prompt_tuning_init_text=text)
        assert caught.value.place == "method.prompt_tuning_init_text"


@over_methods
def test_what_it_does_not_go_with_is_refused(tiny_model: Callable, method: str):
    with pytest.raises(ConfigError, match="Noise on the embeddings does not go with") as caught:
        check_anchor(MethodConfig(name=method), TrainConfig(neftune_noise_alpha=5.0))
    assert caught.value.place == "train.neftune_noise_alpha"
    model = tiny_model("llama").model.base_model
    with pytest.raises(ConfigError, match="is for models that write"):
        METHODS[method].apply(model, CASES[method])


@over_methods
def test_bf16_saves_what_was_trained(tiny_model: Callable, tmp_path: Path, method: str):
    trainable = shaken(applied(tiny_model("llama", dtype="bfloat16"), method))
    trainable.save(tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"].dtype == torch.bfloat16
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "somewhere/base"
    local = LocalModel(tiny_model("llama", dtype="bfloat16"))
    local.add_adapter("mine", tmp_path)
    with local.using("mine"):
        assert torch.equal(logprobs(local.loaded.model), logprobs(trainable.model))


@over_methods
def test_the_learning_rate_that_is_chosen(tiny_model: Callable, method: str):
    """A hundred times LoRA's, which is 3e-4 for so small a model."""
    assert resolve_training(MethodConfig(name=method), TrainConfig(), tiny_model("llama").shape, 200).train.learning_rate == 3e-2
