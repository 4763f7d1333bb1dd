"""What dropout costs an adapted layer: giong's, whose mask is drawn twice and kept never, beside PEFT's on the same layer.

    python benchmarks/lora_dropout.py --case 0.5b [--quick]

Forward and backward pass of every adapted matrix of a decoder layer, rank 16, in bf16, each layer alone, with a dropout of 0.05 and
without; the forms take turns. Bytes are what autograd keeps of a layer beside its parameters, inputs that several layers share counted for each. Writes
benchmarks/results/lora_dropout-CASE.json and ends with one line: what dropout adds to the time and to the bytes of giong, over what
it adds to PEFT's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from measuring import describe_machine, last_line, parser, write_result
from shapes import LORA_R, SHAPES

PROBABILITY = 0.05
NUM_TOKENS, NUM_TOKENS_QUICK = 2048, 64
RUNS, RUNS_QUICK = 9, 2


def matrices(shape: dict[str, Any]) -> list[tuple[int, int]]:
    """(in, out) of query, key, value, output, gate, up and down."""
    width, inner = shape["hidden_size"], shape["intermediate_size"]
    keys = width // shape["num_attention_heads"] * shape["num_key_value_heads"]
    return [(width, width), (width, keys), (width, keys), (width, width), (width, inner), (width, inner), (inner, width)]


def adapted(size: tuple[int, int], dropout: float) -> Any:
    import torch
    from peft.tuners.lora import Linear, LoraConfig

    layer = torch.nn.Linear(*size, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    config = LoraConfig(r=LORA_R, lora_alpha=2 * LORA_R, lora_dropout=dropout, init_lora_weights=False)
    return Linear(layer, "default", config, r=LORA_R, lora_alpha=2 * LORA_R).to(torch.bfloat16).train()


def kept_storages(layer: Any, forward: Callable[[Any, Any], Any], x: Any) -> dict[int, int]:
    """Bytes of what autograd keeps beside the layer's parameters, by their address."""
    import torch

    parameters = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward(layer, x)
        # While the graph lives, no address is given out twice.
        return dict(kept) if output.requires_grad else {}


def main() -> None:
    options = parser(__doc__, cases=("tiny", "135m", "0.5b"), default="0.5b", honours=()).parse_args()
    import torch
    from peft.tuners.lora import Linear

    from giong.engine.lora_linear import lora_linear_forward

    torch.manual_seed(0)
    num_tokens, runs = (NUM_TOKENS_QUICK, RUNS_QUICK) if options.quick else (NUM_TOKENS, RUNS)
    forms = {"giong": lora_linear_forward, "peft": Linear.forward}
    seconds: dict[str, list[float]] = {}
    num_bytes: dict[str, int] = {}
    layers = {
        name: [adapted(size, PROBABILITY if name == "dropout" else 0.0) for size in matrices(SHAPES[options.case])]
        for name in ("plain", "dropout")
    }
    inputs = [torch.randn(num_tokens, width, dtype=torch.bfloat16, requires_grad=True) for width, _ in matrices(SHAPES[options.case])]
    grads = [torch.randn(num_tokens, width, dtype=torch.bfloat16) for _, width in matrices(SHAPES[options.case])]
    for turn in range(runs + 1):
        for form, forward in forms.items():
            for name, of in layers.items():
                started = time.perf_counter()
                for layer, x, grad in zip(of, inputs, grads):
                    forward(layer, x).backward(grad)
                # The first turn warms up.
                if turn:
                    seconds.setdefault(f"{form}, {name}", []).append(time.perf_counter() - started)
                else:
                    num_bytes[f"{form}, {name}"] = sum(sum(kept_storages(layer, forward, x).values()) for layer, x in zip(of, inputs))
    medians = {name: statistics.median(of) for name, of in seconds.items()}
    result = {
        "num_tokens": num_tokens, "probability": PROBABILITY, "machine": describe_machine("cpu"), "seconds": seconds, "medians": medians,
        "kept_bytes": num_bytes,
    }  # fmt: skip
    write_result(options, "lora_dropout", result, dtype="bfloat16")
    for name, median in medians.items():
        print(f"{name:16s} {median * 1e3:8.1f} ms   {num_bytes[name] / 1e6:7.1f} MB kept")
    print(last_line(added_time_ratio=added(medians), added_memory_ratio=added(num_bytes)))


def added(figures: dict[str, Any]) -> float | None:
    """What dropout adds to giong's figure, over what it adds to PEFT's."""
    of_peft = figures["peft, dropout"] - figures["peft, plain"]
    return (figures["giong, dropout"] - figures["giong, plain"]) / of_peft if of_peft > 0 else None


if __name__ == "__main__":
    main()
