"""The attention kernels for GPUs, as far as a CPU can show: their numbers, their masks, what they are asked, and which is chosen.

FlexAttention runs here uncompiled, with a backward pass that torch allows on GPUs only and that is the same code. Flash attention
has no CPU code: a stand-in does what its documentation says of its arguments, and torch's own runs without numbers ("meta").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.attention.flex_attention as flex
from parity.tolerances import PLANTED_FACTOR, allowed, relative_error
from test_row_attention import EQUAL, HEADS, SCALE, UNEQUAL, Inputs

import giong.engine.attention as attention
import giong.engine.gpu_attention as gpu_attention
from giong.engine.attention import KERNELS, AttentionCase, choose, packed_attention_forward
from giong.engine.gpu_attention import AttentionSettings, block_mask, by_flash_attn, by_flex, by_torch_varlen, first_visible
from giong.errors import ModelError

LONG = (300, 1, 129, 128, 70)
"""Rows that begin inside blocks of 128, end on their borders and span several."""


@pytest.fixture
def flex_with_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex, "_validate_device", lambda *tensors: None)


def through(kernel: Callable, inputs: Inputs, lengths: tuple[int, ...] | None = None, **settings: object) -> list[torch.Tensor]:
    """Output (H, T, E) and the gradients of query, key and value by a kernel of the engine."""
    asked = AttentionSettings(lengths or inputs.lengths, SCALE, inputs.window, **settings)
    output = kernel(*(leaf[None] for leaf in inputs.leaves), asked)[0].transpose(0, 1)
    return [output.detach(), *torch.autograd.grad(output, inputs.leaves, inputs.gradient)]


def error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return max(relative_error(a, b) for a, b in zip(found, expected, strict=True))


# ---- FlexAttention ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("flex_with_gradients")
@pytest.mark.parametrize("window", [None, 1, 4, 40, 400])
@pytest.mark.parametrize("lengths", [UNEQUAL, EQUAL, LONG], ids=["unequal", "equal", "long"])
def test_flex_gives_each_row_alone(lengths: tuple[int, ...], window: int | None):
    inputs = Inputs(lengths, window=window)
    assert error(through(by_flex, inputs), inputs.expected()) < allowed("attention")


@pytest.mark.usefixtures("flex_with_gradients")
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_flex_shares_key_heads_without_repeating_them(heads: tuple[int, int]):
    inputs = Inputs(UNEQUAL, heads)
    assert error(through(by_flex, inputs), inputs.expected()) < allowed("attention")


@pytest.mark.usefixtures("flex_with_gradients")
@pytest.mark.parametrize("window", [None, 4])
def test_flex_caps_scores_as_the_explicit_formula_does(window: int | None):
    """In fp32, where the formula computes."""
    inputs = Inputs(UNEQUAL, window=window, dtype=torch.float32)
    expected = through(attention._by_sdpa, inputs, softcap=1.5)
    assert error(through(by_flex, inputs, softcap=1.5), expected) < allowed("attention_fp32")
    assert error(through(by_flex, inputs), expected) > PLANTED_FACTOR * allowed("attention_fp32")


@pytest.mark.usefixtures("flex_with_gradients")
def test_a_planted_error_in_flex_is_seen():
    inputs = Inputs(UNEQUAL, window=4)
    assert error(through(by_flex, inputs, lengths=(sum(UNEQUAL),)), inputs.expected()) > PLANTED_FACTOR * allowed("attention")
    assert error(through(by_flex, inputs), inputs.expected("window off by one")) > PLANTED_FACTOR * allowed("attention")


@pytest.mark.parametrize("window", [None, 1, 100, 128, 129, 300])
@pytest.mark.parametrize("lengths", [UNEQUAL, LONG, (128, 256, 128), (1,) * 200, (640,)])
def test_blocks_are_those_that_torch_finds_by_looking_at_every_pair(lengths: tuple[int, ...], window: int | None):
    """The same blocks in part, the same in full, the same mask inside: nothing is skipped that is seen, and nothing is in vain."""
    ours, first = block_mask(lengths, window, torch.device("cpu")), torch.from_numpy(first_visible(lengths, window))
    num_tokens = sum(lengths)
    theirs = flex.create_block_mask(lambda b, h, q, k: (k <= q) & (k >= first[q]), None, None, num_tokens, num_tokens, device="cpu")
    assert ours.seq_lengths == theirs.seq_lengths
    for counts, indices in (("kv_num_blocks", "kv_indices"), ("full_kv_num_blocks", "full_kv_indices"), ("q_num_blocks", "q_indices")):
        assert listed(ours, counts, indices) == listed(theirs, counts, indices)


def listed(mask: flex.BlockMask, counts: str, indices: str) -> list[list[int]]:
    return [
        sorted(row[:count].tolist()) for count, row in zip(getattr(mask, counts)[0, 0].tolist(), getattr(mask, indices)[0, 0], strict=True)
    ]


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What torch traces anew, as text; what a GPU would then compile runs here as it is."""
    graphs: list[str] = []

    def note(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        graphs.append(str(graph.graph))
        return graph.forward

    torch._dynamo.reset()
    gpu_attention._compiled_flex.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(torch, "compile", partial(torch.compile, backend=note))
        compiled = gpu_attention._compiled_flex()
    monkeypatch.setattr(gpu_attention, "flex_attention", compiled)
    yield graphs
    gpu_attention._compiled_flex.cache_clear()
    torch._dynamo.reset()


@pytest.mark.usefixtures("flex_with_gradients")
def test_flex_stays_fused_in_two_forms_of_each_kind(traced: list[str]):
    """Packs of less than a block, of one, of several and not a whole number of them, with a window and without; then other kinds: without
    gradients, another scale and width, a soft cap, more than torch keeps by itself. What torch would guard besides when it lowers the
    kernel to a GPU is not seen here."""

    def attend(lengths: tuple[int, ...], window: int | None, width: int = 8, softcap: float | None = None) -> torch.Tensor:
        # As a decoder hands them over: rotary positions write head by head, values stay token by token.
        moves = torch.is_grad_enabled()
        query, key = (torch.randn(1, heads, sum(lengths), width, requires_grad=moves) for heads in (4, 2))
        value = torch.randn(1, sum(lengths), 2, width, requires_grad=moves).transpose(1, 2)
        return by_flex(query, key, value, AttentionSettings(lengths, width**-0.5, window, softcap))

    for lengths in ((600, 1, 129), (128,), (5, 33), (70, 58), (129,), (256, 128), (1000, 24, 7)):
        for window in (None, 40):
            attend(lengths, window).sum().backward()
    assert len(traced) == 2
    for softcap in (None, 1.5, 30.0):
        for width in (8, 16):
            for gradients in (True, False):
                with torch.set_grad_enabled(gradients):
                    for lengths in ((600, 1, 129), (5, 33), (1000, 24, 7)):
                        attend(lengths, None, width, softcap)
    assert 8 < len(traced) <= 2 * 12
    assert [graph for graph in traced if "higher_order.flex_attention" not in graph] == []


def test_first_visible_by_hand():
    """Rows of 3 and 2 tokens, window 2: the third token no longer sees the first, the fourth begins anew."""
    assert first_visible((3, 2), None).tolist() == [0, 0, 0, 3, 3]
    assert first_visible((3, 2), 2).tolist() == [0, 0, 1, 3, 3]


def test_a_mask_is_made_once_per_lengths_and_window():
    device = torch.device("cpu")
    assert block_mask(UNEQUAL, 4, device) is block_mask(UNEQUAL, 4, device)
    assert block_mask(UNEQUAL, 4, device) is not block_mask(UNEQUAL, None, device)


# ---- flash attention -------------------------------------------------------------------------------------------------


def documented_flash_attn(  # type: ignore[no-untyped-def]
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0,
):  # fmt: skip
    """What flash-attn documents of flash_attn_varlen_func: a query sees keys from i - left to i + right, causal cuts the right."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
    left, right = window_size
    outputs = []
    for start, end in zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True):
        query, key, value = q[start:end], k[start:end], v[start:end]
        key, value = (part.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for part in (key, value))
        scores = torch.einsum("qhe,khe->hqk", query, key) * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        places = torch.arange(end - start)
        ahead = places[None] - places[:, None]
        seen = (ahead <= (0 if causal else right if right >= 0 else end)) & (ahead >= (-left if left >= 0 else -end))
        shares = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("hqk,khe->qhe", torch.nn.functional.dropout(shares, dropout_p), value))
    return torch.cat(outputs)


def documented_varlen(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):  # type: ignore[no-untyped-def]
    """Torch's function: (-1, 0) is causal, and grouped heads have to be asked for."""
    assert enable_gqa or q.shape[1] == k.shape[1]
    return documented_flash_attn(q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=scale, window_size=window_size)


def varlen_of_2_11(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):  # type: ignore[no-untyped-def]
    """Torch 2.11's: without the flag, which its kernel does not need."""
    return documented_flash_attn(q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=scale, window_size=window_size)


@pytest.fixture(params=[documented_varlen, varlen_of_2_11])
def stand_ins(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", request.param)
    monkeypatch.setattr(gpu_attention, "flash_attn_varlen", lambda: documented_flash_attn)
    gpu_attention.torch_varlen.cache_clear()
    yield
    monkeypatch.undo()
    gpu_attention.torch_varlen.cache_clear()


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("kernel", [by_torch_varlen, by_flash_attn])
@pytest.mark.parametrize("window", [None, 1, 4, 20, 100])
@pytest.mark.parametrize("heads", [(2, 2), (14, 2)], ids=["one to one", "seven to one"])
def test_flash_attention_is_asked_for_each_row_alone(kernel: Callable, window: int | None, heads: tuple[int, int]):
    inputs = Inputs(UNEQUAL, heads, window)
    assert error(through(kernel, inputs), inputs.expected()) < allowed("attention")


@pytest.mark.usefixtures("stand_ins")
def test_flash_attn_is_asked_for_the_soft_cap():
    inputs = Inputs(UNEQUAL, dtype=torch.float32)
    found = through(by_flash_attn, inputs, softcap=1.5)
    assert error(found, through(attention._by_sdpa, inputs, softcap=1.5)) < allowed("attention_fp32")


@pytest.mark.parametrize("window", [None, 4])
def test_torchs_own_function_takes_what_it_is_given(window: int | None):
    """Shapes and arguments of the function that is installed, forward and backward, on a device without numbers."""
    if gpu_attention.torch_varlen() is None:
        pytest.skip("this torch has no attention by row lengths with grouped heads and windows")
    query, key, value = (torch.randn(1, heads, 83, 64, device="meta", dtype=torch.bfloat16, requires_grad=True) for heads in (14, 2, 2))
    output = by_torch_varlen(query, key, value, AttentionSettings(UNEQUAL, SCALE, window))
    assert output.shape == (1, 83, 14, 64)
    output.sum().backward()
    assert (query.grad.shape, key.grad.shape, value.grad.shape) == (query.shape, key.shape, value.shape)


def test_row_borders_are_made_once_and_counted_from_zero():
    borders = gpu_attention.cumulative_lengths((5, 2, 3), torch.device("cpu"))
    assert (borders.tolist(), borders.dtype) == ([0, 5, 7, 10], torch.int32)
    assert gpu_attention.cumulative_lengths((5, 2, 3), torch.device("cpu")) is borders


# ---- the table -------------------------------------------------------------------------------------------------------

ALL = frozenset(kernel.name for kernel in KERNELS)
BF16 = AttentionCase("cuda", torch.bfloat16, 64)


@pytest.fixture
def present(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[frozenset[str]], None]]:
    """`present({...})`: only these kernels are there."""

    def set_present(names: frozenset[str]) -> None:
        table = tuple(replace(kernel, is_there=lambda kernel=kernel: kernel.name in names or not kernel.remedy) for kernel in KERNELS)
        monkeypatch.setattr(attention, "KERNELS", table)
        choose.cache_clear()

    yield set_present
    choose.cache_clear()


@pytest.mark.parametrize(
    ("case", "there", "expected"),
    [
        (BF16, ALL, "torch varlen"),
        (BF16, ALL - {"torch varlen"}, "flash-attn"),
        (BF16, {"FlexAttention"}, "FlexAttention"),
        (BF16, set(), "SDPA per row"),
        (AttentionCase("cuda", torch.bfloat16, 64, capped=True), ALL, "flash-attn"),
        (AttentionCase("cuda", torch.bfloat16, 64, capped=True), {"torch varlen", "FlexAttention"}, "FlexAttention"),
        (AttentionCase("cuda", torch.bfloat16, 64, dropped=True), ALL, "flash-attn"),
        (AttentionCase("cuda", torch.bfloat16, 64, dropped=True), {"torch varlen", "FlexAttention"}, "SDPA per row"),
        (AttentionCase("cuda", torch.float32, 64), ALL, "FlexAttention"),
        (AttentionCase("cuda", torch.bfloat16, 320), ALL, "FlexAttention"),
        (AttentionCase("cuda", torch.bfloat16, 60), ALL, "FlexAttention"),
        (AttentionCase("cuda", torch.bfloat16, 64, same_width=False), ALL, "SDPA per row"),
        (AttentionCase("cpu", torch.bfloat16, 64), ALL, "rows in blocks"),
        (AttentionCase("cpu", torch.float32, 64, capped=True), ALL, "SDPA per row"),
        (AttentionCase("cpu", torch.float32, 64, dropped=True), ALL, "SDPA per row"),
        (AttentionCase("meta", torch.bfloat16, 64), ALL, "SDPA per row"),
        (AttentionCase("mps", torch.float32, 64), ALL, "SDPA per row"),
    ],
)
def test_which_kernel_computes(present: Callable, case: AttentionCase, there: set[str], expected: str):
    present(frozenset(there))
    assert choose(case).name == expected


def test_here_nothing_of_a_gpu_is_there():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert choose(BF16).name == "SDPA per row"


def test_the_cpu_kernel_is_never_asked_on_another_device(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention, "row_attention", lambda *args, **settings: pytest.fail("row_attention is for CPU tensors"))
    tensors = [torch.randn(1, heads, 83, 8, device="meta") for heads in (4, 2, 2)]
    for lengths in (UNEQUAL, (83,)):
        output, _ = packed_attention_forward(torch.nn.Module(), *tensors, None, lengths=lengths, sliding_window=4)
        assert (output.shape, output.device.type) == ((1, 83, 4, 8), "meta")


def test_attention_sinks_are_refused_and_not_left_out():
    tensors = [torch.randn(1, 2, 5, 8) for _ in range(3)]
    with pytest.raises(ModelError, match="attention sinks"):
        packed_attention_forward(torch.nn.Module(), *tensors, None, lengths=(5,), s_aux=torch.zeros(2))


def test_what_can_be_missing_has_a_command_and_only_the_last_row_serves_all():
    assert all(kernel.is_there() or kernel.remedy.startswith("pip install") for kernel in KERNELS)
    strange = AttentionCase("privateuse", torch.float64, 7, True, True, False)
    assert [kernel.name for kernel in KERNELS if kernel.serves(strange)] == [KERNELS[-1].name]
