"""Sections `method` (what moves), `objective` (what moves it) and `train` (how). None means: chosen from model and data
and printed with its reason."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from giong.config.base import Section


class MethodConfig(Section):
    name: Literal[
        "lora", "qlora", "full", "last_layers", "bias", "norm", "sparse", "bottleneck", "prompt_tuning", "prefix_tuning"
    ] = "lora"  # fmt: skip
    """`lora` trains low-rank updates of all linear layers, `qlora` the same over matrices frozen in 4 bits; `full` trains every weight,
    `last_layers` those of some decoder layers, `bias` the biases alone, `norm` the gains (and biases) of the norms alone, `sparse` single
    weights of the matrices, `bottleneck` small networks put behind attention and MLP, `prompt_tuning` the embeddings of virtual tokens
    before every text, and `prefix_tuning` their keys and values in every layer."""
    lora_r: int | None = Field(default=None, ge=1)
    """Rank of the update."""
    lora_alpha: float | None = Field(default=None, gt=0)
    """Scale of the update (divided by the rank, or by its root with `use_rslora`)."""
    lora_dropout: float | None = Field(default=None, ge=0, lt=1)
    """Dropout on the input of the update."""
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """Names of the linear layers that get an update; the output head is never one of them."""
    use_rslora: bool = False
    """Whether the scale is divided by the root of the rank: a high rank then learns as fast as a low one (Kalajdzievski 2023)."""
    use_dora: bool = False
    """Whether the length of each row of a matrix is trained apart from its direction (Liu et al. 2024)."""
    init_lora_weights: Literal["default", "pissa"] = "default"
    """Where the update starts: at zero, or (`pissa`) at the largest singular values of each matrix, which then move (Meng et al. 2024)."""
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = {}
    """Other ranks for some layers, by their names or regular expressions: `{down_proj: 32, "layers.0.self_attn.q_proj": 4}`."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Other scales for some layers, as in `rank_pattern`."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """With `lora` and `qlora`: which of the model's biases move too: none, all (BitFit beside LoRA), or those of the layers with an update."""
    bias_lr_ratio: float = Field(default=1.0, gt=0)
    """How many times higher the learning rate of these biases is than that of the update."""
    loraplus_lr_ratio: float = Field(default=1.0, gt=0)
    """How many times higher the learning rate of B is than that of A: LoRA+ (Hayou et al. 2024), whose authors advise 16."""
    start_from: str | None = None
    """With `lora` and `qlora`: a model of the project, or a folder with a PEFT adapter, that training goes on from. Rank, scale and layers
    are then the adapter's."""
    num_virtual_tokens: int = Field(default=20, ge=1)
    """With `prompt_tuning` and `prefix_tuning`: how many virtual tokens stand before every text."""
    prompt_tuning_init_text: str | None = None
    """With them: the text that the virtual tokens start as, again and again where it is shorter; left out: random tokens."""
    num_layers: int = Field(default=2, ge=1)
    """With `last_layers`: how many decoder layers move."""
    layers_from: Literal["last", "first"] = "last"
    """With `last_layers`: the end they are counted from. What lies below the last ones is computed without a graph."""
    train_head: bool = False
    """With `last_layers`: whether the output head moves too; it cannot where it is the embedding matrix."""
    train_norms: bool = False
    """With `last_layers`: whether the norm behind the last layer moves too."""
    sparse_share: float = Field(default=0.01, gt=0, lt=1)
    """With `sparse`: the share of every matrix's weights that moves."""
    sparse_score: Literal["fisher", "gradient", "magnitude", "random"] = "fisher"
    """With `sparse`: what chooses them. `fisher` takes those with the largest sum of squared gradients over some training rows,
    `gradient` those with the largest summed gradient, `magnitude` the largest weights; `random` is the control."""
    sparse_rows: int = Field(default=64, ge=1)
    """With `sparse` by `fisher` or `gradient`: how many training rows the gradients are taken on, before training."""
    adapter_placement: Literal["houlsby", "pfeiffer"] = "houlsby"
    """With `bottleneck`: an adapter behind attention and one behind the MLP (`houlsby`), or behind the MLP alone (`pfeiffer`)."""
    adapter_size: int | None = Field(default=None, ge=1)
    """With `bottleneck`: width of an adapter. By default what `adapter_share` comes to."""
    adapter_share: float | None = Field(default=None, gt=0, lt=1)
    """With `bottleneck`: size of all adapters together as a share of the model's parameters, instead of `adapter_size`. By default
    0.036."""

    @model_validator(mode="after")
    def _one_size(self) -> MethodConfig:
        if self.adapter_size is not None and self.adapter_share is not None:
            raise ValueError("adapter_size and adapter_share say the same thing: give one of them")
        return self

    @model_validator(mode="after")
    def _pissa_stands_alone(self) -> MethodConfig:
        if self.init_lora_weights == "pissa" and (self.use_dora or self.lora_dropout):
            other = "use_dora" if self.use_dora else "lora_dropout"
            raise ValueError(f"init_lora_weights pissa does not go with {other}: its update holds the main part of each matrix")
        return self

    @model_validator(mode="after")
    def _biases_that_move_have_a_rate(self) -> MethodConfig:
        if self.bias_lr_ratio != 1.0 and self.bias == "none" and self.start_from is None:
            raise ValueError("bias_lr_ratio is for biases that move beside the update: set bias to all or lora_only, or leave it out")
        return self

    def record(self) -> dict[str, Any]:
        """The settings that this method reads: changing others trains nothing anew."""
        settings = self.model_dump(include={"name", *OF_METHOD.get(self.name, ())})
        # Runs from before there was a choice keep their key.
        return {
            name: value
            for name, value in settings.items()
            if (name, value) not in (("bias", "none"), ("bias_lr_ratio", 1.0), ("adapter_share", None))
        }


OF_LORA = {
    "lora_r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora", "init_lora_weights", "rank_pattern",
    "alpha_pattern", "bias", "bias_lr_ratio", "loraplus_lr_ratio",
}  # fmt: skip
OF_METHOD = {
    "lora": OF_LORA, "qlora": OF_LORA, "last_layers": {"num_layers", "layers_from", "train_head", "train_norms"},
    "sparse": {"sparse_share", "sparse_score", "sparse_rows"}, "bottleneck": {"adapter_placement", "adapter_size", "adapter_share"},
    **{name: {"num_virtual_tokens", "prompt_tuning_init_text"} for name in ("prompt_tuning", "prefix_tuning")},
}  # fmt: skip
"""Settings that the named methods alone read; elsewhere they are no part of a run's record."""
NOT_MERGED = ("bottleneck",)
"""Methods whose model cannot be written as a plain one."""
WRITERS_ONLY = ("prompt_tuning", "prefix_tuning", "qlora")
"""Methods whose models are loaded to write and for nothing else."""

OF_OBJECTIVE = {
    "dpo": {"beta", "dpo_loss", "label_smoothing", "length_alpha"}, "orpo": {"beta"}, "simpo": {"beta", "simpo_gamma"},
    "reward": {"center_rewards"}, "kto": {"beta", "desirable_weight", "undesirable_weight"},
    "grpo": {"beta", "num_generations", "temperature", "max_new_tokens", "rewards", "reward_model", "num_updates", "clip_epsilon"},
    "rloo": {"beta", "num_generations", "temperature", "max_new_tokens", "rewards", "reward_model"},
    "ppo": {
        "beta", "num_generations", "temperature", "max_new_tokens", "rewards", "reward_model", "num_updates", "clip_epsilon", "value_weight",
        "value_clip", "value_learning_rate", "gamma", "gae_lambda",
    },
    "distill": {"teacher", "teacher_share", "on_policy_share", "temperature", "max_new_tokens"},
}  # fmt: skip
"""Settings that the named objectives alone read; elsewhere they are no part of a run's record."""
BETA = {"dpo": 0.1, "orpo": 0.1, "simpo": 2.0, "kto": 0.1, "grpo": 0.04, "rloo": 0.05, "ppo": 0.05}
"""What `objective.beta` is where nobody says."""
NUM_UPDATES = {"grpo": 1, "ppo": 4}
"""What `objective.num_updates` is where nobody says; other objectives see what was drawn once."""
LEARNS_FROM = {"dpo": "pairs", "orpo": "pairs", "simpo": "pairs", "reward": "pairs", "kto": "ratings"}
"""What an objective learns from, other than the author's examples."""
ONLINE = ("grpo", "rloo", "ppo")
"""Objectives that learn from rewards of answers which the model draws while it is trained."""
RewardName = Literal["style", "key_recall", "chrf", "ends", "repetition", "length", "copying", "reward_model"]


class ObjectiveConfig(Section):
    name: Literal["sft", "pretrain", "dpo", "orpo", "simpo", "kto", "reward", "grpo", "rloo", "ppo", "distill"] = "sft"
    """`sft` learns the answer and its end-of-turn token; `pretrain` learns raw text, documents kept apart; `dpo`, `orpo` and `simpo`
    learn from pairs of answers which one is preferred; `kto` from single answers that are wanted or not; `reward` makes a model that scores answers; `grpo`, `rloo` and `ppo` learn from rewards of
    answers that the model draws itself; `distill` learns from the distributions of a larger model."""
    loss_on: Literal["answers", "last_answer", "all"] = "answers"
    """With `sft` and `distill`: what of a conversation carries loss: all assistant's turns (each with its `weight`), the last one, or every token."""
    beta: float | None = Field(default=None, gt=0)
    """With `dpo` and `kto`: how strongly the model is held where it was. With `orpo`: the weight of the comparison beside the answer's likelihood. With
    `simpo`: the scale of rewards. With `grpo`, `rloo` and `ppo`: the weight of the divergence from the model as training began. None is the
    objective's own: 0.1, 0.1, 0.1, 2, 0.04, 0.05 and 0.05."""
    dpo_loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """With `dpo`: `sigmoid` is the original loss; `ipo` stops pulling two answers apart once they are far enough."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """With `dpo` and the sigmoid loss: the share of pairs that are taken to be labelled the wrong way round (conservative DPO)."""
    length_alpha: float = Field(default=1.0, ge=0, le=1)
    """With `dpo`: what the tokens beyond the length of the shorter answer count (LD-DPO); 1 counts all alike."""

    simpo_gamma: float = Field(default=1.0, ge=0)
    """With `simpo`: by how much the chosen answer's reward has to be larger."""

    desirable_weight: float = Field(default=1.0, ge=0)
    """With `kto`: what a wanted answer counts."""
    undesirable_weight: float = Field(default=1.0, ge=0)
    """With `kto`: what another one counts; the two weights times their numbers should be alike."""
    center_rewards: float = Field(default=0.0, ge=0)
    """With `reward`: how strongly the two scores of a pair are kept around 0; 0.01 is a usual value."""
    num_generations: int = Field(default=4, ge=2)
    """With `grpo`, `rloo` and `ppo`: answers drawn for each request; `train.batch_rows` counts requests."""
    temperature: float = Field(default=1.0, gt=0)
    """Where answers are drawn: the temperature at which answers are drawn. At another one than 1 they are not quite the model's own."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """How long a drawn answer may become; by default as long as in the evaluation."""
    rewards: dict[RewardName, float] = {"style": 1.0, "key_recall": 1.0, "ends": 0.5, "repetition": 1.0, "length": 0.25}
    """With `grpo`, `rloo` and `ppo`: what an answer is rewarded for, with weights: `style` (the verifier, up to the author's own level),
    `key_recall`, `chrf` (likeness to the author's answer), `ends`; `repetition`, `length` and `copying` are penalties. `reward_model` is the score of `reward_model`."""
    reward_model: str | None = None
    """With `grpo`, `rloo` and `ppo`: a reward model, by its name in `reward_models/` or by the path of its folder, relative to giong.yaml; it
    counts with the weight `reward_model` among `rewards`."""
    num_updates: int | None = Field(default=None, ge=1)
    """With `grpo` and `ppo`: updates made with the same drawn answers; None is 1 and 4."""
    clip_epsilon: float = Field(default=0.2, gt=0, lt=1)
    """With `grpo` or `ppo` and several updates: how far a token's probability may move before it no longer counts."""

    value_weight: float = Field(default=0.5, gt=0)
    """With `ppo`: the weight of the value's squared error beside the policy's loss."""
    value_clip: float = Field(default=0.2, gt=0)
    """With `ppo`: how far a token's value may move, in units of the reward, before moving on towards the return no longer counts."""
    value_learning_rate: float = Field(default=0.01, gt=0)
    """With `ppo`: peak learning rate of the value head, which starts out expecting the same everywhere."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """With `ppo`: what a reward counts one token before it comes."""
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """With `ppo`: how far advantages look ahead before they trust the value: 1 sees all that came (noise), 0 the next token (bias)."""
    teacher: str | None = None
    """With `distill`: the folder of the model to learn from, with the same tokenizer, relative to giong.yaml."""
    teacher_share: float = Field(default=0.5, gt=0, le=1)
    """With `distill`: the share of the loss that is the divergence from the teacher; the rest is that of `sft`."""
    on_policy_share: float = Field(default=0.0, ge=0, le=1)
    """With `distill`: the share of the steps that learn from answers which the model draws itself, and from the teacher alone."""

    @model_validator(mode="after")
    def _distill_has_a_teacher(self) -> ObjectiveConfig:
        if self.name == "distill" and self.teacher is None:
            raise ValueError("distill learns from a larger model: name its folder in teacher")
        return self

    @model_validator(mode="after")
    def _smoothing_has_a_loss(self) -> ObjectiveConfig:
        if self.dpo_loss == "ipo" and self.label_smoothing:
            raise ValueError("label_smoothing goes with dpo_loss sigmoid: leave it out with ipo")
        return self

    @model_validator(mode="after")
    def _reward_model_has_weight(self) -> ObjectiveConfig:
        if (self.reward_model is None) == ("reward_model" in self.rewards):
            raise ValueError(
                "reward_model and its weight go together: name the model in reward_model, and give rewards.reward_model a number"
            )
        return self

    @property
    def is_online(self) -> bool:
        """Whether the model draws the answers that it learns from."""
        return self.name in ONLINE or (self.name == "distill" and self.on_policy_share > 0)

    @property
    def couples_rows(self) -> bool:
        """Whether the loss of a row depends on the others of its step, which then share one pass."""
        return self.name == "kto"

    @property
    def learns_from(self) -> str:
        """`examples` (the author's answers to synthesised requests), `pairs` or `ratings` (of `data.preferences`)."""
        return LEARNS_FROM.get(self.name, "examples")

    @property
    def judged(self) -> str:
        """What the learning rate follows from: `examples` are copied, anything else is compared or rewarded."""
        return "drawn answers" if self.name in ONLINE else self.learns_from

    @property
    def other_aim(self) -> str:
        """Why the likelihood of the author's answers, by which `size` forecasts and `sweep` chooses, says little here; empty where it is
        what the objective raises."""
        if self.judged == "examples":
            return ""
        return f"{self.name} learns from {self.judged}, and the likelihood of the author's answers does not tell how well"

    def resolved(self) -> ObjectiveConfig:
        """The same with the objective's own beta and number of updates where none is given."""
        updates = self.num_updates or NUM_UPDATES[self.name] if self.name in NUM_UPDATES else 1
        return self.model_copy(update={"beta": self.beta or BETA.get(self.name), "num_updates": updates})

    def record(self) -> dict[str, Any]:
        """The settings that this objective reads."""
        foreign = set().union(*OF_OBJECTIVE.values()) - OF_OBJECTIVE.get(self.name, set())
        # Runs from before there was a choice keep their key.
        unused = {name for name in ("loss_on", "reward_model") if getattr(self, name) == type(self).model_fields[name].default}
        return self.resolved().model_dump(exclude=foreign | unused)


class PseudoConfig(Section):
    requests: str
    """A .jsonl file of requests without answers, relative to giong.yaml: `request` (a text, put as the training requests are) or `messages`."""
    rounds: int = Field(default=1, ge=1)
    """How often the tuned model answers them and is trained anew, from the base, on the author's rows and on what was kept."""
    min_confidence: float = Field(default=-1.0, le=0)
    """Mean log-probability per token, nats, that the model has to give its own answer. The gates have to pass too."""


class TrainConfig(Section):
    learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate."""
    num_epochs: float | None = Field(default=None, gt=0)
    """Passes over the training rows."""
    batch_rows: int = Field(default=8, ge=1)
    """Rows per optimizer step; with preferences, pairs."""
    max_tokens_per_pack: int = Field(default=2048, ge=64)
    """Rows are packed into forward passes of at most this many tokens, or on a CPU into two at a time of half as many; it changes memory
    and speed, and the result by rounding alone (with `lora_dropout` also by what is dropped). A run that was stopped or killed goes on with a lower value,
    never with a higher one."""
    activation_checkpointing: Literal["auto", "none", "all"] | Annotated[int, Field(ge=0)] = "auto"
    """How many decoder layers compute their activations a second time instead of keeping them; `auto` takes as few as fit into
    memory. It changes memory and speed, never a number."""
    activation_offload: Literal["auto"] | bool = "auto"
    """Whether a GPU's activations wait in the host's memory; `auto` does so where nothing else fits. Nothing changes on a CPU."""
    compile: Literal["auto"] | bool = "auto"
    """Whether element-wise operations are compiled (about half a minute, for a few percent of speed). `auto` does so on a CPU, for runs that
    earn it back twice over: a quarter of an hour at widths up to 512, an hour and a half up to 896, never beyond, nor where two passes are
    computed side by side (which gains more), nor where a task other than `generate` says nothing of its time. Where compiling fails the run goes on without. What was done is part of the run's record."""
    num_processes: int = Field(default=1, ge=1)
    """Processes of this machine that share the rows of each step, one per GPU; giong starts them with torchrun. It changes speed
    and memory, and the result by rounding alone (with `lora_dropout` also by what is dropped)."""
    warmup_share: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps over which the learning rate rises."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls afterwards."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`muon` orthogonalises the update of weight matrices (full training only)."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay of matrices; gains and biases are never decayed."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm."""
    seed: int = 0
    """Seed of initialisation, order and dropout."""
    save_seconds: float = Field(default=120.0, gt=0)
    """A checkpoint is written at least this often."""
    save_steps: int | None = Field(default=None, ge=1)
    """A checkpoint is also written every so many steps."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Newest checkpoints kept; the best one beside them, where validation is measured."""
    eval_steps: int | None = Field(default=None, ge=1)
    """Every so many steps, and at the end, the loss on the validation documents (the calibration side of the split, never trained
    on) is measured and a checkpoint is written."""
    load_best_model_at_end: bool = False
    """Whether the weights with the lowest validation loss become the model, instead of the last ones; needs `eval_steps`."""
    replay_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of the loss that general text makes up, mixed in among the rows; the run gets longer by it. Against forgetting."""
    replay_path: str | None = None
    """The file or folder with that text (.txt, .md, .html, .csv or .jsonl with `text`; relative to giong.yaml); by default English prose from
    the documentation inside the Python installation."""
    kl_weight: float = Field(default=0.0, ge=0)
    """Weight of the divergence KL(base || tuned) of the next token, nats, added to the loss at every position that has one (a run
    that goes on from an adapter is held to that). A step takes about half as long again. Against forgetting."""
    l2_to_base: float = Field(default=0.0, ge=0)
    """Decoupled pull of every moving weight back to where it started; for methods that move the model's own weights. (With an adapter
    `weight_decay` is that pull: its update decays to zero, which is the base.) Against forgetting."""
    neftune_noise_alpha: float | None = Field(default=None, gt=0)
    """Uniform noise on the embeddings of the trained rows, alpha / sqrt(tokens x width); 5 is its authors' first choice. Against
    memorising."""
    surprise_weight: float = Field(default=0.0, ge=0, le=1)
    """How much more a token of an answer counts the more the answer, without its request, surprises the untuned base: 0 all alike, 1 in
    proportion. Against bland answers; for objective `sft`."""
    early_stopping_patience: int | None = Field(default=None, ge=1)
    """Stop after so many evaluations in a row without a lower validation loss; needs `eval_steps`."""
    early_stopping_memorisation: float | None = Field(default=None, ge=0, lt=1)
    """Stop once the share of 8-token runs that the model would write by itself is higher by this on trained rows than on the validation
    documents (0.02 is a sensible limit); needs `eval_steps`."""
    pseudo: PseudoConfig | None = None
    """Semi-supervised training: answers of the tuned model to requests without one, where it is sure, as further training rows."""
    fsdp: bool = True
    """With several processes and all weights trained: spread them over the processes. False keeps a whole model in each, which is faster
    where it fits."""

    @model_validator(mode="after")
    def _best_is_measured(self) -> TrainConfig:
        if self.load_best_model_at_end and self.eval_steps is None:
            raise ValueError("load_best_model_at_end needs eval_steps: without validation no checkpoint is the best")
        for name in ("early_stopping_patience", "early_stopping_memorisation"):
            if getattr(self, name) is not None and self.eval_steps is None:
                raise ValueError(f"{name} needs eval_steps: nothing is measured on the way without it")
        if self.replay_path and not self.replay_share:
            raise ValueError("replay_path is not used without replay_share: say how much of the loss it shall make up")
        return self


OF_THE_DAY = (
    "max_tokens_per_pack", "activation_checkpointing", "activation_offload", "num_processes", "save_seconds", "save_steps",
    "keep_checkpoints",
)  # fmt: skip
"""Settings of `train` that no result depends on but by rounding (and, with a dropout, by what is dropped): the records of runs leave them
out, and a run that goes on takes those of the day."""

IN_KEYS = {"max_tokens_per_pack": 2048}
"""What stands in the keys of runs for them: those of finished runs with the default have it there, and a run is found by its key whatever
the size of its packs."""
