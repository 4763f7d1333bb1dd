"""The trial of a model before its numbers count: a family is right on packed rows, or it is refused.

Families that once passed with wrong numbers have a twin here. What is right is held against plain transformers, one row at a time;
and without what puts it right, the trial refuses it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from end_to_end.test_story import make_project
from moving_parts import CASES
from parity.tolerances import PLANTED_FACTOR, allowed
from test_packing import EVERY_FAMILY, logprobs_one_by_one, rows_of

from giong.config import ModelConfig
from giong.contracts import ScoreRequest
from giong.engine import attention, row_check, step
from giong.engine.row_check import check_rows, check_tokens
from giong.engine.score import LocalScorer
from giong.engine.step import evaluate_rows
from giong.engine.teacher import Teacher
from giong.errors import ModelError
from giong.methods import METHODS
from giong.models.row_model import RowModel, load_row_model
from giong.models.rows import Row
from giong.models.soft_prompt import soft_prompt_of
from giong.workflow import Story, perform

MENDED = ("hyperclovax", "modernbert-decoder")
REFUSED = ("lfm2", "minimax", "doge")
MENDED_ENCODERS = ("roberta", "xlm-roberta", "camembert", "electra")
UNEQUAL = (5, 33, 17, 2, 26)
DTYPES = ("float32", "bfloat16")
OTHER_NUMBERS = "Packed rows of the .* family come to other numbers than transformers' own forward pass"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RowModel]:
    root = tmp_path_factory.mktemp("encoders")

    def load(family: str, dtype: str = "float32") -> RowModel:
        folder = root / family if (root / family).exists() else tiny_models.save_encoder(family, root / family)
        return load_row_model(ModelConfig(name_or_path=str(folder)), {"mask_share": 0.15}, dtype=getattr(torch, dtype))

    return load


def hidden_rows() -> list[Row]:
    """Rows whose tokens are predicted from their own positions, none of them special."""
    return [Row(row.input_ids % 200 + 5, row.weights, labels=np.roll(row.input_ids, 1) % 200 + 5) for row in rows_of(UNEQUAL)]


@torch.no_grad()
def hidden_one_by_one(model: torch.nn.Module, rows: list[Row]) -> torch.Tensor:
    found = []
    for row in rows:
        logprobs, places = model(input_ids=torch.from_numpy(row.input_ids)[None]).logits[0].log_softmax(-1), np.flatnonzero(row.weights)
        found.append(logprobs[places, row.labels[places]])
    return torch.cat(found)


def rows_see_each_other(patch: pytest.MonkeyPatch) -> None:
    """Planted in attention: one row where there are several."""
    settings = attention.AttentionSettings
    patch.setattr(attention, "AttentionSettings", lambda lengths, *rest: settings((sum(lengths),), *rest))


def passes_unless_rows_see_each_other(model: torch.nn.Module, rows: list[Row], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        rows_see_each_other(patch)
        with pytest.raises(ModelError, match=OTHER_NUMBERS):
            check_tokens(model, rows)
    check_tokens(model, rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", [*EVERY_FAMILY, *MENDED])
def test_a_decoder_that_is_right_passes_and_rows_that_see_each_other_do_not(
    tiny_model: Callable, family: str, dtype: str, monkeypatch: pytest.MonkeyPatch
):
    passes_unless_rows_see_each_other(tiny_model(family, dtype=dtype).model, rows_of(UNEQUAL), monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["bert", "modernbert", *MENDED_ENCODERS])
def test_an_encoder_that_is_right_passes_and_rows_that_see_each_other_do_not(
    encoder: Callable, family: str, dtype: str, monkeypatch: pytest.MonkeyPatch
):
    passes_unless_rows_see_each_other(encoder(family, dtype).model, hidden_rows(), monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_mixes_tokens_by_other_means_is_refused(tiny_model: Callable, family: str, dtype: str):
    """A convolution, a state, a rule that only the mask holds."""
    loaded = tiny_model(family, dtype=dtype)
    with pytest.raises(ModelError, match=f"the {family} family come to other numbers .* of their spread") as raised:
        check_tokens(loaded.model, rows_of(UNEQUAL))
    assert "Llama" in raised.value.remedy
    with pytest.raises(ModelError, match=OTHER_NUMBERS):
        LocalScorer(loaded).score([ScoreRequest("The kettle is on.")])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_head_for_hidden_tokens_that_is_not_known_is_refused(encoder: Callable, dtype: str):
    with pytest.raises(ModelError, match=OTHER_NUMBERS):
        check_tokens(encoder("distilbert", dtype).model, hidden_rows())


@pytest.mark.parametrize("family", MENDED)
def test_a_decoder_with_a_head_of_its_own_kind_is_right(tiny_model: Callable, family: str, monkeypatch: pytest.MonkeyPatch):
    model, rows = tiny_model(family).model, rows_of(UNEQUAL)
    with torch.no_grad():
        expected = torch.cat(logprobs_one_by_one(model, rows))
    assert float((torch.cat(evaluate_rows(model, rows, 60)) - expected).abs().max()) < allowed("packed_logprobs")
    # Planted: the head as it is in most families.
    monkeypatch.setattr(step, "before_head", lambda model, hidden_ND: hidden_ND)
    monkeypatch.setattr(step, "_scaling", lambda config: 1.0 / getattr(config, "logits_scaling", 1.0))
    off = (torch.cat(evaluate_rows(model, rows, 60)) - expected).abs().max()
    assert float(off) > PLANTED_FACTOR * allowed("packed_logprobs")
    with pytest.raises(ModelError, match=OTHER_NUMBERS):
        check_tokens(model, rows)


@pytest.mark.parametrize("family", MENDED_ENCODERS)
def test_hidden_tokens_of_an_encoder_are_those_of_transformers(encoder: Callable, family: str, monkeypatch: pytest.MonkeyPatch):
    model, rows = encoder(family).model, hidden_rows()
    expected = hidden_one_by_one(model, rows)
    assert float((torch.cat(evaluate_rows(model, rows, 60)) - expected).abs().max()) < allowed("packed_logprobs")
    # Planted: no layer before the head (ELECTRA's is as wide as its embeddings), and positions from 0.
    width = model.get_output_embeddings().weight.shape[1]
    planted = {"before_head": lambda model, hidden_ND: hidden_ND[:, :width], "first_position": lambda model: 0}
    for name in planted if family != "electra" else ["before_head"]:
        with monkeypatch.context() as patch:
            patch.setattr(step, name, planted[name])
            off = (torch.cat(evaluate_rows(model, rows, 60)) - expected).abs().max()
            assert float(off) > PLANTED_FACTOR * allowed("packed_logprobs")
            with pytest.raises(ModelError, match=OTHER_NUMBERS):
                check_tokens(model, rows)


def test_the_longest_row_leaves_room_for_positions_that_begin_later(encoder: Callable):
    """One place of the table is the padding's."""
    assert [encoder(family).max_seq_length for family in ("bert", "roberta")] == [tiny_models.CONTEXT, tiny_models.CONTEXT - 1]


def test_a_window_in_the_mask_alone_is_found_before_the_first_row_that_is_longer(tiny_model: Callable, monkeypatch: pytest.MonkeyPatch):
    model = tiny_model("phimoe").model
    assert model.config.sliding_window == 36
    check_tokens(model, rows_of((36,)))
    for refused in (lambda: check_tokens(model, rows_of((37,))), lambda: evaluate_rows(model, rows_of((5, 37)), 64)):
        with pytest.raises(ModelError, match="look at windows of 36 tokens by their mask alone, and a row has"):
            refused()
    # Planted: without the refusal the numbers are others.
    monkeypatch.setattr(attention, "_check_window", lambda module, longest: None)
    with torch.no_grad():
        apart = evaluate_rows(model, rows_of((72,)), 72)[0] - logprobs_one_by_one(model, rows_of((72,)))[0]
    assert float(apart.abs().max()) > PLANTED_FACTOR * allowed("packed_logprobs")
    monkeypatch.undo()
    # One that attention is told of passes.
    mistral = tiny_model("mistral").model
    check_tokens(mistral, rows_of((12,)))
    check_tokens(mistral, rows_of((13, 60)))


def test_rows_longer_than_a_chunk_are_refused(tiny_model: Callable, monkeypatch: pytest.MonkeyPatch):
    """Llama 4's layers look at chunks, which is in their mask: what its config says stands here for the family."""
    model, rows = tiny_model("llama").model, rows_of((8, 33))
    model.config.attention_chunk_size, model.config.layer_types = 32, ["chunked_attention", "full_attention"]
    for refused in (lambda: check_tokens(model, rows), lambda: evaluate_rows(model, rows, 64)):
        with pytest.raises(ModelError, match="look at chunks of 32 tokens by their mask alone, and a row has 33") as raised:
            refused()
        assert "model.max_seq_length to 32" in raised.value.remedy
    check_tokens(model, rows[:1])
    model.config.layer_types = ["full_attention"] * 2
    check_tokens(model, rows)


def test_layers_that_cannot_be_computed_in_packs_are_refused_in_one_sentence(tiny_model: Callable, monkeypatch: pytest.MonkeyPatch):
    def broken(model: torch.nn.Module, hidden_ND: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied\nand more")

    monkeypatch.setattr(step, "before_head", broken)
    with pytest.raises(ModelError, match=r"cannot be computed \(mat1 and mat2 shapes cannot be multiplied\)"):
        check_tokens(tiny_model("llama").model, rows_of(UNEQUAL))


def test_weights_that_are_no_numbers_are_not_called_a_matter_of_packing(tiny_model: Callable):
    model = tiny_model("llama").model
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(ModelError, match="numbers that are not finite"):
        check_tokens(model, rows_of(UNEQUAL))


def test_a_model_is_tried_once_and_nothing_of_a_run_changes(tiny_model: Callable, monkeypatch: pytest.MonkeyPatch):
    """Neither random numbers nor which modules train; what is drawn inside is drawn from elsewhere."""
    model, tried = tiny_model("llama").model, []
    model.model.layers[1].train()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    own = row_check._own_outputs
    monkeypatch.setattr(row_check, "_own_outputs", lambda model, row: (torch.rand(5), own(model, row))[1])
    monkeypatch.setattr(row_check, "check_rows", lambda model, rows: (tried.append(len(rows)), check_rows(model, rows)))
    for _ in range(3):
        check_tokens(model, rows_of(UNEQUAL))
    check_tokens(model, [])
    assert tried == [3]
    assert torch.equal(torch.get_rng_state(), before) and np.array_equal(np.random.get_state()[1], numpy_before)
    assert [module.training for module in model.modules()] == modes
    # A copy that is loaded again is another model.
    check_tokens(tiny_model("llama").model, rows_of(UNEQUAL))
    assert tried == [3, 3]


@pytest.mark.parametrize("case", ["lora", "lora, dora", "qlora", "full", "bottleneck", "prompt_tuning", "prefix_tuning"])
def test_adapters_and_matrices_in_4_bits_pass(tiny_model: Callable, case: str, monkeypatch: pytest.MonkeyPatch):
    """Also where they have moved; a soft prompt is back afterwards."""
    if case == "qlora":
        pytest.importorskip("bitsandbytes")
    loaded = tiny_model("llama")
    config = CASES[case].model_copy(update={"prompt_tuning_init_text": None})
    trainable = METHODS[config.name].apply(loaded.model, config, seed=1)
    with torch.no_grad():
        for parameter in trainable.parameters.values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    prompt = soft_prompt_of(trainable.model)
    check_tokens(trainable.model, rows_of(UNEQUAL))
    assert soft_prompt_of(trainable.model) is prompt
    monkeypatch.setattr(row_check, "_tried", {})
    rows_see_each_other(monkeypatch)
    with pytest.raises(ModelError, match=OTHER_NUMBERS):
        check_tokens(trainable.model, rows_of(UNEQUAL))


def test_a_teacher_with_a_head_of_its_own_kind_is_its_own_model(tiny_model: Callable, monkeypatch: pytest.MonkeyPatch):
    """Of a model from itself there is nothing to learn."""
    model, made = tiny_model("modernbert-decoder").model, step.pack(rows_of(UNEQUAL))
    teacher = Teacher(tiny_model("modernbert-decoder").model)

    def divergence() -> float:
        with torch.no_grad():
            return float(teacher.forward(model, made)["teacher_kl_N"].abs().max())

    assert divergence() < allowed("packed_logprobs")
    # Planted: the teacher's states as they come out of its last layer.
    monkeypatch.setattr("giong.engine.teacher.before_head", lambda model, hidden_ND: hidden_ND)
    assert divergence() > PLANTED_FACTOR * allowed("packed_logprobs")


def test_training_on_a_family_that_cannot_keep_rows_apart_is_refused(tmp_path: Path, tiny_folder: Callable[..., Path]):
    project = make_project(tmp_path, tiny_folder("lfm2"))
    with pytest.raises(ModelError, match=OTHER_NUMBERS):
        perform(Story(project), ["import", "synth", "train"])
    assert not list((project.root / "runs").glob("*/results.json"))
