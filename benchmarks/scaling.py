"""How giong's speed and memory change with row length, vocabulary and rank: LoRA, one process per point.

    python benchmarks/scaling.py --case length|vocabulary|rank [--quick] [--repeats N]

Everything but the named quantity stays: the 135M shape, 8,192 tokens a step, half of every row with loss. Writes
benchmarks/results/scaling-CASE.json and ends with the last point over the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from measuring import (
    GIONG,
    MAX_TOKENS_PER_PACK,
    TRAINING_OPTIONS,
    Arm,
    choose_device,
    choose_dtype,
    describe_machine,
    interleave,
    last_line,
    measure,
    medians,
    model_folder,
    num_repeats,
    parser,
    train_settings,
    write_result,
)
from recording import Job
from shapes import LORA_R, RowMix

STEP_TOKENS = 8192
POINTS = {
    "length": (256, 512, 1024, 2048, 4096, 8192),
    "vocabulary": (8192, 32768, 65536, 131072, 262144),
    "rank": (4, 16, 64, 192),
}
"""Above 192 a rank would be larger than the shape's key matrix."""
TINY_POINTS = {"length": (64, 128), "vocabulary": (512, 1024), "rank": (4, 8)}
"""What `--shape tiny` measures: it shows within seconds that the script runs."""


def rows_of(length: int, step_tokens: int) -> RowMix:
    """Rows of one length that make up a step, half of each with loss."""
    return RowMix(num_rows=max(1, step_tokens // length), min_tokens=length, max_tokens=length, answer_share=0.5)


def job_at(
    quantity: str, value: int, *, shape: str, step_tokens: int, device: str, dtype: str, steps: Mapping[str, int], settings: dict[str, Any]
) -> Job:
    """The job of one point: the chosen quantity at `value`, the others at their usual."""
    length = value if quantity == "length" else 512 if shape != "tiny" else 64
    folder, config = model_folder(shape, **({"vocab_size": value} if quantity == "vocabulary" else {}))
    return Job(
        model=str(folder), vocab_size=config["vocab_size"], method="lora", lora_r=value if quantity == "rank" else LORA_R,
        mix=rows_of(length, step_tokens), device=device, max_tokens_per_pack=MAX_TOKENS_PER_PACK[device], settings=settings,
        dtype=dtype, matrix_rate=True, **steps,
    )  # fmt: skip


def points_of(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Medians per point, in order; None where a point failed."""
    return [{"value": int(name), "medians": medians(values)} for name, values in found.items()]


def main() -> None:
    made = parser(__doc__, cases=list(POINTS), default="length", repeats=3, honours=tuple(TRAINING_OPTIONS))
    made.add_argument("--shape", choices=("135m", "tiny"), default="135m", help="tiny tests the script, and is --quick")
    options = made.parse_args()
    options.quick |= options.shape == "tiny"
    device = choose_device(options.device)
    options.dtype = choose_dtype(options.dtype, device)
    tiny = options.shape == "tiny"
    values = (TINY_POINTS if tiny else POINTS)[options.case]
    values = (values[0], values[-1]) if options.quick else values
    step_tokens, settings = 256 if tiny else STEP_TOKENS, train_settings(options)
    steps = {"num_warmup_steps": 1 if options.quick else 2, "num_steps": 1 if options.quick else 4}
    arms = [Arm(str(value), GIONG.script, settings, GIONG.environment) for value in values]
    result = {
        "machine": describe_machine(device), "work": {
            "quantity": options.case, "shape": options.shape, "num_tokens_per_step": step_tokens, "method": "lora", "settings": settings,
            "steps": steps, "environment": GIONG.environment,
        },
    }  # fmt: skip

    def measure_arm(arm: Arm, round_number: int) -> dict[str, Any]:
        job = job_at(
            options.case,
            int(arm.name),
            shape=options.shape,
            step_tokens=step_tokens,
            device=device,
            dtype=options.dtype,
            steps=steps,
            settings=settings,
        )
        return measure(arm, job)

    def keep(found: dict[str, list[dict[str, Any]]]) -> None:
        write_result(options, "scaling", {**result, "points": points_of(found), "measurements": found}, dtype=options.dtype)

    points = points_of(interleave(arms, num_repeats(options), measure_arm, keep))
    for point in points:
        reached = point["medians"]
        said = f"{reached['tokens_per_second']:10.1f} tokens/s {reached['peak_memory_bytes'] / 1e9:8.2f} GB" if reached else "    failed"
        print(f"{options.case} {point['value']:>7d} {said}")
    first, last = points[0]["medians"], points[-1]["medians"]
    ratios = {name: last[name] / first[name] if first and last else None for name in ("tokens_per_second", "peak_memory_bytes")}
    print(
        last_line(
            **{f"from_{options.case}": str(values[0]), f"to_{options.case}": str(values[-1])},
            tokens_per_second_ratio=ratios["tokens_per_second"], peak_memory_ratio=ratios["peak_memory_bytes"],
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
