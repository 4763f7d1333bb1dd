"""What TRL's own trainers make of fixed numbers: the oracle of `parity/test_trl_oracle.py`, recorded in golden/trl_objectives.json, and of
`parity/test_trl_trajectory.py`, in golden/trl_trajectory.json.

`PYTHONPATH=src python tests/trl_oracle.py` records anew, in an environment that has TRL; the tests compare without one.

One decision a reader may question: TRL's losses are methods of trainers, which load a model and a data set. Here a trainer is an object of
TRL's class that never met its constructor, with the settings that the loss reads, and its model answers with given log-probabilities. What
runs is TRL's code from the log-probabilities of tokens to the loss. The trajectories are of whole trainers: TRL's data, collator, loss over
accumulated batches, optimizer and clipping, on the tiny twin that the tests load.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from golden_environment import environment

GOLDEN = Path(__file__).parent / "golden" / "trl_objectives.json"
SEED = 16
LENGTHS = (4, 7, 9, 2, 5, 5)
"""Tokens of six answers: the chosen and the rejected ones of three pairs by turns."""
WANTED = (1, 0, 1)
"""Of the first, third and fifth answer; the others stand for answers put to a stranger's request (`kto`)."""
VOCABULARY = 7

_generator = np.random.default_rng(SEED)
LOGPROBS, REFERENCE = (-_generator.gamma(2.0, size=sum(LENGTHS)) for _ in range(2))
OLD = LOGPROBS + _generator.normal(0, 0.25, sum(LENGTHS))
"""When the answers were drawn: near enough that some tokens are within the clip and some are not."""
ADVANTAGES, SCORES = (_generator.normal(size=len(LENGTHS)) for _ in range(2))
MARGINS = (0.7, 0.0, 1.5)
LOGITS, TEACHER_LOGITS = (_generator.normal(0, 2, (5, VOCABULARY)) for _ in range(2))


def given(values: np.ndarray) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


class Told(torch.nn.Module):
    """In the place of a model: answers, row by row, with the log-probabilities of the answer whose number is the row's first token."""

    is_gradient_checkpointing = False

    def __init__(self, logprobs_N: torch.Tensor) -> None:
        super().__init__()
        self.answers = logprobs_N.split(LENGTHS)

    def forward(
        self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None, **_: Any
    ) -> SimpleNamespace:
        """As TRL's fused head, where there are labels; otherwise logits over two tokens, of which the answers are made of the first."""
        shown = (attention_mask if labels is None else labels != -100)[:, 1:].bool()
        told_N = torch.cat([self.answers[number] for number in input_ids[:, 0]])
        log_probs = told_N.new_zeros(shown.shape).masked_scatter(shown, told_N)
        if labels is None:
            behind = torch.nn.functional.pad(log_probs.masked_fill(~shown, -1.0), (0, 1), value=-1.0)
            return SimpleNamespace(logits=torch.stack([behind, torch.log1p(-behind.exp())], -1))
        unread = torch.zeros_like(log_probs)
        return SimpleNamespace(log_probs=log_probs, label_mask=shown, entropy=unread, mean_logits=unread, is_top1=unread.bool())


def batch_of(*answers: int) -> dict[str, torch.Tensor]:
    """These answers, padded, each behind one token of a request: its number."""
    width = 1 + max(LENGTHS[answer] for answer in answers)
    input_ids = torch.zeros(len(answers), width, dtype=torch.long)
    input_ids[:, 0] = torch.tensor(answers)
    attention_mask = (torch.arange(width) <= torch.tensor([[LENGTHS[answer]] for answer in answers])).long()
    return {"input_ids": input_ids, "attention_mask": attention_mask, "completion_mask": attention_mask * (torch.arange(width) > 0)}


def trainer_of(name: str, **settings: Any) -> Any:
    """A trainer of TRL's class `name` with these settings and no more."""
    import trl
    import trl.experimental.cpo
    import trl.experimental.gkd
    import trl.experimental.orpo

    module = {"CPOTrainer": trl.experimental.cpo, "ORPOTrainer": trl.experimental.orpo, "GKDTrainer": trl.experimental.gkd}.get(name, trl)
    trainer = object.__new__(getattr(module, name))
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), num_processes=1, parallelism_config=None, gather=lambda x: x, gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction: x,
    )  # fmt: skip
    metrics: dict[str, Any] = {"train": defaultdict(list)}
    vars(trainer).update(
        accelerator=accelerator, aux_loss_enabled=False, _metrics=metrics, _total_train_tokens=0, _tp_size=1, model=Told(given(LOGPROBS)),
        **settings,
    )  # fmt: skip
    return trainer


def sft_trainer() -> Any:
    args = SimpleNamespace(loss_type="nll", average_tokens_across_devices=False)
    return trainer_of("SFTTrainer", compute_loss_func=None, label_smoother=None, args=args)


def sft(logprobs_N: torch.Tensor) -> torch.Tensor:
    batch = batch_of(*range(len(LENGTHS)))
    labels = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, -100)
    return sft_trainer().compute_loss(Told(logprobs_N), {**batch, "labels": labels})


def dpo_trainer(reference: Any, loss_type: str = "sigmoid", **settings: Any) -> Any:
    return trainer_of(
        "DPOTrainer", ref_model=reference, precompute_ref_logps=False, f_divergence_type="reverse_kl", use_weighting=False,
        loss_types=[loss_type], loss_weights=[1.0], args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        **{"ld_alpha": None, "label_smoothing": 0.0, **settings},
    )  # fmt: skip


def dpo(logprobs_N: torch.Tensor, loss_type: str = "sigmoid", one_by_one: bool = False, **settings: Any) -> torch.Tensor:
    trainer = dpo_trainer(Told(given(REFERENCE)), loss_type, **settings)
    batches = [batch_of(0, 1), batch_of(2, 3), batch_of(4, 5)] if one_by_one else [batch_of(0, 2, 4, 1, 3, 5)]
    return torch.stack([trainer._compute_loss(Told(logprobs_N), batch, False) for batch in batches]).mean()


def kto(logprobs_N: torch.Tensor, **settings: Any) -> torch.Tensor:
    trainer = trainer_of(
        "KTOTrainer", ref_model=Told(given(REFERENCE)), precompute_ref_logps=False, calculate_KL=True, loss_type="kto",
        args=SimpleNamespace(gradient_checkpointing_kwargs=None), **settings,
    )  # fmt: skip
    strangers = {f"KL_{name}": tensor for name, tensor in batch_of(1, 3, 5).items()}
    return trainer._compute_loss(Told(logprobs_N), {**batch_of(0, 2, 4), **strangers, "label": torch.tensor(WANTED)}, False)


def without_reference(logprobs_N: torch.Tensor, name: str, **settings: Any) -> torch.Tensor:
    """`orpo` and `simpo`, pair by pair, because TRL's likelihood beside the comparison is a mean over the tokens of the batch."""
    trainer, losses = trainer_of(name, is_encoder_decoder=False, pad_token_id=0, padding_value=0, **settings), []
    for pair in ((0, 1), (2, 3), (4, 5)):
        batch = {}
        for side, answer in zip(("chosen", "rejected"), pair):
            one = batch_of(answer)
            labels = one["input_ids"].masked_fill(one["completion_mask"] == 0, -100)
            batch |= {f"{side}_input_ids": one["input_ids"], f"{side}_attention_mask": one["attention_mask"], f"{side}_labels": labels}
        losses.append(trainer.get_batch_loss_metrics(Told(logprobs_N), batch)[0])
    return torch.stack(losses).mean()


def reward(scores_R: torch.Tensor, centre: float | None = None, margins: tuple[float, ...] | None = None) -> torch.Tensor:
    trainer = trainer_of("RewardTrainer", args=SimpleNamespace(center_rewards_coefficient=centre))
    inputs = batch_of(0, 2, 4, 1, 3, 5) | ({} if margins is None else {"margin": torch.tensor(margins, dtype=torch.float64)})
    return trainer.compute_loss(lambda input_ids, **_: SimpleNamespace(logits=scores_R[input_ids[:, 0]][:, None]), inputs)


def drawn(logprobs_N: torch.Tensor, name: str, inputs: Callable[[Callable], dict[str, torch.Tensor]], **settings: Any) -> torch.Tensor:
    """`grpo` and `rloo` on all six answers; `inputs` are made with what pads the numbers of tokens."""
    batch = batch_of(*range(len(LENGTHS)))
    mask = batch["completion_mask"][:, 1:]

    def padded(values_N: torch.Tensor) -> torch.Tensor:
        return values_N.new_zeros(mask.shape).masked_scatter(mask.bool(), values_N)

    trainer = trainer_of(
        name, epsilon_low=0.2, epsilon_high=0.2, current_gradient_accumulation_steps=1,
        _get_per_token_logps_and_entropies=lambda *_, **__: (padded(logprobs_N), torch.zeros_like(mask).double(), None), **settings,
    )  # fmt: skip
    ids = {"prompt_ids": batch["input_ids"][:, :1], "completion_ids": batch["input_ids"][:, 1:]}
    masks = {"prompt_mask": batch["attention_mask"][:, :1], "completion_mask": mask}
    return trainer._compute_loss(None, {**ids, **masks, "advantages": given(ADVANTAGES), **inputs(padded)})


def grpo(logprobs_N: torch.Tensor, beta: float) -> torch.Tensor:
    args = SimpleNamespace(delta=None, use_bias_correction_kl=False)
    return drawn(
        logprobs_N, "GRPOTrainer",
        lambda padded: {"old_per_token_logps": padded(given(OLD)), "ref_per_token_logps": padded(given(REFERENCE))},
        beta=beta, loss_type="grpo", importance_sampling_level="token", top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        use_vllm=False, _entropy_bonus_enabled=False, args=args,
    )  # fmt: skip


def rloo(logprobs_N: torch.Tensor) -> torch.Tensor:
    """In the first update after the draw, where the ratio to the answer's probability then is 1."""
    return drawn(logprobs_N, "RLOOTrainer", lambda padded: {"old_logps": padded(given(LOGPROBS)).sum(1)})


def distill(logits_NV: torch.Tensor) -> torch.Tensor:
    """TRL's generalised divergence at its end beta 0, KL(teacher || student), per token."""
    return type(trainer_of("GKDTrainer")).generalized_jsd_loss(logits_NV, given(TEACHER_LOGITS), beta=0, num_items_in_batch=len(LOGITS))


ORACLES: dict[str, tuple[np.ndarray, Callable[[torch.Tensor], torch.Tensor]]] = {
    "sft": (LOGPROBS, sft),
    "dpo": (LOGPROBS, lambda given_N: dpo(given_N, beta=0.3)),
    "dpo, ipo": (LOGPROBS, lambda given_N: dpo(given_N, "ipo", beta=0.3)),
    # TRL's sigmoid loss leaves label_smoothing unread; its `aot` has the conservative formula, and of one pair it sorts nothing.
    "dpo, conservative": (LOGPROBS, lambda given_N: dpo(given_N, "aot", one_by_one=True, beta=0.3, label_smoothing=0.1)),
    "dpo, length-desensitised": (LOGPROBS, lambda given_N: dpo(given_N, beta=0.3, ld_alpha=0.4)),
    "kto": (LOGPROBS, lambda given_N: kto(given_N, beta=0.3, desirable_weight=1.2, undesirable_weight=0.7)),
    "orpo": (LOGPROBS, lambda given_N: without_reference(given_N, "ORPOTrainer", beta=0.3)),
    "simpo": (
        LOGPROBS,
        lambda given_N: without_reference(
            given_N, "CPOTrainer", loss_type="simpo", beta=2.0, simpo_gamma=0.7, label_smoothing=0.0, alpha=0.0, cpo_alpha=0.0
        ),
    ),
    "reward": (SCORES, reward),
    "reward, margin": (SCORES, lambda given_R: reward(given_R, margins=MARGINS)),
    "reward, centred": (SCORES, lambda given_R: reward(given_R, centre=0.1)),
    "grpo": (LOGPROBS, lambda given_N: grpo(given_N, beta=0.3)),
    "rloo": (LOGPROBS, rloo),
    "distill": (LOGITS, distill),
}  # fmt: skip
"""What each case is differentiated by, and TRL's loss of it."""


def valued(values: np.ndarray, loss: Callable[[torch.Tensor], torch.Tensor]) -> tuple[float, np.ndarray]:
    """A loss and its gradient at `values`."""
    at = given(values).requires_grad_()
    result = loss(at)
    result.backward()
    return float(result.detach()), at.grad.numpy()


def said() -> dict[str, dict[str, Any]]:
    """Loss and gradient of every case, by TRL."""
    found = {name: valued(*oracle) for name, oracle in ORACLES.items()}
    return {name: {"loss": loss, "gradient": gradient.tolist()} for name, (loss, gradient) in found.items()}


# ---- trajectories ----------------------------------------------------------------------------------------------------

TRAJECTORY = Path(__file__).parent / "golden" / "trl_trajectory.json"
PROMPT_AND_ANSWER = ((2, 3), (20, 13), (7, 10), (1, 1), (4, 22), (5, 4), (12, 28), (3, 9), (16, 5), (2, 5), (9, 2), (1, 15))
"""Tokens of the rows of a trajectory."""
NUM_STEPS, BATCH_ROWS, SHUFFLED_BY = 50, 4, 5
NUM_EPOCHS = NUM_STEPS / 3
"""An epoch of twelve rows is three steps of four."""
LEARNING_RATES = {"lora": 3e-3, "full": 1e-3}
WEIGHT_DECAY, MAX_GRAD_NORM = 0.1, 1.0
LORA = {"r": 4, "lora_alpha": 8.0, "lora_dropout": 0.0, "target_modules": "all-linear"}
LORA_SEED = 1


def rows_of_the_trajectory() -> list[tuple[np.ndarray, np.ndarray]]:
    """(token ids, whether each is of the answer) of every row."""
    from tiny_models import VOCAB_SIZE

    generator = np.random.default_rng(SEED)
    return [(generator.integers(0, VOCAB_SIZE, sum(shape)), np.repeat([0, 1], shape)) for shape in PROMPT_AND_ANSWER]


def trajectory(method: str, folder: Path) -> list[tuple[float, float]]:
    """Loss and gradient norm of every step of TRL's trainer in fp32, two rows at a time."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from tiny_models import save_model
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from giong.engine.packing import plan_steps

    model: Any = AutoModelForCausalLM.from_pretrained(save_model("llama", folder), dtype=torch.float32)
    if method == "lora":
        torch.manual_seed(LORA_SEED)
        model = get_peft_model(model, LoraConfig(**LORA, task_type="CAUSAL_LM"))
    rows = [{"input_ids": ids.tolist(), "completion_mask": mask.tolist()} for ids, mask in rows_of_the_trajectory()]
    steps = plan_steps(len(rows), BATCH_ROWS, NUM_EPOCHS, SHUFFLED_BY)
    args = SFTConfig(
        output_dir=str(folder / "out"), num_train_epochs=1, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, learning_rate=LEARNING_RATES[method], lr_scheduler_type="linear", warmup_steps=0, optim="adamw_torch",
        adam_beta2=0.95, weight_decay=WEIGHT_DECAY, max_grad_norm=MAX_GRAD_NORM, completion_only_loss=True, max_length=None,
        train_sampling_strategy="sequential", bf16=False, gradient_checkpointing=False, use_cpu=True, logging_steps=1, save_strategy="no",
        report_to="none", disable_tqdm=True,
    )  # fmt: skip
    # One long epoch, whose rows stand in the order of the engine's.
    assert [len(step) for step in steps] == NUM_STEPS * [BATCH_ROWS]
    data = Dataset.from_list(rows).select(np.concatenate(steps))
    trainer = SFTTrainer(model, args, train_dataset=data, processing_class=AutoTokenizer.from_pretrained(folder))
    trainer.train()
    # What the trainer logs is not rounded: transformers prints four digits, and keeps all.
    return [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]


def record(path: Path, **found: Any) -> None:
    path.write_text(json.dumps({"environment": environment("trl"), **found}) + "\n", encoding="utf-8")
    print(f"{path} is by TRL {environment('trl')['trl']}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    record(GOLDEN, cases=said())
    with tempfile.TemporaryDirectory() as folder:
        record(TRAJECTORY, loss_and_grad_norm={method: trajectory(method, Path(folder) / method) for method in LEARNING_RATES})
