"""What it costs that packs differ in length: bf16 products on a CPU write their code anew for every shape.

    python benchmarks/new_shapes.py [--quick] [--repeats N]

Full training passes of the bundled base over rows of ever new lengths, packs of at most 1,024 tokens; tokens of packs, rows in attention and
positions at the head rounded up to a multiple of 1, 16, 32, 64 and 128, one process each, interleaved. Writes benchmarks/results/new_shapes-bundled.json and ends with one line:
speed and memory of the shipped multiple over those of 1.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time

from measuring import ALLOCATOR, clean_environment, describe_machine, last_line, num_repeats, parser, write_result
from recording import peak_memory_bytes

MULTIPLES = (1, 16, 32, 64, 128)
WARM_UP = 6
DTYPE = "bfloat16"


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measured(int(sys.argv[2]), int(sys.argv[3]))))
        return
    options = parser(__doc__, cases=["bundled"], default="bundled", repeats=3).parse_args()
    num_passes = 10 if options.quick else 40
    found: dict[int, list[dict[str, float]]] = {multiple: [] for multiple in MULTIPLES}
    for _ in range(num_repeats(options)):
        for multiple in MULTIPLES:
            command = [sys.executable, __file__, "--measure", str(multiple), str(num_passes)]
            done = subprocess.run(command, env=clean_environment(dict(ALLOCATOR)), capture_output=True, text=True, check=True)
            found[multiple].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"multiple of {multiple}: {found[multiple][-1]}", flush=True)
    medians = {str(multiple): {name: statistics.median(row[name] for row in rows) for name in rows[0]} for multiple, rows in found.items()}
    from giong.engine.shapes import LENGTH_MULTIPLE

    ours, without = medians[str(LENGTH_MULTIPLE)], medians["1"]
    ratios = {f"{name}_ratio": ours[name] / without[name] for name in ours}
    result = {"machine": describe_machine("cpu"), "shipped": LENGTH_MULTIPLE, "medians": medians, **ratios, "measurements": found}
    write_result(options, "new_shapes", result, dtype=DTYPE)
    print(last_line(**ratios))


def measured(multiple: int, num_passes: int) -> dict[str, float]:
    """Tokens per second after the warm-up, and the peak memory of this process."""
    import numpy as np
    import torch

    from giong.config import MethodConfig, ModelConfig
    from giong.engine import shapes, step
    from giong.methods import METHODS
    from giong.models.load import load_model
    from giong.models.rows import Row
    from giong.objectives import OBJECTIVES

    if multiple != shapes.LENGTH_MULTIPLE:
        # One multiple for all lengths.
        shapes.LENGTH_MULTIPLE, shapes.LENGTHS_PER_DOUBLING = multiple, 2**30
    model = METHODS["full"].apply(load_model(ModelConfig(), dtype=getattr(torch, DTYPE)).model, MethodConfig(name="full"), seed=0).model
    random = np.random.default_rng(0)
    seconds, tokens = 0.0, 0
    for number in range(num_passes):
        rows = []
        for length in random.integers(150, 330, 8):
            weights = np.zeros(length, np.float32)
            weights[length // 2 :] = 1
            rows.append(Row(random.integers(0, model.config.vocab_size, length), weights))
        start = time.perf_counter()
        step.backward(model, rows, OBJECTIVES["sft"].loss, 1024)
        if number >= WARM_UP:
            seconds, tokens = seconds + time.perf_counter() - start, tokens + sum(map(len, rows))
    return {"tokens_per_second": tokens / seconds, "peak_memory_bytes": peak_memory_bytes("cpu")}


if __name__ == "__main__":
    main()
