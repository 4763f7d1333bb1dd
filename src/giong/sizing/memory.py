"""Peak memory of training and of generation, in bytes, part by part, from a model's shape alone.

The activation formula is not a rule of thumb such as 34 T D per layer (Korthikanti et al. 2022, 2205.05198, section 4.1): it counts
the tensors that the engine's layers keep for the backward pass, and the tests compare it with what autograd really keeps.
`benchmarks/estimates.py` compares the whole with the peak memory of real steps.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from giong.config import MethodConfig
from giong.contracts import ModelShape
from giong.sizing.moving import DIFFERENCES, SOFT_PROMPTS, moving
from giong.sizing.shapes import FAMILIES, LOW_RANK, adapter_size_of, linear_layers, num_bottlenecks, settings_of

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
FP32_BYTES = 4

INDEX_BYTES = 4
"""Where in its matrix a single weight stands."""

RUNTIME_BYTES = 490 * 10**6
"""Python, torch, transformers and PEFT before any weight: 0.49 GB resident. What a process has already is measured where it can be."""

PACK_KERNEL_BYTES = {"low rank": 17 * 10**6, "other": 11 * 10**6}
"""Code and descriptions that oneDNN keeps for the products of a pack in bf16, for each length that packs are rounded to: measured as what
the heap and executable pages grow by at a new length, alike for the bundled shape and 135M. Two more matrices beside each make more."""

ROW_KERNEL_BYTES = 3 * 10**6
"""The same for the products of attention, for each length that rows are rounded to."""

MAX_KERNEL_BYTES = 600 * 10**6
"""oneDNN keeps 1,024 products, of some 0.6 MB."""

HEAD_POSITIONS = {"cpu": 256, "gpu": 8192}
"""Positions that meet the head at once (`engine.cross_entropy.CHUNK_POSITIONS`, and `..._ON_GPU`), in the compute dtype..."""

MAX_HEAD_LOGITS = 64 * 2**20
"""... up to this many logits (`CHUNK_LOGITS`)..."""

HEAD_SLICE_BYTES = {"cpu": 3 * 4 * 2**20, "gpu": 3 * 4 * 16 * 2**20}
"""... and in fp32 a slice of them (`SLICE_LOGITS`), its softmax and a temporary."""

LENGTH_MULTIPLE = 32
"""They are brought to a multiple (`engine.shapes.LENGTH_MULTIPLE`)."""

KL_COPIES = 8
"""Chunks of logits in fp32 that the divergence from the start holds at once (`engine.divergence.FP32_COPIES`); they are smaller by that."""

MAX_ATTENTION_SCORES = 2**20
"""Scores that attention forms at once on a CPU (`engine.row_attention.MAX_SCORES`)."""

BLOCK_QUERIES = 256
"""Queries of a long row whose scores are formed at once; then the row's length decides and not the bound above."""

SCORES_AT_ONCE = 5
"""Tensors of that size in the backward pass: scores, shares, the gradients of both, and a copy."""

NUM_ADAM_STATES, NUM_MUON_STATES = 2, 1
"""First and second moment (Kingma and Ba 2014, 1412.6980, algorithm 1); momentum (Liu et al. 2025, 2502.16982, equation 1)."""

CPU_ALLOCATOR_SHARE = 0.25
"""What the C library's allocator holds beside the tensors, as a share of activations and transients.

Measured with the workers' settings (`jobs.supervisor.ALLOCATOR`) as peak resident memory minus all other parts, over the cases of
`benchmarks/estimates.py`.
"""

GPU_ALLOCATOR_SHARE = 0.1
"""The same for torch's caching allocator on a GPU. Not measured: a margin."""

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Per weight: 4 bits, a scale of 8 bits for 64 weights, and one of 32 bits for 256 scales (Dettmers et al. 2023, 2305.14314, section 3).

`models.nf4.bytes_per_weight` measures it."""

CHECKPOINT_BYTES_PER_SECOND = 0.8e9
"""At which a checkpoint goes to a local disk and is read back. A slower disk holds the copy longer."""

FORWARD_SHARE = 1 / 3
"""Of a pack's time: what was copied before the forward pass and is on the disk by its end is no part of the peak."""

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
    """Parts of the peak of a training step. It lies where the backward pass begins, when all activations are still held.

    `kernels_bytes` is what the matrix library keeps of products that it has met; `working_bytes` what the head or a layer's backward pass
    works in, whichever is more; `checkpoint_bytes` what is still there of the copy of masters and moments that is written to disk while the
    next step runs, and that is made only where there is room; `whole_weights_bytes` how much higher the peak lies behind the last step, where
    weights that the steps spread over processes are whole; `anchors_bytes` what moves, as it was before the first step (`engine.anchor`).
    """

    kernels_bytes: int
    masters_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    working_bytes: int
    allocator_bytes: int
    checkpoint_bytes: int
    whole_weights_bytes: int = 0
    anchors_bytes: int = 0

    @property
    def needed_bytes(self) -> int:
        """The peak where memory is short: without the copy."""
        return self.total_bytes - self.checkpoint_bytes


@dataclass(frozen=True, slots=True)
class GenerationMemory(MemoryEstimate):
    """Parts of the peak of decoding a batch to its last token."""

    kv_cache_bytes: int
    activations_bytes: int
    logits_bytes: int


def fits(needed_bytes: float, memory_bytes: float | None) -> bool | None:
    """Whether a plan leaves a tenth of the memory free; None where the system does not tell how much there is."""
    return None if memory_bytes is None else needed_bytes <= USABLE_SHARE * memory_bytes


def dtype_bytes(dtype: str) -> int:
    """Bytes per number. Raises ValueError for an unknown number format."""
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPE_BYTES)}, not {dtype!r}")
    return DTYPE_BYTES[dtype]


def layer_activation_bytes_per_token(shape: ModelShape, dtype: str, method: str | MethodConfig, row_tokens: int) -> int:
    """Bytes that the engine keeps per token in one decoder layer, rows packed end to end.

    `row_tokens` is the length of the longest row; only families that cap attention scores (Gemma 2) depend on it. A dropout of the
    family's own (GPT-2's) is not counted. With `last_layers` a layer that moves is meant. What a matrix reads is kept for its own
    gradient or its adapter's, so with `bias`, `norm`, `bottleneck` and soft prompts (and in a layer that only passes the gradient on)
    it is not.
    """
    size, settings = dtype_bytes(dtype), settings_of(method)
    method = settings.name
    hidden, width = shape.hidden_size, shape.intermediate_size
    queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    read = 0 if method in ("bias", "norm", "bottleneck", *SOFT_PROMPTS) else 1
    matrices = linear_layers(shape) if method in LOW_RANK else ()
    # With DoRA what the trained length multiplies, and PEFT's dropout masks.
    extra = size * sum(linear.in_features for linear in matrices) if settings.lora_dropout and settings.use_dora else 0
    extra += size * sum(linear.out_features for linear in matrices) if settings.use_dora else 0
    # A bottleneck adapter keeps what it reads, and its inner numbers before and after GELU.
    adapters = num_bottlenecks(shape, settings) // shape.num_hidden_layers if method == "bottleneck" else 0
    extra += size * adapters * (hidden + 2 * adapter_size_of(shape, settings)) if adapters else 0
    if shape.model_type == "gpt2":
        # Per norm its input, its output (what the next matrix reads) and two numbers; the fused query, key, value; attention's
        # output; tanh-GELU keeps four intermediates and the product that the next matrix reads.
        return size * (2 * hidden + 4 + 3 * hidden + 4 * width + read * (2 * hidden + hidden + width)) + extra
    # Query, key and value; inputs of query/key/value and of gate/up, and what the output matrix reads.
    numbers = queries + 2 * keys + read * (2 * hidden + queries)
    family = FAMILIES.get(shape.model_type)
    if family is None:
        # `engine.fast_path` replaces layers where a trial on the model allows it, which is not known here: as if it did not.
        # Then a norm keeps its input in fp32 (a gain that is trained needs the normalised input too), and the MLP also keeps
        # the activation of gate and the product that the down matrix reads.
        norms = 2 * hidden * (FP32_BYTES + (size if method in ("full", "last_layers", "norm") else 0))
        return size * (numbers + ((3 if shape.gated_mlp else 2) + read) * width) + norms + extra
    # The engine's norms keep their input and its MLP gate and up, in all families of the table (the tests run each of them).
    # With DoRA the layer below the product is not the engine's, and the activation and the product are kept too.
    # What a norm gives to adapted matrices is formed again from its input, and not kept.
    numbers += (
        family.norms_per_layer * hidden
        - (2 * hidden if matrices else 0)
        + (4 if matrices and settings.use_dora else 2) * width
        + (queries + keys if family.head_norms else 0)
    )
    kept = size * numbers + extra
    if shape.model_type == "gemma2":
        # Capped scores are written out, and keys and values repeated for every query head. Per score: tanh's output and the shares
        # in fp32, the shares again in the model's dtype; for all heads together one byte that says what may be seen.
        shares = FP32_BYTES + FP32_BYTES + (size if size < FP32_BYTES else 0)
        kept += size * 2 * (queries - keys) + row_tokens * (shape.num_attention_heads * shares + 1)
    return kept


def training_memory(
    shape: ModelShape,
    method: str | MethodConfig,
    num_trainable: int,
    max_tokens_per_pack: int,
    dtype: str,
    *,
    max_row_tokens: int | None = None,
    num_pack_rows: int | None = None,
    num_checkpointed_layers: int = 0,
    is_offloaded: bool = False,
    num_anchors: int = 0,
    has_kl: bool = False,
    tokens_per_second: float | None = None,
    device: Literal["cpu", "gpu"] = "cpu",
    optimizer: Literal["adamw", "muon"] = "adamw",
    num_shards: int = 1,
    num_pack_lengths: int = 1,
    num_row_lengths: int = 1,
    num_lanes: int = 1,
    runtime_bytes: int = RUNTIME_BYTES,
) -> TrainingMemory:
    """Peak of one training step over packs of at most `max_tokens_per_pack` tokens; a longer row is a pack of its own.

    `max_row_tokens` is the longest row (by default a whole pack); the first `num_checkpointed_layers` layers are computed again in
    the backward pass. With `is_offloaded` a GPU holds the activations of one layer, and the host the others. `num_anchors` copies of what
    moves are kept as it was at the start; `has_kl` says that the divergence from it is held down. `tokens_per_second`, where it is known, tells
    whether a checkpoint is on the disk before the activations are at their peak. Layers below all that moves keep nothing. Virtual tokens
    come on top, before each of `num_pack_rows` rows (by default as many of the longest as fill a pack).
    `num_shards` is over how many processes full training spreads weights, gradients and optimizer state (`engine.sharding`); the peak is
    that of one of them. `num_pack_lengths` and `num_row_lengths` are how many lengths packs and rows are rounded to (`engine.shapes`);
    `num_lanes` passes share the tokens of a pack (`sizing.lanes`), and `runtime_bytes` what the process has before any weight. Raises ValueError for an unknown method or dtype, and for shards or Muon with
    another method.
    """
    settings, moves = settings_of(method), moving(shape, method)
    name = settings.name
    if num_shards > 1 and name != "full":
        raise ValueError(f"only full training spreads its weights over processes, not {name!r}")
    if optimizer == "muon" and name != "full":
        raise ValueError(f"only full training goes with muon, not {name!r}")
    size, tokens = dtype_bytes(dtype), max(max_tokens_per_pack, max_row_tokens or 0)
    row_tokens = max_row_tokens or tokens
    if name in SOFT_PROMPTS:
        tokens += (num_pack_rows or -(-tokens // row_tokens)) * settings.num_virtual_tokens
        row_tokens += settings.num_virtual_tokens
    per_layer = tokens * layer_activation_bytes_per_token(shape, dtype, settings, row_tokens)
    passing = tokens * layer_activation_bytes_per_token(shape, dtype, "bias", row_tokens)
    # Of a layer that is computed again only the input stays; its turn comes when all later layers have been freed.
    num_again = max(0, num_checkpointed_layers - (shape.num_hidden_layers - moves.num_backward_layers))
    num_kept = max(1, moves.num_backward_layers - num_again)
    num_passing = min(num_kept, moves.num_backward_layers - moves.num_trained_layers)
    activations = (num_kept - num_passing) * per_layer + num_passing * passing + num_again * tokens * shape.hidden_size * size
    if is_offloaded and device == "gpu":
        activations = min(activations, per_layer)
    working = max(
        _head_bytes(shape, moves.trains_head, tokens, size, device, num_lanes),
        _kl_bytes(shape, moves.trains_head, tokens, size, device) if has_kl else 0,
        _layer_bytes(shape, moves.trains_head, tokens, row_tokens, size, device),
    )
    if name == "sparse":
        # A matrix's gradient is whole until the chosen entries are taken from it.
        working += size * max(linear.num_weights for linear in linear_layers(shape))
    share = CPU_ALLOCATOR_SHARE if device == "cpu" else GPU_ALLOCATOR_SHARE
    growing = (1 + share) * (activations + working)
    allocator = round(share * (activations + working))
    # Adapter matrices lie in the model beside the frozen weights, in its dtype; what tensors were before they moved, in the host's memory.
    # PiSSA keeps where it started from.
    copies = 2 if settings.init_lora_weights == "pissa" else 1
    beside = copies * num_trainable * size if name in (*LOW_RANK, "bottleneck") or (name in DIFFERENCES and device == "cpu") else 0
    # A parameter in fp32 is its own master, but single weights have theirs beside the matrix.
    masters = 0 if size == FP32_BYTES and name != "sparse" else num_trainable * FP32_BYTES
    if name == "sparse":
        beside = num_trainable * (INDEX_BYTES + (size if device == "cpu" else 0))
    weights, gradients = _frozen_bytes(shape, name, size, num_lanes) + beside, num_trainable * FP32_BYTES
    states, whole = FP32_BYTES * _num_state_values(shape, num_trainable, optimizer), 0
    # Single weights move as their masters, in fp32.
    anchors = num_anchors * num_trainable * (FP32_BYTES if name == "sparse" else size)
    if num_shards > 1:
        # Shards are fp32, so they are the masters; of the model only what is gathered is there in its own dtype.
        gradients, states = -(-gradients // num_shards), -(-states // num_shards)
        weights, masters, anchors = _gathered_bytes(shape, size), gradients, num_anchors * gradients
        # At the end the first process has the weights whole, to be saved. While they are spread it holds less: the model in its own dtype
        # and one layer in fp32, beside the masters alone.
        whole = max(0, shape.num_parameters * size - (weights + activations + working + allocator))
    copied = -(-num_trainable * FP32_BYTES // num_shards) + states
    return TrainingMemory(
        runtime_bytes=runtime_bytes,
        weights_bytes=weights,
        kernels_bytes=_kernels_bytes(name, num_pack_lengths, num_row_lengths) if device == "cpu" and dtype == "bfloat16" else 0,
        masters_bytes=masters,
        gradients_bytes=gradients,
        optimizer_bytes=states,
        activations_bytes=activations,
        working_bytes=working,
        allocator_bytes=allocator,
        # A GPU's copy lies in the host's memory.
        checkpoint_bytes=_checkpoint_bytes(copied, growing, tokens, tokens_per_second) if device == "cpu" else 0,
        whole_weights_bytes=whole,
        anchors_bytes=anchors,
    )


def _kernels_bytes(method: str, num_pack_lengths: int, num_row_lengths: int) -> int:
    """What oneDNN keeps of the products that it meets at so many lengths."""
    per_pack = PACK_KERNEL_BYTES["low rank" if method in LOW_RANK else "other"]
    return min(num_pack_lengths * per_pack + num_row_lengths * ROW_KERNEL_BYTES, MAX_KERNEL_BYTES)


def _num_state_values(shape: ModelShape, num_trainable: int, optimizer: str) -> int:
    """Numbers that the optimizer keeps from step to step. Muon has the layers' matrices, and AdamW what is beside them."""
    of_muon = shape.num_hidden_layers * sum(linear.num_weights for linear in linear_layers(shape)) if optimizer == "muon" else 0
    return NUM_MUON_STATES * of_muon + NUM_ADAM_STATES * (num_trainable - of_muon)


def _gathered_bytes(shape: ModelShape, size: int) -> int:
    """What a process holds of others' shards during a pass: embedding, last norm and head; a layer and the next; a layer's gradients, in
    the model's dtype and as the fp32 that is summed. By arithmetic; no process of a sharded run was measured."""
    layer = shape.num_layer_parameters
    return size * (shape.num_parameters - shape.num_hidden_layers * layer) + (2 * size + size + FP32_BYTES) * layer


def _frozen_bytes(shape: ModelShape, method: str, size: int, num_lanes: int) -> int:
    """The model's own weights; with `qlora` its matrices in 4 bits, and one of them unpacked at a time in each lane."""
    if method != "qlora":
        return shape.num_parameters * size
    matrices = [linear.num_weights for linear in linear_layers(shape)]
    packed = shape.num_hidden_layers * sum(matrices)
    return round(packed * NF4_BYTES) + (shape.num_parameters - packed + num_lanes * max(matrices)) * size


def _checkpoint_bytes(copied: int, growing: float, tokens: int, tokens_per_second: float | None) -> int:
    """How much higher the peak is for the copy: memory grows by `growing` over the forward pass, and the copy goes somewhere in it."""
    if tokens_per_second is None:
        return copied
    forward_seconds = FORWARD_SHARE * tokens / tokens_per_second
    share_left = max(0.0, 1.0 - copied / CHECKPOINT_BYTES_PER_SECOND / forward_seconds)
    return round(max(0.0, copied - share_left * growing))


def chunk_positions(vocab_size: int, device: str, copies: int = 1) -> int:
    """As `engine.cross_entropy.chunk_positions`."""
    most = min(HEAD_POSITIONS[device], MAX_HEAD_LOGITS // (copies * vocab_size))
    return max(1, most - most % LENGTH_MULTIPLE or most)


def _head_bytes(shape: ModelShape, trains_head: bool, tokens: int, size: int, device: str, num_lanes: int) -> int:
    """What lives while the head runs, in each of the lanes."""
    positions = min(tokens, num_lanes * chunk_positions(shape.vocab_size, device))
    # The last hidden states before and after the norm, those with loss, and their gradient.
    hidden_states = 4 * tokens * shape.hidden_size * size
    # The head's gradient is summed in fp32, a chunk's share of it comes in the compute dtype.
    gradient = shape.vocab_size * shape.hidden_size * (FP32_BYTES + size) if trains_head else 0
    return (
        positions * shape.vocab_size * size
        + min(num_lanes * HEAD_SLICE_BYTES[device], 3 * positions * shape.vocab_size * FP32_BYTES)
        + hidden_states
        + gradient
    )


def _kl_bytes(shape: ModelShape, trains_head: bool, tokens: int, size: int, device: str) -> int:
    """What lives while the divergence from the start is computed, after the loss."""
    positions = min(tokens, chunk_positions(shape.vocab_size, device, KL_COPIES))
    # Of the head as before; those with loss also as they were at the start, and their gradient for the divergence.
    hidden_states = 6 * tokens * shape.hidden_size * size
    # A trained head's gradients of the loss and of the divergence, both in fp32, and a chunk's share.
    gradient = 3 * shape.vocab_size * shape.hidden_size * FP32_BYTES if trains_head else 0
    return KL_COPIES * positions * shape.vocab_size * FP32_BYTES + hidden_states + gradient


def _layer_bytes(shape: ModelShape, trains_head: bool, tokens: int, row_tokens: int, size: int, device: str) -> int:
    """What the backward pass of a layer works in beside what was kept: the MLP's part or attention's."""
    # Gradients of gate and up, their product formed again; the stream's gradients.
    mlp = tokens * (3 * shape.intermediate_size + 4 * shape.hidden_size) * size
    heads, queries = shape.num_attention_heads, shape.num_attention_heads * shape.head_dim
    scores = min(heads * tokens * row_tokens, max(MAX_ATTENTION_SCORES, heads * min(row_tokens, BLOCK_QUERIES) * row_tokens))
    # Query, output and their gradients; GPU kernels form no scores in memory.
    attention = 4 * tokens * queries * size + (SCORES_AT_ONCE * scores * size if device == "cpu" else 0)
    # The head's gradient waits for the embedding's where they are one matrix, and for the optimizer's hook elsewhere.
    return max(mlp, attention) + (shape.vocab_size * shape.hidden_size * size if trains_head else 0)


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
