"""How fast and how lean giong trains, against TRL with PEFT and LLaMA-Factory on the same work.

    python benchmarks/train_speed.py --case lora-0.5b [--quick] [--repeats N]

Every measurement is a process of its own; arms are interleaved; medians are compared. Before anything is compared, the arms
must have trained on the same tokens with the same number of tokens in the loss, and giong's and an unpacked peer's first losses on
the same weights must agree; where no arm ran that could show the latter, the result and the output say so. Writes
benchmarks/results/train_speed-CASE.json and ends with one line: giong over the fastest setting that a user of the peer has,
and the share of this machine's matrix rate that giong reached.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from measuring import (
    BUILD,
    GIONG,
    MAX_TOKENS_PER_PACK,
    TRAINING_OPTIONS,
    Arm,
    choose_device,
    choose_dtype,
    describe_machine,
    interleave,
    job_of,
    known_cases,
    last_line,
    measure,
    medians,
    num_repeats,
    parser,
    peer_batch_rows,
    train_settings,
    write_result,
)
from peers import Peers, ensure_llamafactory, ensure_peers, llamafactory_arms, trl_arms
from shapes import CASES, MIXES

LOSS_TOLERANCE = 0.02
"""Nats per token between giong's and TRL's first loss in the same dtype: rounding explains less, a wrong mask or shift more."""

GRAD_NORM_TOLERANCE = 0.05
"""Relative, for full training only: an adapter's first gradients depend on how it was drawn."""

WORK = {
    "trl-default": "SFTTrainer's own defaults: fp32 weights, bf16 autocast, gradient checkpointing",
    "trl-unpacked": "weights in the dtype of the run, no checkpointing",
    "trl-packed": "the same with packing",
    "trl-packed+malloc": "the same with packing and giong's allocator settings, which TRL's user does not have: what is left is not the allocator's",
    "trl-liger": "trl-unpacked with liger-kernel",
    "trl-liger-packed": "trl-packed with liger-kernel",
    "llamafactory": "LLaMA-Factory in an environment of its own, bf16 autocast in a run of bf16, no checkpointing, unpacked",
    "giong": "as giong's supervisor starts its workers, allocator settings included",
    "giong-half": "the same with half the tokens per pass: what less memory costs",
}
OURS = ("giong", "giong-half")
BORROWED = ("trl-packed+malloc",)
"""Arms with what a peer's user does not get: shown, but not the peer's fastest setting."""

UNPACKED = ("trl-unpacked", "trl-liger", "llamafactory")
"""A peer's arms whose first loss must be giong's: in the same number format, and no row sees another, as packed ones may without flash-attn."""

NOT_CHECKED = f"not checked: giong and one of {', '.join(UNPACKED)} did not both run, so nothing shows that the first losses agree"


def steps_of(arm: Arm, *, quick: bool, device: str) -> dict[str, int]:
    """Few steps where one takes a minute; the warm-up of giong's covers compilation and its measured choices."""
    if device == "cuda":
        return {"num_warmup_steps": 5, "num_steps": 5 if quick else 10}
    if arm.name in OURS:
        return {"num_warmup_steps": 2, "num_steps": 2 if quick else 6}
    return {"num_warmup_steps": 1, "num_steps": 1 if quick else 2}


def same_work(found: Mapping[str, Sequence[Mapping[str, Any]]], method: str) -> dict[str, Any]:
    """What shows that the arms do the same work, from the first measurement of each; `problems` is empty when they do."""
    first = {name: values[0] for name, values in found.items() if values and "failed" not in values[0]}
    counts = {
        name: [figures["num_tokens_per_step"], figures["num_loss_tokens_per_step"], figures["rows_digest"]]
        for name, figures in first.items()
    }
    problems = [] if len({tuple(count) for count in counts.values()}) <= 1 else [f"rows or tokens differ between arms: {counts}"]
    our_name, theirs_names = next((name for name in OURS if name in first), None), [name for name in UNPACKED if name in first]
    checks: dict[str, Any] = {
        "tokens_losses_rows": counts, "first_losses": {name: figures["first_loss"] for name, figures in first.items()},
        "loss_tolerance_nats": LOSS_TOLERANCE, "first_loss_difference": None,
    }  # fmt: skip
    if our_name is None or not theirs_names:
        return {**checks, "same_work": NOT_CHECKED, "problems": problems}
    ours = first[our_name]
    checks |= {
        "first_loss_difference": ours["first_loss"] - first[theirs_names[0]]["first_loss"],
        "same_work": f"{our_name} checked against {', '.join(theirs_names)}",
    }
    for name in theirs_names:
        theirs = first[name]
        difference = ours["first_loss"] - theirs["first_loss"]
        if not abs(difference) <= LOSS_TOLERANCE:
            problems.append(
                f"first losses differ by {difference:+.4f} nats: {our_name} {ours['first_loss']:.4f}, {name} {theirs['first_loss']:.4f}"
            )
        if method == "full" and theirs["first_grad_norm"]:
            relative = ours["first_grad_norm"] / theirs["first_grad_norm"] - 1
            # As with the losses, the first arm's stands in the result.
            checks = {"grad_norm_tolerance": GRAD_NORM_TOLERANCE, "first_grad_norm_difference": relative} | checks
            if not abs(relative) <= GRAD_NORM_TOLERANCE:
                problems.append(f"first gradient norms differ by {relative:+.1%}: {our_name} and {name}")
        elif method == "lora" and ours["num_trainable"] != theirs["num_trainable"]:
            problems.append(f"adapters differ: {our_name} {ours['num_trainable']} and {name} {theirs['num_trainable']} numbers")
    return {**checks, "problems": problems}


def peer_of(arm: str) -> str:
    """Whose setting an arm is: "trl" for "trl-packed"."""
    return arm.partition("-")[0]


def compare(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Medians per arm, and giong over the fastest arm that a peer's user has, and over each peer's own fastest (`by_peer`); a ratio is
    None where a side is missing."""
    table = {name: medians(values) for name, values in found.items() if values}
    ours, half = table.get("giong"), table.get("giong-half")
    theirs = {name: value for name, value in table.items() if value and name not in OURS}
    by_speed = sorted((name for name in theirs if name not in BORROWED), key=lambda name: -theirs[name]["tokens_per_second"])
    fastest = next(iter(by_speed), None)
    fastest_of = {peer_of(name): name for name in reversed(by_speed)}

    def over(name: str | None, figure: str, one: dict[str, Any] | None = ours) -> float | None:
        return one[figure] / theirs[name][figure] if one and name else None

    borrowed = next((name for name in BORROWED if name in theirs), None)
    return {
        "medians": table, "fastest_peer": fastest, "tokens_per_second_ratio": over(fastest, "tokens_per_second"),
        "peak_memory_ratio": over(fastest, "peak_memory_bytes"), "roofline_share": ours.get("roofline_share") if ours else None,
        "tokens_per_second_ratio_same_allocator": over(borrowed, "tokens_per_second"),
        "tokens_per_second_ratio_half": over(fastest, "tokens_per_second", half), "peak_memory_ratio_half": over(fastest, "peak_memory_bytes", half),
        "by_peer": {
            peer: {
                "setting": name, "tokens_per_second_ratio": over(name, "tokens_per_second"), "peak_memory_ratio": over(name, "peak_memory_bytes"),
            }
            for peer, name in sorted(fastest_of.items())
        },
    }  # fmt: skip


def summarise(found: Mapping[str, Sequence[Mapping[str, Any]]], method: str) -> dict[str, Any]:
    """What a result says of its measurements: what shows that the work is the same, and the comparison, without ratios where it is not."""
    checks, compared = same_work(found, method), compare(found)
    if checks["problems"]:
        compared |= {name: None for name in compared if "_ratio" in name} | {"by_peer": {}}
    return {"checks": checks, **compared}


def chosen_arms(options: argparse.Namespace, device: str, peers: Peers, llamafactory: Peers) -> list[Arm]:
    """giong and the peers' arms; `--arms` keeps those it names."""
    mix = MIXES[CASES[options.case].mix]
    batch_rows = options.peer_rows or peer_batch_rows(mix, MAX_TOKENS_PER_PACK[device])
    settings = train_settings(options)
    fewer = {**settings, "max_tokens_per_pack": settings.get("max_tokens_per_pack", MAX_TOKENS_PER_PACK[device]) // 2}
    ours = [dataclasses.replace(GIONG, settings=settings), dataclasses.replace(GIONG, name="giong-half", settings=fewer)]
    arms = [*ours, *trl_arms(peers, device, options.dtype, batch_rows), *llamafactory_arms(llamafactory, options.dtype, batch_rows)]
    if options.arms:
        wanted = options.arms.split(",")
        if unknown := set(wanted) - {arm.name for arm in arms}:
            sys.exit(f"--arms {', '.join(sorted(unknown))}: not among {', '.join(arm.name for arm in arms)}")
        arms = [arm for arm in arms if arm.name in wanted]
    return arms


def main() -> None:
    made = parser(__doc__, cases=known_cases(), default="lora-0.5b", repeats=3, honours=tuple(TRAINING_OPTIONS))
    made.add_argument("--peers", type=Path, default=BUILD / "peers", help="the peers' environment, made on first use (default build/peers)")
    made.add_argument("--arms", help="only these, separated by commas (default all)")
    made.add_argument(
        "--peer-rows", type=int, help="rows per pass of an unpacked peer (default what giong's token budget holds, at most 8)"
    )
    options = made.parse_args()
    case = CASES[options.case]
    device = choose_device(options.device, case)
    options.dtype = choose_dtype(options.dtype, device)
    machine = describe_machine(device)
    peers = ensure_peers(options.peers, device)
    if options.arms is None or "llamafactory" in options.arms.split(","):
        llamafactory = ensure_llamafactory(options.peers / "llamafactory", device)
    else:
        llamafactory = Peers(None, notes={"llamafactory": "not asked for"})
    notes = peers.notes | llamafactory.notes
    for name, note in notes.items():
        print(f"{name}: {note}", file=sys.stderr)
    arms = chosen_arms(options, device, peers, llamafactory)
    result: dict[str, Any] = {
        "machine": machine, "peers": {"versions": peers.versions, "llamafactory_versions": llamafactory.versions, "notes": notes},
        "work": {
            "method": case.method, "shape": case.shape, "mix": case.mix, "rows": dataclasses.asdict(MIXES[case.mix]),
            "arms": {arm.name: {"is": WORK[arm.name], "settings": arm.settings, "environment": arm.environment} for arm in arms},
        },
    }  # fmt: skip

    def measure_arm(arm: Arm, round_number: int) -> dict[str, Any]:
        steps = steps_of(arm, quick=options.quick, device=device)
        return measure(arm, job_of(case, device, dtype=options.dtype, settings=arm.settings, matrix_rate=arm.name == "giong", **steps))

    def keep(found: dict[str, list[dict[str, Any]]]) -> None:
        summary = summarise(found, case.method)
        write_result(options, "train_speed", {**result, **summary, "measurements": found}, dtype=options.dtype)
        if problems := summary["checks"]["problems"]:
            sys.exit("The arms do not do the same work, so nothing is compared: " + "; ".join(problems))

    summary = summarise(interleave(arms, num_repeats(options), measure_arm, keep), case.method)
    print_table(summary)
    checked = {"same_work": "not_checked" if summary["checks"]["first_loss_difference"] is None else "checked"}
    print(last_line(**{name: summary[name] for name in ("tokens_per_second_ratio", "peak_memory_ratio", "roofline_share")}, **checked))


def print_table(summary: Mapping[str, Any]) -> None:
    for name, value in summary["medians"].items():
        figures = f"{value['tokens_per_second']:10.1f} tokens/s {value['peak_memory_bytes'] / 1e9:8.2f} GB" if value else "    failed"
        print(f"{name:20s} {figures}")
    print(f"fastest setting of a peer: {summary['fastest_peer'] or 'none was measured'}")
    for peer, one in summary["by_peer"].items():
        if one["tokens_per_second_ratio"] is not None:
            print(
                f"over {peer}'s ({one['setting']}): {one['tokens_per_second_ratio']:.2f} times at {one['peak_memory_ratio']:.3f} of the memory"
            )
    if (ratio := summary["tokens_per_second_ratio_same_allocator"]) is not None:
        print(f"over the peer with giong's allocator settings: {ratio:.2f} times the tokens per second")
    print(f"same work: {summary['checks']['same_work']}")


if __name__ == "__main__":
    main()
