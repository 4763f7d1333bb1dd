"""The operations between the matrix products, each timed alone on a GPU: the engine's eager formulas, its Triton kernels, liger-kernel's.

    python benchmarks/gpu_kernels.py --case 1.5b [--quick]

Every form works on the same numbers at the widths of the case's shape; bytes are those that must be read and written once. Where
liger-kernel is not installed its column stays empty. Writes benchmarks/results/gpu_kernels-CASE.json and ends with one line: how many
times as long the eager formulas and liger take as the Triton kernels, over one layer's operations that all of them have. `--quick`
takes few tokens and, off a GPU, Triton's interpreter: it shows that the script runs, and its times say nothing.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

from measuring import describe_machine, last_line, parser, write_result
from shapes import LORA_R, SHAPES

NUM_TOKENS, NUM_TOKENS_QUICK = 15_360, 64
HEAD_POSITIONS = 441
"""A chunk of the head at a vocabulary of 152k."""

WARMUP, RUNS = 3, 15


def seconds_of(run: Callable[[], object], device: str) -> float:
    """Median of several runs; on a GPU each is waited for."""
    import torch

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    found = []
    for turn in range(WARMUP + RUNS):
        wait()
        started = time.perf_counter()
        run()
        wait()
        found.append(time.perf_counter() - started)
        if turn < WARMUP:
            found.clear()
    return statistics.median(found)


def operations(shape: dict[str, Any], num_tokens: int, device: str, kernels: Any) -> Iterator[tuple[str, int, Callable[[], object]]]:
    """(name, bytes to be read and written, what runs it) per operation of a layer and of the head. Gradients may be written over."""
    import torch

    width, inner, vocab = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    heads, head_dim = shape["num_attention_heads"], shape["hidden_size"] // shape["num_attention_heads"]

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=device).bfloat16()

    narrow, wide = 2 * num_tokens * width, 2 * num_tokens * inner
    x, grad, gain = draw(num_tokens, width), draw(num_tokens, width), draw(width)
    yield "norm, forward", 2 * narrow, lambda: kernels.norm_forward(x, gain, 0.0, 1e-6)
    yield "norm, backward", 3 * narrow, lambda: kernels.norm_backward(grad, x, gain, 1e-6, False)
    gate, up, of_hidden = draw(num_tokens, inner), draw(num_tokens, inner), draw(num_tokens, inner)
    yield "gated activation, forward", 3 * wide, lambda: kernels.gated_forward(gate, up, "silu")
    yield "gated activation, backward", 6 * wide, lambda: kernels.gated_backward(of_hidden, gate, up, "silu")
    queries, cos, sin = draw(num_tokens, heads, head_dim).transpose(0, 1), draw(num_tokens, head_dim), draw(num_tokens, head_dim)
    yield "rotation of queries", 2 * narrow, lambda: kernels.turn(queries, cos, sin, 1.0)
    low, lora_b = draw(num_tokens, LORA_R), draw(inner, LORA_R)
    yield "sum of an update", 2 * wide, lambda: kernels.add_product(of_hidden, low, lora_b.T, 0.5)
    positions = min(HEAD_POSITIONS, num_tokens)
    logits, targets = draw(positions, vocab), torch.randint(vocab, (positions,), device=device)
    logprobs = torch.empty(positions, device=device)
    yield (
        "softmax of the head", 3 * 2 * positions * vocab, lambda: kernels.logprobs_and_gradient(logits, targets, logprobs, None, 1.0, True)
    )  # fmt: skip


def liger_operations(shape: dict[str, Any], num_tokens: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """The same of liger-kernel, as its own autograd functions call it. Its gated activation writes gradients over gate and up, which are
    cloned outside the time; its rotation takes queries and keys together and its loss waits for the host, so neither stands here."""
    import torch
    from liger_kernel.ops.rms_norm import rms_norm_backward, rms_norm_forward
    from liger_kernel.ops.swiglu import swiglu_backward, swiglu_forward

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, device="cuda").bfloat16()

    width, inner = shape["hidden_size"], shape["intermediate_size"]
    x, grad, gain = draw(num_tokens, width), draw(num_tokens, width), draw(width)
    yield "norm, forward", lambda: rms_norm_forward(x, gain, 1e-6, 0.0, "llama", None)
    _, kept, reciprocals, block, num_warps, mode = rms_norm_forward(x, gain, 1e-6, 0.0, "llama", None)
    yield (
        "norm, backward", lambda: rms_norm_backward(grad, kept, gain, reciprocals, 0.0, mode, block, num_warps, False, None)
    )  # fmt: skip
    gate, up, of_hidden = draw(num_tokens, inner), draw(num_tokens, inner), draw(num_tokens, inner)
    yield "gated activation, forward", lambda: swiglu_forward(gate, up)

    def gated_backward() -> None:
        # The product that the down projection reads is formed again, as the engine does.
        swiglu_forward(gate, up)
        swiglu_backward(gate, up, of_hidden)

    yield "gated activation, backward", gated_backward


def main() -> None:
    options = parser(__doc__, cases=("tiny", "1.5b", "8b"), default="1.5b").parse_args()
    if interpreted := shutil.which("nvidia-smi") is None:
        if not options.quick:
            raise SystemExit("This needs a GPU, and there is none here: nothing was measured. `--quick` shows that the script runs.")
        # Triton reads it when it is imported.
        os.environ["TRITON_INTERPRET"] = "1"
    from giong.engine.elementwise import EAGER
    from giong.engine.triton_kernels import TRITON

    device, num_tokens = "cpu" if interpreted else "cuda", NUM_TOKENS_QUICK if options.quick else NUM_TOKENS
    shape = SHAPES[options.case]
    figures: dict[str, dict[str, Any]] = {}
    for form, kernels in (("eager", EAGER), ("triton", TRITON)):
        for name, num_bytes, run in operations(shape, num_tokens, device, kernels):
            figures.setdefault(name, {"bytes": num_bytes})[form] = seconds_of(run, device)
    if device == "cuda" and find_spec("liger_kernel") is not None:
        for name, run in liger_operations(shape, num_tokens):
            figures[name]["liger"] = seconds_of(run, device)
    result = {"num_tokens": num_tokens, "machine": describe_machine(device), "operations": figures}
    write_result(options, "gpu_kernels", result, dtype="bfloat16")
    for name, of in figures.items():
        times = "".join(f"{form} {of[form] * 1e3:9.3f} ms   " for form in ("eager", "triton", "liger") if form in of)
        print(f"{name:28s} {times}{of['bytes'] / of['triton'] / 1e9:6.0f} GB/s in Triton")
    print(last_line(eager_over_triton=ratio(figures, "eager"), liger_over_triton=ratio(figures, "liger")))


def ratio(figures: dict[str, dict[str, Any]], form: str) -> float | None:
    """Times as long as Triton's, summed over the operations that the form has."""
    shared = [of for of in figures.values() if form in of]
    return sum(of[form] for of in shared) / sum(of["triton"] for of in shared) if shared else None


if __name__ == "__main__":
    main()
