"""How fast outputs are scored: all four style witnesses on texts of 150 words from the bundled voices, in one process.

    OMP_NUM_THREADS=1 python benchmarks/scoring_speed.py [--outputs N] [--quick]

Writes benchmarks/results/scoring_speed-bundled.json and ends with one line of key=value pairs.
"""

from __future__ import annotations

import os
import random
import time

from measuring import describe_machine, last_line, parser, write_result
from recording import peak_memory_bytes

from giong import samples
from giong.evaluation.metrics.style import StyleVerifier, split_background

NUM_WORDS = 150
NUM_OUTPUTS, NUM_OUTPUTS_QUICK = 10_000, 100


def main() -> None:
    made = parser(__doc__, cases=["bundled"], default="bundled")
    made.add_argument("--outputs", type=int, help=f"texts to score (default {NUM_OUTPUTS:,}, with --quick {NUM_OUTPUTS_QUICK})")
    options = made.parse_args()
    num_outputs = options.outputs or (NUM_OUTPUTS_QUICK if options.quick else NUM_OUTPUTS)
    author, background = [row["text"] for row in samples.author_rows()], samples.background_voices()
    fit, calibration, _ = split_background(background, 100)
    half = len(author) // 2
    verifier = StyleVerifier().fit(author[:half], fit).calibrate(author[half:], calibration)
    words, draw = " ".join([*author, *(text for texts in background.values() for text in texts)]).split(), random.Random(0)
    starts = [draw.randrange(len(words) - NUM_WORDS) for _ in range(num_outputs)]
    outputs = [" ".join(words[start : start + NUM_WORDS]) for start in starts]
    started, cpu_started = time.perf_counter(), time.process_time()
    verifier.score(outputs)
    figures = {
        "seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu_started, "peak_memory_bytes": peak_memory_bytes("cpu"),
    }  # fmt: skip
    work = {"num_outputs": num_outputs, "num_words": NUM_WORDS, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS")}
    write_result(options, "scoring_speed", {"machine": describe_machine("cpu"), "work": work, **figures}, dtype=None)
    print(last_line(num_outputs=num_outputs, **figures))


if __name__ == "__main__":
    main()
