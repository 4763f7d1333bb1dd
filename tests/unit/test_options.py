"""Options against the risks of tuning: each off is no difference, each on does what it says, and a resumed run is the same run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from parity.tolerances import PLANTED_FACTOR, allowed
from unit.test_loop import CONFIG, DROPOUT_LORA, FULL, NUM_STEPS, KilledError, Run, assert_same_bytes, rows

from giong.config import MethodConfig, TrainConfig, parse
from giong.contracts import LossSum, Sampling
from giong.engine.anchor import Anchor, with_kl
from giong.engine.early_stopping import EarlyStopping, memorisation_score, recalled_share
from giong.engine.embedding_noise import EmbeddingNoise
from giong.engine.packing import pack
from giong.engine.step import backward, evaluate_rows
from giong.errors import ConfigError
from giong.generation.decoder import decode
from giong.methods import METHODS
from giong.models.rows import Row
from giong.objectives import sft
from giong.sizing.moving import check_anchor
from giong.workflow.replay import cut
from giong.workflow.surprise import MAX_SURPRISE, weighed_by_surprise

LAST = MethodConfig(name="last_layers", num_layers=1)
PLAIN_LORA = DROPOUT_LORA.model_copy(update={"lora_dropout": 0.0})
OPTIONS = {"kl": {"kl_weight": 0.5}, "l2": {"l2_to_base": 0.3}, "noise": {"neftune_noise_alpha": 5.0}}


@pytest.mark.parametrize("option", OPTIONS)
def test_killed_and_resumed_gives_the_same_bytes(tiny_model: Callable, tmp_path: Path, option: str):
    """And other bytes than without the option."""
    method = FULL if option == "l2" else DROPOUT_LORA
    config = replace(CONFIG, save_steps=2, num_epochs=2, **OPTIONS[option])
    whole, killed, plain = (
        Run(tiny_model, tmp_path / name, method, settings)
        for name, settings in (("whole", config), ("killed", config), ("plain", replace(CONFIG, num_epochs=2)))
    )
    whole.go()
    with pytest.raises(KilledError):
        killed.go(die_at=3)
    killed.go()
    assert_same_bytes(whole.weights(), killed.weights())
    plain.go()
    assert plain.losses()[6] != whole.losses()[6]


def test_dropout_follows_the_seed(tiny_model: Callable, tmp_path: Path):
    """Of a single row nothing is left to chance but dropout. The second step is the first whose loss it reaches."""
    losses = []
    for seed in (1, 2, 2):
        run = Run(tiny_model, tmp_path / str(len(losses)), DROPOUT_LORA, replace(CONFIG, seed=seed, num_epochs=3, weight_decay=0.0))
        run.rows = rows()[:1]
        run.go()
        losses.append(run.losses())
    assert losses[0][1] == losses[1][1] and losses[0][3] != losses[1][3]
    assert losses[1] == losses[2]


# ---- the start ---------------------------------------------------------------------------------------------------------


def moved(tiny_model: Callable, method: MethodConfig) -> tuple[torch.nn.Module, Anchor, list[torch.Tensor]]:
    """A model whose moving weights have moved, its anchor, and what it said before."""
    trainable = METHODS[method.name].apply(tiny_model("llama").model, method, seed=1)
    model = trainable.model.eval()
    before = evaluate_rows(model, rows(), 64)
    anchor = Anchor(trainable.parameters)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in trainable.parameters.values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model, anchor, before


@pytest.mark.parametrize("method", [DROPOUT_LORA, FULL, LAST], ids=["lora", "full", "last_layers"])
def test_within_the_anchor_the_model_is_the_base(tiny_model: Callable, method: MethodConfig):
    model, anchor, before = moved(tiny_model, method)
    after = evaluate_rows(model, rows(), 64)
    model.train()
    with anchor.in_place(model):
        within = evaluate_rows(model, rows(), 64)
    assert model.training
    model.eval()
    assert all(torch.equal(a, b) for a, b in zip(before, within))
    assert all(torch.equal(a, b) for a, b in zip(after, evaluate_rows(model, rows(), 64)))
    forgotten = next(name for name in anchor.parameters if "layers.1" in name and ("lora_B" in name or method is not DROPOUT_LORA))
    anchor.start[forgotten] = anchor.parameters[forgotten].data
    with anchor.in_place(model):
        assert not all(torch.equal(a, b) for a, b in zip(before, evaluate_rows(model, rows(), 64)))


def test_the_divergence_is_that_of_two_models_apart(tiny_model: Callable):
    """Against full logits of the base and of the tuned model, row by row. Two bases would differ by nothing."""
    model, anchor, _ = moved(tiny_model, PLAIN_LORA)
    base = tiny_model("llama").model
    found = anchor.forward(model, pack(rows()))["kl_N"].detach()
    expected = []
    for row in rows():
        ids, positions = torch.from_numpy(row.input_ids)[None], torch.from_numpy(np.flatnonzero(row.weights)) - 1
        with torch.no_grad():
            now, start = (each(input_ids=ids).logits[0, positions].double().log_softmax(-1) for each in (model, base))
        expected.append((start.exp() * (start - now)).sum(1))
    difference = (found - torch.cat(expected)).abs().max()
    assert difference < allowed("packed_logprobs")
    assert found.min() > PLANTED_FACTOR * allowed("packed_logprobs")


def test_compared_rows_weigh_by_their_means():
    """Two pairs; rows with divergences (1, 3), (2), (4), (0, 0, 6): means 2, 2, 4, 2, each half a pair. 7 + 0.5 * (10 / 2) = 9.5."""
    tensors = {
        "kl_N": torch.tensor([1.0, 3, 2, 4, 0, 0, 6]), "row_of_N": torch.tensor([0, 0, 1, 2, 3, 3, 3]), "group_of_R": torch.tensor([0, 0, 1, 1]),
    }  # fmt: skip
    found = with_kl(LossSum(torch.tensor(7.0), torch.tensor(2.0)), tensors, 0.5)
    assert (float(found.loss_sum), float(found.metrics["kl"]), float(found.weight_sum)) == (9.5, 5.0, 2.0)


def test_a_large_kl_weight_keeps_the_model_at_the_base(tiny_model: Callable, tmp_path: Path):
    divergences = {}
    for kl_weight in (1e-6, 3.0, 100.0):
        run = Run(tiny_model, tmp_path / str(kl_weight), PLAIN_LORA, replace(CONFIG, kl_weight=kl_weight, learning_rate=5e-3))
        run.go()
        divergences[kl_weight] = [event.data["kl"] for event in run.events if event.kind == "step"]
    assert all(values[0] < 1e-6 for values in divergences.values())
    assert divergences[1e-6][-1] > 1.4 * divergences[3.0][-1] > 7 * divergences[100.0][-1]


def test_the_pull_by_hand(tiny_model: Callable):
    """Start 1, now 2, learning rate 0.1, strength 0.5: 2 - 0.1 * 0.5 * (2 - 1) = 1.95; towards zero it would be 1.9."""
    parameter = torch.nn.Parameter(torch.ones(3))
    anchor = Anchor({"w": parameter})
    master = {"w": torch.full((3,), 2.0)}
    anchor.pull(master, 0.1 * 0.5)
    assert master["w"].tolist() == pytest.approx([1.95] * 3, abs=allowed("hand_worked"))
    assert abs(1.95 - (1 - 0.05) * 2.0) > PLANTED_FACTOR * allowed("hand_worked")


def test_pulled_all_the_way_a_run_never_leaves_the_start(tiny_model: Callable, tmp_path: Path):
    """Learning rate times strength is 1: before every step the weights are back, so the last step is all that is left."""
    flat = replace(CONFIG, learning_rate=1e-3, schedule="constant", warmup_share=0.0, weight_decay=0.0)
    distance = {}
    for strength in (0.0, 1e3):
        run = Run(tiny_model, tmp_path / str(strength), LAST, replace(flat, l2_to_base=strength))
        start = {name: tensor.float() for name, tensor in tiny_model("llama", dtype="bfloat16").model.state_dict().items()}
        run.go()
        distance[strength] = max(float((tensor.float() - start[name]).abs().max()) for name, tensor in run.weights().items())
    assert distance[1e3] < 5e-3 < distance[0.0]


def test_a_pull_needs_weights_of_the_model():
    check_anchor(MethodConfig(name="lora"), TrainConfig())
    check_anchor(LAST, TrainConfig(l2_to_base=0.1))
    with pytest.raises(ConfigError, match=r"train.l2_to_base.*weight_decay"):
        check_anchor(MethodConfig(name="lora"), TrainConfig(l2_to_base=0.1))


# ---- noise -------------------------------------------------------------------------------------------------------------


def test_noise_is_as_wide_as_the_paper_says():
    """alpha 5, 16 tokens of width 64: within 5 / sqrt(1024) = 0.15625, and uniform, so its mean square is a third of that squared."""
    noise = EmbeddingNoise(5.0)
    drawn = noise.of_row(torch.arange(16), 64)
    assert float(drawn.abs().max()) <= 0.15625
    assert float(drawn.square().mean()) == pytest.approx(0.15625**2 / 3, rel=0.1)
    assert torch.equal(drawn, noise.of_row(torch.arange(16), 64))
    noise.step_seed = 1
    assert not torch.equal(drawn, noise.of_row(torch.arange(16), 64))


def test_what_is_drawn_and_scored_beside_the_training_has_no_noise(tiny_model: Callable):
    """Drawn answers have no packs, and the model is in evaluation mode."""
    model = tiny_model("llama").model.eval()
    asked = [5, 6, 7], Sampling(max_new_tokens=4, temperature=0.0)
    (clean,) = decode(model, [asked[0]], [asked[1]], ())
    with EmbeddingNoise(500.0).on(model):
        (drawn,) = decode(model, [asked[0]], [asked[1]], ())
    assert drawn.tokens == clean.tokens


def noisy_loss(model: torch.nn.Module, max_tokens: int, noise: EmbeddingNoise) -> float:
    with noise.on(model):
        loss = backward(model, rows(), sft.loss, max_tokens)["loss"]
    model.zero_grad()
    return loss


def test_packing_does_not_change_the_noise(tiny_model: Callable, monkeypatch: pytest.MonkeyPatch):
    model, noise = tiny_model("llama").model.requires_grad_(True), EmbeddingNoise(20.0)
    clean = backward(model, rows(), sft.loss, 64)["loss"]
    assert noisy_loss(model, 64, noise) == pytest.approx(clean, abs=1e-7), "evaluation mode"
    model.train()
    together, apart = noisy_loss(model, 1000, noise), noisy_loss(model, 1, noise)
    assert together == pytest.approx(apart, abs=allowed("packed_logprobs"))
    assert abs(together - clean) > PLANTED_FACTOR * allowed("packed_logprobs")

    def as_one_row(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        noise._of_thread.lengths = [sum(kwargs["lengths"])]

    monkeypatch.setattr(noise, "_note_lengths", as_one_row)
    assert abs(noisy_loss(model, 1000, noise) - together) > PLANTED_FACTOR * allowed("packed_logprobs")


# ---- early stopping ----------------------------------------------------------------------------------------------------


def test_patience_counts_evaluations_without_a_gain():
    stopping = EarlyStopping(patience=2)
    for loss, count, stops in ((3.0, 0, False), (3.5, 1, False), (2.0, 0, False), (2.0, 1, False), (math.nan, 2, True)):
        stopping = stopping.after(loss)
        assert (stopping.num_without_gain, bool(stopping.reason)) == (count, stops)


def test_recalled_runs_by_hand():
    """Ten tokens have three runs of eight. One unsure token at place 9 spoils the last two; at place 5 all three."""
    sure, unsure = math.log(0.6), math.log(0.4)
    row = torch.full((10,), sure)
    assert recalled_share([row]) == 1.0
    row[8] = unsure
    assert recalled_share([row]) == pytest.approx(1 / 3)
    row[4] = unsure
    assert recalled_share([row, torch.full((7,), sure)]) == 0.0


def test_what_was_learned_by_heart_is_told_from_what_is_easy(tiny_model: Callable, tmp_path: Path):
    run = Run(tiny_model, tmp_path, FULL, replace(CONFIG, num_epochs=12, learning_rate=1e-2))
    unseen = [Row((row.input_ids + 7) % 300, row.weights) for row in rows()]
    run.go()
    model = run.trainable.model
    assert memorisation_score(model, rows(), unseen, 64) > 0.3
    assert memorisation_score(model, unseen, unseen, 64) == 0.0


@pytest.mark.parametrize("die_at", [None, 4, 8])
def test_a_run_stops_early_and_stays_stopped(tiny_model: Callable, tmp_path: Path, die_at: int | None):
    config = replace(CONFIG, eval_steps=2, early_stopping_patience=2, load_best_model_at_end=True, keep_checkpoints=1)
    run = Run(tiny_model, tmp_path, config=config)
    losses = {2: 3.0, 4: 2.0, 6: 2.5, 8: 2.5}
    run.options = {"validate": lambda: losses[run.step_done()]}
    if die_at:
        with pytest.raises(KilledError):
            run.go(die_at=die_at)
    result = run.go()
    assert (result.num_steps, result.best_step) == (8, 4)
    assert "2.0000" in result.stopped_early
    assert run.step_done() <= 8 < NUM_STEPS
    run.options = {"validate": lambda: pytest.fail("nothing is left to measure")}
    assert run.go().num_steps == 8


def test_memorisation_ends_a_run(tiny_model: Callable, tmp_path: Path):
    run = Run(tiny_model, tmp_path, config=replace(CONFIG, eval_steps=3, early_stopping_memorisation=0.02))
    scores = iter([0.0, 0.021])
    run.options = {"validate": lambda: -float(run.step_done()), "memorisation": lambda: next(scores)}
    result = run.go()
    assert result.num_steps == 6
    assert "by heart" in result.stopped_early
    assert [event.data["memorisation"] for event in run.events if event.kind == "checkpoint"] == [0.0, 0.021]


@pytest.mark.parametrize(
    ("train", "named"),
    [
        ({"early_stopping_patience": 2}, "eval_steps"),
        ({"early_stopping_memorisation": 0.02}, "eval_steps"),
        ({"replay_path": "a.txt"}, "replay_share"),
        ({"replay_share": 1.0}, "replay_share"),
        ({"surprise_weight": 1.5}, "surprise_weight"),
    ],
)
def test_settings_that_need_each_other(train: dict, named: str):
    with pytest.raises(ConfigError, match=named):
        parse({"train": train})


# ---- replay ------------------------------------------------------------------------------------------------------------


def test_cut_rows_have_every_target_once():
    row = Row(np.arange(1, 22), np.concatenate([np.zeros(1), np.ones(20)]).astype(np.float32))
    for size in (2, 6, 20, 21, 50):
        pieces = cut([row], size)
        targets = np.concatenate([piece.input_ids[piece.weights > 0] for piece in pieces])
        assert targets.tolist() == list(range(2, 22))
        assert max(map(len, pieces)) <= size


# ---- weights by surprise -----------------------------------------------------------------------------------------------


def answered(loaded, request: list[int], answer: list[int], name: str = "") -> Row:  # type: ignore[no-untyped-def]
    """A row with loss on `answer` and the end of the turn."""
    ids = [*request, *answer, loaded.chat.end_token_ids[0]]
    weights = [0.0] * len(request) + [1.0] * (len(answer) + 1)
    return Row(np.asarray(ids), np.asarray(weights, dtype=np.float32), name)


def test_weights_follow_the_surprise_at_the_answer_alone(tiny_model: Callable):
    loaded = tiny_model("qwen2")
    answers = [[40, 41, 42, 43, 44], [50, 51], [60]]
    made = [answered(loaded, [7, 8, 9], answer, str(index)) for index, answer in enumerate(answers)]
    weighed = weighed_by_surprise(loaded, made, 0.6, 64)

    surprises = []
    for answer in answers:
        with torch.no_grad():
            logprobs = torch.log_softmax(loaded.model(torch.tensor([answer])).logits[0].float(), -1)
        surprises.append([min(-float(logprobs[t - 1, answer[t]]), MAX_SURPRISE) for t in range(1, len(answer))])
    mean = sum(map(sum, surprises)) / sum(map(len, surprises))
    for row, before, surprise in zip(weighed, made, surprises):
        # The request has no loss; the answer's first token and the end of the turn keep their weight.
        expected = [0, 0, 0, 1, *(0.4 + 0.6 * each / mean for each in surprise), 1]
        np.testing.assert_allclose(row.weights, expected, rtol=1e-5)
        assert (row.name, row.input_ids.tolist()) == (before.name, before.input_ids.tolist())
        assert before.weights.max() == 1.0  # what came in is as it was
    assert sum(row.loss_weight for row in weighed) == pytest.approx(sum(row.loss_weight for row in made), rel=1e-6)


def test_a_word_is_as_rare_beside_a_request_that_holds_it(tiny_model: Callable):
    loaded = tiny_model("qwen2")
    answer = [40, 41, 42, 43]
    (bare,), (copied,) = (weighed_by_surprise(loaded, [answered(loaded, request, answer)], 1.0, 64) for request in ([7], answer))
    assert bare.weights[bare.weights > 0].tolist() == copied.weights[copied.weights > 0].tolist()


def test_an_answer_of_one_token_has_nothing_to_weigh(tiny_model: Callable):
    loaded = tiny_model("qwen2")
    (row,) = weighed_by_surprise(loaded, [answered(loaded, [7, 8], [40])], 1.0, 64)
    assert row.weights.tolist() == [0, 0, 1, 1]


def test_surprise_is_for_answers_that_are_learnt_as_they_are():
    with pytest.raises(ConfigError, match="surprise_weight"):
        parse({"train": {"surprise_weight": 0.5}, "objective": {"name": "orpo"}, "data": {"preferences": "pairs.jsonl"}})
    with pytest.raises(ConfigError, match="surprise_weight"):
        parse({"train": {"surprise_weight": 0.5}, "task": "classify"})
