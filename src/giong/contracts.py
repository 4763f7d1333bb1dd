"""The shared nouns of giong, and the two things an arm of a comparison can be.

Everything above this file speaks in these words. The file imports the standard library only, so that every layer, on
either side of the torch line, may import it. `Predictor` and `Scorer` are protocols and not base classes: a prompt
around a remote model, a retrieval wrapper and a tuned local model have nothing to inherit from one another.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

Role = Literal["system", "user", "assistant", "tool"]
Side = Literal["train", "calibration", "test"]
FinishReason = Literal["stop", "length"]


SPARSE = {"sparse": True}
"""Metadata of a field that few rows have: left out of files, and of hashes, where it is at its default."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation, as OpenAI has it. `weight` is the loss weight of an assistant's turn.

    Each of `tool_calls` is `{"type": "function", "function": {"name": ..., "arguments": {...}}}`; a tool's turn is its answer.
    """

    role: Role
    content: str
    weight: float = field(default=1.0, metadata=SPARSE)
    tool_calls: Sequence[dict[str, Any]] = field(default=(), metadata=SPARSE)
    tool_call_id: str = field(default="", metadata=SPARSE)
    name: str = field(default="", metadata=SPARSE)

    def to_dict(self) -> dict[str, Any]:
        """What a chat template or an endpoint is given."""
        given = {"tool_calls": list(self.tool_calls), "tool_call_id": self.tool_call_id, "name": self.name}
        return {"role": self.role, "content": self.content, **{key: value for key, value in given.items() if value}}


@dataclass(frozen=True, slots=True)
class Document:
    """One piece of writing as imported: what only the author wrote, with its title and date (ISO 8601) if known."""

    id: str
    text: str
    title: str = ""
    date: str = ""
    source: str = ""


@dataclass(frozen=True, slots=True)
class Passage:
    """A part of a document, of the length that a model is asked to write. `index` counts from 0 within the document."""

    id: str
    document_id: str
    index: int
    text: str
    title: str = ""
    date: str = ""


def request_text(messages: Sequence[Message]) -> str:
    """What the user says in a conversation, its turns joined."""
    return "\n".join(turn.content for turn in messages if turn.role == "user")


@dataclass(frozen=True, slots=True)
class Example:
    """A request and the author's own answer: one row of training or of a test.

    `answer` is byte-equal to the author's passage. `kind` names the synthesis that made the request. A conversation with tools is a row
    of training alone: its `messages` are the whole of it, and `answer` is empty. `json_schema` is what its row asks the answer to meet.
    """

    id: str
    document_id: str
    kind: str
    messages: tuple[Message, ...]
    answer: str
    side: Side = "train"
    source: str = ""
    tools: Sequence[dict[str, Any]] = field(default=(), metadata=SPARSE)
    json_schema: dict[str, Any] | None = field(default=None, metadata=SPARSE)

    @property
    def conversation(self) -> tuple[Message, ...]:
        """The request followed by the answer as the assistant's turn."""
        return (*self.messages, Message("assistant", self.answer)) if self.answer else self.messages


@dataclass(frozen=True, slots=True)
class Preference:
    """Two answers to one request, the chosen one first. `margin` says by how much it is better, 0 where nobody said."""

    id: str
    messages: tuple[Message, ...]
    chosen: str
    rejected: str
    margin: float = 0.0


@dataclass(frozen=True, slots=True)
class Rating:
    """One answer to a request, and whether it is wanted."""

    id: str
    messages: tuple[Message, ...]
    answer: str
    label: bool


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn. `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `no_repeat_ngram_size` 0 switch those filters off.

    `repetition_penalty` divides (or multiplies, if negative) the logits of tokens already *generated*, never those of
    the request, because a rewrite has to repeat its request (Keskar et al. 2019, 1909.05858, section 4.1). In the same way no run of
    `no_repeat_ngram_size` tokens comes twice in an answer, whatever the request holds (Paulus et al. 2017, 1705.04304, section 2.5).
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    max_new_tokens: int = 256
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Request:
    """What an arm is asked: the turns so far, and (optionally) its own sampling; None means the arm's defaults."""

    id: str
    messages: tuple[Message, ...]
    sampling: Sampling | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """What an arm answered. `finish_reason` "stop" means that it ended by itself."""

    text: str
    finish_reason: FinishReason = "stop"
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    seconds: float = 0.0
    cost_usd: float = 0.0


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """A text whose tokens are to be scored; with `messages`, as the assistant's answer to them (end of turn included)."""

    text: str
    messages: tuple[Message, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Log-probabilities (nats) of the scored tokens in order, and the number of UTF-8 bytes that they spell."""

    logprobs: tuple[float, ...]
    num_bytes: int

    @property
    def nll(self) -> float:
        """Negative log-likelihood, nats, summed over the tokens."""
        return -sum(self.logprobs)


OnProgress = Callable[[int, int], None]
"""Called with (done, total) while a long call goes on."""


@runtime_checkable
class Predictor(Protocol):
    """Requests in, texts out. Replies come in the order of the requests."""

    name: str

    def predict(self, requests: Sequence[Request], on_progress: OnProgress | None = None) -> list[Reply]: ...


@runtime_checkable
class Scorer(Protocol):
    """Texts in, token log-probabilities out, in the order of the requests."""

    def score(self, requests: Sequence[ScoreRequest], on_progress: OnProgress | None = None) -> list[TokenScores]: ...


@dataclass(frozen=True, slots=True)
class LossSum:
    """What an objective returns: sums, never means, so that the engine can divide once by the global weight.

    `loss_sum` and `weight_sum` are 0-dimensional tensors, `loss_sum` with a graph; `metrics` are detached sums.
    """

    loss_sum: Any
    weight_sum: Any
    metrics: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The numbers of a decoder that memory, time and cost follow from. `num_parameters` counts tied weights once.

    The counts after `gated_mlp` are parts of it: one decoder layer, the output head (0 where it is the embedding matrix), the norm
    behind the last layer, the gains and biases of all norms, and all biases, those of norms among them. `linears` is the name, input
    and output width of each matrix of a layer, where they were counted on the model and do not follow from its family;
    `biased_linears` are the names of those with a bias.
    """

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    num_parameters: int
    gated_mlp: bool = True
    num_layer_parameters: int = 0
    num_head_parameters: int = 0
    num_final_norm_parameters: int = 0
    num_norm_parameters: int = 0
    num_bias_parameters: int = 0
    linears: tuple[tuple[str, int, int], ...] = ()
    biased_linears: tuple[str, ...] = ()


RUN_STEPS = ("import", "synth", "baseline", "size", "train", "eval", "report")
"""The story that `giong run` walks. Exporting is a decision of its own."""
TASK_STEPS = {
    "generate": RUN_STEPS,
    "classify": ("import", "baseline", "train", "eval", "report"),
    "embed": ("import", "baseline", "train", "eval", "report"),
    "mlm": ("import", "train", "eval", "report"),
}
"""And that of every `task`."""
TRAINING_STEPS = frozenset({"size", "train", "sweep", "method-trial", "objective-trial"})
"""Steps that train, which several processes can share."""

SAME_REQUEST_SECONDS = 2.0
"""Signals that reach a worker within this time are one request to stop. `systemctl stop` and `scancel` signal every process of a job: the
worker, and whoever has started it and passes on what it got itself."""

EventKind = Literal["stage_started", "progress", "step", "checkpoint", "stage_finished", "stage_skipped", "notice", "result", "error"]


@dataclass(frozen=True, slots=True)
class Event:
    """One line of the stream that feeds the terminal, the events file and (later) SSE and the job store.

    `stage` is the verb it belongs to ("train", "baseline/few_shot"). `data` is JSON-able; for "progress" it holds
    `done`, `total` and `unit`; for "step" the named figures of a training step; for "error" an `ErrorRecord`'s fields.
    """

    kind: EventKind
    stage: str
    message: str = ""
    data: dict[str, Any] = field(default_factory=dict)
    time: float = field(default_factory=time.time)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


Emit = Callable[[Event], None]
