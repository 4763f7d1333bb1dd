"""How fast outputs are scored: all four style witnesses on texts of 150 words from the bundled voices, in one process on one thread.

OMP_NUM_THREADS=1 python benchmarks/scoring_speed.py --outputs 10000
"""

from __future__ import annotations

import argparse
import random
import resource
import time

from measuring import last_line

from giong import samples
from giong.evaluation.metrics.style import StyleVerifier, split_background

NUM_WORDS = 150


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outputs", type=int, default=10_000)
    options = parser.parse_args()
    author, background = [row["text"] for row in samples.author_rows()], samples.background_voices()
    fit, calibration, _ = split_background(background, 100)
    half = len(author) // 2
    verifier = StyleVerifier().fit(author[:half], fit).calibrate(author[half:], calibration)
    words, draw = " ".join([*author, *(text for texts in background.values() for text in texts)]).split(), random.Random(0)
    starts = [draw.randrange(len(words) - NUM_WORDS) for _ in range(options.outputs)]
    outputs = [" ".join(words[start : start + NUM_WORDS]) for start in starts]
    started, cpu_started = time.perf_counter(), time.process_time()
    verifier.score(outputs)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(last_line(outputs=float(options.outputs), seconds=seconds, cpu_seconds=cpu_seconds, peak_mib=peak_mib))


if __name__ == "__main__":
    main()
