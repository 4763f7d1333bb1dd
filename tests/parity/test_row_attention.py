"""Attention of packed rows, forward and backward, against PyTorch's scaled_dot_product_attention on each row alone, in fp64.

Most cases run in fp64 both ways: whatever is left there is a mistake in a formula or an index and no rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from parity.tolerances import PLANTED_FACTOR, allowed, relative_error
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.llama.modeling_llama import eager_attention_forward

import giong.engine.row_attention as row_attention_module
import giong.engine.shapes as shapes
from giong.engine.attention import packed_attention_forward
from giong.engine.row_attention import plan_groups, row_attention

WIDTH, SCALE = 8, 0.4
UNEQUAL = (5, 33, 17, 2, 26)
EQUAL = (19, 19, 19)
APART = (7, 30, 7, 30)
PADDED = (9, 12, 10, 11, 3, 1, 2)
LONG = (600, 40, 600)
LENGTHS = {"unequal": UNEQUAL, "equal": EQUAL, "equal but apart": APART, "padded": PADDED, "one": (13,), "single tokens": (1, 1, 1)}
HEADS = {"one to one": (2, 2), "two to one": (4, 2), "seven to one": (14, 2), "seven to all": (7, 1)}


@dataclass
class Inputs:
    """Query (H, T, E), key and value (K, T, E), laid out as a projection leaves them (T, H, E), and the output's gradient."""

    lengths: tuple[int, ...]
    heads: tuple[int, int] = (4, 2)
    window: int | None = None
    dtype: torch.dtype = torch.float64
    width: int = WIDTH

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(11)
        num_tokens, (num_heads, num_kv_heads) = sum(self.lengths), self.heads

        def draw(heads: int) -> torch.Tensor:
            drawn = torch.randn(num_tokens, heads, self.width, generator=generator, dtype=torch.float64)
            return drawn.to(self.dtype).transpose(0, 1)

        self.leaves = [draw(heads).requires_grad_(True) for heads in (num_heads, num_kv_heads, num_kv_heads)]
        self.gradient = draw(num_heads)

    def found(self) -> list[torch.Tensor]:
        """Output and the gradients of query, key and value by the engine."""
        output = row_attention(*self.leaves, self.lengths, scale=SCALE, window=self.window)
        return [output.detach(), *torch.autograd.grad(output, self.leaves, self.gradient)]

    def expected(self, planted: str | None = None, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
        """The same by PyTorch, one row at a time with an explicit mask."""
        leaves = [leaf.detach().to(dtype).requires_grad_(True) for leaf in self.leaves]
        lengths = (sum(self.lengths),) if planted == "rows see each other" else self.lengths
        window = self.window if planted != "window off by one" else self.window + 1
        scale = WIDTH**-0.5 if planted == "own scale forgotten" else SCALE
        outputs = []
        for query, key, value in zip(*(leaf.split(lengths, dim=1) for leaf in leaves)):
            places = torch.arange(query.shape[1])
            distance = places[:, None] - places[None]
            seen = (distance >= 0) & (distance < (window or len(places)))
            outputs.append(scaled_dot_product_attention(query[None], key[None], value[None], seen, scale=scale, enable_gqa=True)[0])
        output = torch.cat(outputs, 1)
        return [output.detach(), *torch.autograd.grad(output, leaves, self.gradient.to(dtype))]


def error(inputs: Inputs, planted: str | None = None) -> float:
    """The largest relative error among output and gradients."""
    return max(relative_error(found, wanted) for found, wanted in zip(inputs.found(), inputs.expected(planted), strict=True))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks of 8 queries and lengths in fours, so that rows of 13 tokens and more need several blocks."""
    monkeypatch.setattr(row_attention_module, "BLOCK_QUERIES", 8)
    monkeypatch.setattr(shapes, "LENGTH_MULTIPLE", 4)
    plan_groups.cache_clear()
    yield
    plan_groups.cache_clear()


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_output_and_gradients_equal_each_row_alone(lengths: tuple[int, ...], heads: tuple[int, int]):
    assert error(Inputs(lengths, heads)) < allowed("attention")


@pytest.mark.parametrize("window", [1, 3, 8, 9, 20, 100])
@pytest.mark.parametrize("lengths", [UNEQUAL, PADDED, EQUAL], ids=["unequal", "padded", "equal"])
def test_windows_within_one_block(lengths: tuple[int, ...], window: int):
    assert error(Inputs(lengths, window=window)) < allowed("attention")


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("window", [None, 1, 3, 8, 9, 20, 100])
def test_rows_of_several_blocks(window: int | None, heads: tuple[int, int]):
    """Windows shorter than a block, as long, longer than a block and longer than every row; 12 is the longest undivided row."""
    assert len(row_attention_module._blocks(36, window)) == 5
    assert len(row_attention_module._blocks(12, window)) == 1
    assert error(Inputs((5, 33, 17, 2, 13, 12), heads, window)) < allowed("attention")


@pytest.mark.parametrize("window", [None, 100, 300])
def test_long_rows_with_the_blocks_as_they_ship(window: int | None):
    assert len(row_attention_module._blocks(600, window)) == 3
    assert error(Inputs(LONG, (2, 1), window)) < allowed("attention")


@pytest.mark.parametrize(
    ("lengths", "window", "planted"),
    [
        (UNEQUAL, None, "rows see each other"),
        (EQUAL, None, "rows see each other"),
        (PADDED, 3, "rows see each other"),
        (UNEQUAL, 3, "window off by one"),
        (UNEQUAL, 20, "window off by one"),
        (EQUAL, None, "own scale forgotten"),
    ],
)
def test_a_planted_error_is_seen(lengths: tuple[int, ...], window: int | None, planted: str):
    assert error(Inputs(lengths, window=window), planted) > PLANTED_FACTOR * allowed("attention")


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("window", [3, 8, 20])
def test_a_window_off_by_one_is_seen_across_blocks(window: int):
    assert error(Inputs(UNEQUAL, window=window), "window off by one") > PLANTED_FACTOR * allowed("attention")


def test_a_padded_query_that_pulls_at_a_key_is_seen(monkeypatch: pytest.MonkeyPatch):
    """Without zeros at the padding its gradient, and not the row's alone, reaches keys and values."""
    inputs = Inputs(PADDED)
    true_take = row_attention_module._take

    def filled(tensor: torch.Tensor, group: row_attention_module.RowGroup, num_kv_heads: int) -> torch.Tensor:
        taken = true_take(tensor, group, num_kv_heads)
        padding = (taken == 0).all(-1, keepdim=True)
        assert bool(padding.any())
        return taken.masked_fill(padding, 0.5)

    monkeypatch.setattr(row_attention_module, "_take", filled)
    found, expected = inputs.found(), inputs.expected()
    assert relative_error(found[0], expected[0]) < allowed("attention")
    assert all(relative_error(found[i], expected[i]) > PLANTED_FACTOR * allowed("attention") for i in (2, 3))


def test_what_follows_a_row_in_the_pack_is_not_seen_by_it():
    """The forward pass takes along what lies behind a row, up to a rounded length."""
    inputs, other = Inputs(UNEQUAL), Inputs(UNEQUAL)
    with torch.no_grad():
        for leaf in other.leaves:
            leaf[:, sum(UNEQUAL[:2]) :] = 1e6
    for found, wanted in zip(other.found(), inputs.found()):
        assert torch.equal(found[:, : sum(UNEQUAL[:2])], wanted[:, : sum(UNEQUAL[:2])])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_come_in_few_shapes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """Rows of ever new lengths: of each product there are as many shapes as rounded lengths."""
    shapes: dict[str, set[tuple[int, ...]]] = {"forward": set(), "backward": set()}
    true_bmm, true_attention = torch.bmm, scaled_dot_product_attention

    def bmm(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        shapes["backward"].add((*left.shape, right.shape[2]))
        return true_bmm(left, right)

    def attention(query: torch.Tensor, *others: torch.Tensor, **settings: object) -> torch.Tensor:
        shapes["forward"].add(query.shape)
        return true_attention(query, *others, **settings)

    monkeypatch.setattr(torch, "bmm", bmm)
    monkeypatch.setattr(row_attention_module, "scaled_dot_product_attention", attention)
    for length in range(130, 190):
        filler = -length % 32
        Inputs((length, filler) if filler else (length,), (2, 1), dtype=dtype, width=32).found()
    # The filler that ends a pack has nothing behind it.
    assert {shape[2] for shape in shapes["forward"]} - set(range(1, 32)) == {160, 192}
    assert {shape[1] for shape in shapes["backward"]} == {32, 64, 160, 192, 320, 384}


def test_a_block_that_forgets_the_keys_before_it_is_seen(monkeypatch: pytest.MonkeyPatch):
    true_blocks = row_attention_module._blocks
    monkeypatch.setattr(row_attention_module, "_blocks", lambda *args: [(start, start, end) for _, start, end in true_blocks(*args)])
    assert error(Inputs((600,), (2, 1))) > PLANTED_FACTOR * allowed("attention")


def test_gradients_equal_finite_differences():
    inputs = Inputs((3, 4, 2), heads=(2, 1), window=2)
    assert torch.autograd.gradcheck(lambda *leaves: row_attention(*leaves, inputs.lengths, scale=SCALE, window=2), inputs.leaves)


def test_a_row_of_one_token_returns_its_value():
    inputs = Inputs((1, 1), heads=(2, 2))
    assert torch.equal(inputs.found()[0], inputs.leaves[2].detach())


@pytest.mark.parametrize("lengths", [UNEQUAL, EQUAL, PADDED], ids=["unequal", "equal", "padded"])
def test_in_fp32(lengths: tuple[int, ...]):
    inputs = Inputs(lengths, dtype=torch.float32)
    assert error(inputs) < allowed("attention_fp32")
    assert error(inputs, "rows see each other") > PLANTED_FACTOR * allowed("attention_fp32")


def in_bf16_by_transformers(inputs: Inputs) -> list[torch.Tensor]:
    """transformers' own formula, one row at a time: bf16 scores and shares, the softmax in fp32."""
    module = torch.nn.Module().eval()
    module.num_key_value_groups = inputs.heads[0] // inputs.heads[1]
    leaves = [leaf.detach().requires_grad_(True) for leaf in inputs.leaves]
    outputs = []
    for query, key, value in zip(*(leaf.split(inputs.lengths, dim=1) for leaf in leaves)):
        future = torch.full((query.shape[1],) * 2, torch.finfo(query.dtype).min, dtype=query.dtype).triu(1)
        outputs.append(eager_attention_forward(module, query[None], key[None], value[None], future, scaling=SCALE)[0][0].transpose(0, 1))
    output = torch.cat(outputs, 1)
    return [output.detach(), *torch.autograd.grad(output, leaves, inputs.gradient)]


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of the whole tensor, not of its worst number: rounding is a matter of chance in one of them."""
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("lengths", [UNEQUAL, PADDED, (600,)], ids=["unequal", "padded", "several blocks"])
def test_in_bf16_the_error_is_that_of_transformers(lengths: tuple[int, ...]):
    inputs = Inputs(lengths, dtype=torch.bfloat16, width=32)
    for found, peer, wanted in zip(inputs.found(), in_bf16_by_transformers(inputs), inputs.expected(), strict=True):
        assert found.dtype == torch.bfloat16
        assert distance(found, wanted) < allowed("bf16_error_ratio") * distance(peer, wanted)


def test_a_large_common_part_of_the_keys_costs_no_digits(monkeypatch: pytest.MonkeyPatch):
    """Shares do not change when all keys move alike; bf16 scores of such keys, formed again for the gradients, would keep nothing else."""
    inputs = Inputs(UNEQUAL, dtype=torch.bfloat16)
    without = [distance(ours, wanted) for ours, wanted in zip(inputs.found(), inputs.expected(), strict=True)]
    with torch.no_grad():
        inputs.leaves[1] += 30.0
    expected = inputs.expected()
    for ours, wanted, usual in zip(inputs.found(), expected, without, strict=True):
        assert distance(ours, wanted) < allowed("bf16_error_ratio") * usual
    monkeypatch.setattr(
        row_attention_module, "_scaled_keys", lambda key, group, scale: row_attention_module._take(key, group, key.shape[0]) * scale
    )
    assert distance(inputs.found()[3], expected[3]) > PLANTED_FACTOR * without[3]


@pytest.mark.parametrize("lengths", [UNEQUAL, EQUAL, APART, PADDED, LONG])
def test_every_token_is_in_one_group_once(lengths: tuple[int, ...]):
    seen: list[int] = []
    for group in plan_groups(lengths, 4):
        num_rows = len(group.rows)
        assert num_rows == 1 or 4 * num_rows * group.length**2 <= row_attention_module.MAX_SCORES
        assert group.length % shapes.LENGTH_MULTIPLE == 0
        assert all(group.length - length >= 0 for _, length in group.rows)
        seen += [place for start, length in group.rows for place in range(start, start + length)]
    assert sorted(seen) == list(range(sum(lengths)))


def test_the_cases_above_are_what_they_are_called():
    """Rows of like length share a group, also apart from each other; long rows stand alone."""
    assert [len(group.rows) for group in plan_groups(EQUAL, 4)] == [3]
    assert [len(group.rows) for group in plan_groups(APART, 4)] == [4]
    assert {length for group in plan_groups(PADDED, 4) for _, length in group.rows} == set(PADDED)
    assert [len(group.rows) for group in plan_groups((200, 190, 140, 40), 4)] == [2, 1, 1]
    assert [len(group.rows) for group in plan_groups(LONG, 4)] == [1, 1, 1]


def test_nothing_but_query_key_and_value_is_kept():
    """PyTorch's own formula keeps the shares as well: T^2 numbers per head."""
    inputs, kept = Inputs(UNEQUAL), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        row_attention(*inputs.leaves, inputs.lengths, scale=SCALE)
    assert sorted(tensor.data_ptr() for tensor in kept) == sorted(leaf.data_ptr() for leaf in inputs.leaves)


@pytest.mark.parametrize("window", [None, 4])
def test_the_model_side_interface_gives_the_same(window: int | None):
    """transformers hands over (1, heads, T, E) and wants (1, T, heads, E) back; without a scale it means E^-1/2."""
    inputs = Inputs(UNEQUAL, window=window)
    batch = [leaf.detach()[None] for leaf in inputs.leaves]
    output, _ = packed_attention_forward(torch.nn.Module(), *batch, None, lengths=UNEQUAL, scaling=SCALE, sliding_window=window)
    assert relative_error(output[0].transpose(0, 1), inputs.expected()[0]) < allowed("attention")
    output, _ = packed_attention_forward(torch.nn.Module(), *batch, None, lengths=UNEQUAL, sliding_window=window)
    assert relative_error(output[0].transpose(0, 1), inputs.expected("own scale forgotten")[0]) < allowed("attention")


@pytest.mark.parametrize("lengths", [UNEQUAL, EQUAL], ids=["unequal", "equal"])
@pytest.mark.parametrize("window", [None, 4])
def test_the_path_of_other_devices_gives_the_same(lengths: tuple[int, ...], window: int | None, monkeypatch: pytest.MonkeyPatch):
    """Off the CPU, rows go through PyTorch's own attention: a dropout of nearly nothing sends a CPU tensor there."""
    inputs = Inputs(lengths, window=window)
    monkeypatch.setattr("giong.engine.attention.row_attention", None)
    batch = [leaf.detach()[None] for leaf in inputs.leaves]
    settings = {"lengths": lengths, "scaling": SCALE, "sliding_window": window, "dropout": 1e-15}
    output, _ = packed_attention_forward(torch.nn.Module(), *batch, None, **settings)
    assert relative_error(output[0].transpose(0, 1), inputs.expected()[0]) < allowed("attention")
