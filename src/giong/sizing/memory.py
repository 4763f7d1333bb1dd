"""Peak memory of training and of generation, in bytes, part by part, from a model's shape alone.

The activation formula is not a rule of thumb such as 34 T D per layer (Korthikanti et al. 2022, 2205.05198, section 4.1),
which was made for 16-bit GPT layers and is a third too low for a gated MLP in bf16: it counts the tensors that autograd keeps
for the layers at hand, and the tests compare it with what autograd really keeps. Dropout is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from giong.contracts import ModelShape
from giong.sizing.shapes import linear_layers

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
FP32_BYTES = 4

RUNTIME_BYTES = 512 * 2**20
"""Python, torch and transformers before any weight: 0.39 GiB resident after a first step, rounded up."""

LOGITS_CHUNK_BYTES = 16 * 2**20
"""The head runs in chunks of this many bytes of fp32 logits; two such buffers (logits and a temporary) live at once."""

NUM_ADAM_STATES = 2
"""First and second moment (Kingma and Ba 2014, 1412.6980, algorithm 1)."""

CPU_ALLOCATOR_SHARES = {"full": 0.25, "lora": 0.8}
"""What the C library's allocator holds beside the tensors, as a share of activations and transients.

Measured as peak resident memory minus all other parts, on a 33 M Llama, glibc, packs of 512 to 4 096 tokens: 0.1 to 0.25 for
`full`, 0.6 to 0.85 for `lora`, whose many small products leave holes between the kept tensors. With large blocks mapped one by
one (MALLOC_MMAP_THRESHOLD_=1000000) it is nearly nothing.
"""

GPU_ALLOCATOR_SHARE = 0.1
"""The same for torch's caching allocator on a GPU. Not measured: a margin."""

USABLE_SHARE = 0.9
"""Share of a memory that a plan may fill; the rest is for other programs and for what the formula does not see."""


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Base of the two estimates: every field is a part in bytes; `total_bytes` is their sum."""

    runtime_bytes: int
    weights_bytes: int

    def parts(self) -> dict[str, int]:
        """The parts by name, in the order of the fields."""
        return {part.name: getattr(self, part.name) for part in fields(self)}

    @property
    def total_bytes(self) -> int:
        return sum(self.parts().values())


@dataclass(frozen=True, slots=True)
class TrainingMemory(MemoryEstimate):
    """Parts of the peak of a training step. It lies where the backward pass begins, when all activations are still held."""

    masters_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    logits_bytes: int
    transient_bytes: int
    allocator_bytes: int


@dataclass(frozen=True, slots=True)
class GenerationMemory(MemoryEstimate):
    """Parts of the peak of decoding a batch to its last token."""

    kv_cache_bytes: int
    activations_bytes: int
    logits_bytes: int


def fits(needed_bytes: float, memory_bytes: float) -> bool:
    """Whether a plan leaves a tenth of the memory free."""
    return needed_bytes <= USABLE_SHARE * memory_bytes


def dtype_bytes(dtype: str) -> int:
    """Bytes per number. Raises ValueError for an unknown number format."""
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPE_BYTES)}, not {dtype!r}")
    return DTYPE_BYTES[dtype]


def layer_activation_bytes_per_token(shape: ModelShape, dtype: str, method: str, row_tokens: int) -> int:
    """Bytes that autograd keeps per token in one decoder layer, rows packed end to end.

    `row_tokens` is the length of the longest row; only families that cap attention scores (Gemma 2) depend on it.
    """
    size = dtype_bytes(dtype)
    hidden, width = shape.hidden_size, shape.intermediate_size
    queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    log_normalisers = shape.num_attention_heads * FP32_BYTES
    if shape.model_type == "gpt2":
        # Per norm its input and its output (what the next matrix reads); the fused query, key, value; attention's output
        # twice (per row, and rows joined); tanh-GELU keeps four intermediates and the product that the next matrix reads.
        return size * (4 * hidden + 3 * hidden + 2 * hidden + 5 * width) + log_normalisers
    # Inputs of query/key/value and of gate/up; query, key and value (heads repeated), attention's output twice (per row, and
    # rows joined); gate, its activation, up, and the product that the down matrix reads.
    kept = size * (2 * hidden + 5 * queries + (4 if shape.gated_mlp else 3) * width) + log_normalisers
    norms = {"gemma2": 4, "gemma3_text": 4}.get(shape.model_type, 2) * hidden
    if shape.model_type in ("qwen3", "gemma3_text"):
        norms += queries + keys
    # A norm computes in fp32 and keeps its input; a gain that is trained needs the normalised input too (Gemma's in fp32).
    kept += FP32_BYTES * norms
    if method == "full":
        kept += norms * (FP32_BYTES if shape.model_type.startswith("gemma") else size)
    if shape.model_type == "gemma2":
        # Capped scores are written out: tanh's output and the shares in fp32, the shares again in the model's dtype.
        kept += shape.num_attention_heads * row_tokens * (2 * FP32_BYTES + size)
    return kept


def training_memory(
    shape: ModelShape,
    method: str,
    num_trainable: int,
    max_tokens_per_pack: int,
    dtype: str,
    *,
    max_row_tokens: int | None = None,
    gradient_checkpointing: bool = False,
    device: Literal["cpu", "gpu"] = "cpu",
    num_optimizer_states: int = NUM_ADAM_STATES,
) -> TrainingMemory:
    """Peak of one training step over packs of at most `max_tokens_per_pack` tokens.

    `max_row_tokens` is the longest row (by default a whole pack). Raises ValueError for an unknown method or dtype.
    """
    if method not in ("full", "lora"):
        raise ValueError(f"method must be `full` or `lora`, not {method!r}")
    size, tokens = dtype_bytes(dtype), max_tokens_per_pack
    hidden, width, vocab = shape.hidden_size, shape.intermediate_size, shape.vocab_size
    per_layer = tokens * layer_activation_bytes_per_token(shape, dtype, method, max_row_tokens or tokens)
    if gradient_checkpointing:
        # Only each layer's input stays; one layer at a time is computed again.
        activations = shape.num_hidden_layers * tokens * hidden * size + per_layer
    else:
        activations = shape.num_hidden_layers * per_layer
    logits_chunk = min(tokens * vocab * FP32_BYTES, max(LOGITS_CHUNK_BYTES, vocab * FP32_BYTES))
    # Beside the chunks: the hidden states that meet the head and their gradient, kept from forward to backward.
    logits = 2 * logits_chunk + 2 * tokens * hidden * size
    # The backward pass of a layer holds the gradients of its stream and of its MLP's inner tensors.
    transient = tokens * (hidden + 3 * width) * size
    if method == "full":
        # The head's gradient is summed in fp32, and the embedding's is dense.
        transient += vocab * hidden * (FP32_BYTES + size)
    allocator_share = CPU_ALLOCATOR_SHARES[method] if device == "cpu" else GPU_ALLOCATOR_SHARE
    # Adapter matrices lie in the model in fp32, beside the frozen weights in `dtype`.
    adapters = num_trainable * FP32_BYTES if method == "lora" else 0
    return TrainingMemory(
        runtime_bytes=RUNTIME_BYTES,
        weights_bytes=shape.num_parameters * size + adapters,
        masters_bytes=num_trainable * FP32_BYTES,
        gradients_bytes=num_trainable * FP32_BYTES,
        optimizer_bytes=num_trainable * FP32_BYTES * num_optimizer_states,
        activations_bytes=activations,
        logits_bytes=logits,
        transient_bytes=transient,
        allocator_bytes=round(allocator_share * (activations + transient)),
    )


def kv_cache_bytes_per_token(shape: ModelShape, dtype: str) -> int:
    """A key and a value per key-value head and layer. Windowed layers keep less on long texts, so this is an upper bound."""
    return 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * dtype_bytes(dtype)


def generation_memory(shape: ModelShape, dtype: str, *, num_sequences: int, tokens_per_sequence: int) -> GenerationMemory:
    """Peak of decoding `num_sequences` together, each of `tokens_per_sequence` tokens, request and answer together."""
    size, tokens = dtype_bytes(dtype), num_sequences * tokens_per_sequence
    widest = max(linear.out_features for linear in linear_layers(shape))
    return GenerationMemory(
        runtime_bytes=RUNTIME_BYTES,
        weights_bytes=shape.num_parameters * size,
        kv_cache_bytes=tokens * kv_cache_bytes_per_token(shape, dtype),
        # Reading the requests holds one layer: the stream, its norm and the MLP's inner tensors; nothing is kept behind.
        activations_bytes=tokens * (2 * shape.hidden_size + 3 * widest) * size,
        # One row of logits per sequence, and its softmax.
        logits_bytes=2 * num_sequences * shape.vocab_size * FP32_BYTES,
    )
