"""Rewrite the tables of docs/benchmarks.md from the results: `python benchmarks/tables.py`.

Only what stands in benchmarks/results is shown, quick runs left out, each with the machine that it was measured on.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from measuring import RESULTS, ROOT

from giong.errors import DataError
from giong.workspace import atomic_write, read_json


def markers(script: str) -> tuple[str, str]:
    """The lines of a page between which a script writes its tables."""
    return f"<!-- results: written by {script} -->", "<!-- end of results -->"


BEGIN, END = markers("benchmarks/tables.py")
GIGA = 1e9


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def figure(value: float | None, form: str = ".3g") -> str:
    return "–" if value is None else format(value, form)


def train_speed_section(result: Mapping[str, Any]) -> str:
    """Every arm's medians, and the ratios over the fastest peer."""
    rows = [
        [name, figure(value["tokens_per_second"], ".0f"), figure(value["peak_memory_bytes"] / GIGA, ".2f")]
        if value
        else [name, "failed", "–"]
        for name, value in result["medians"].items()
    ]
    return f"{table(['arm', 'tokens/s', 'peak memory, GB'], rows)}\n\n{train_speed_sentence(result)}"


def train_speed_sentence(result: Mapping[str, Any]) -> str:
    """The ratios, or why there are none."""
    if result["checks"]["problems"]:
        return "No ratio: the arms did not do the same work."
    if result["fastest_peer"] is None or result["tokens_per_second_ratio"] is None:
        return "No ratio: a side was not measured."
    sentence = (
        f"giong over `{result['fastest_peer']}`: {figure(result['tokens_per_second_ratio'])} times the tokens per second, "
        f"{figure(result['peak_memory_ratio'])} of the peak memory; {figure(result['roofline_share'], '.0%')} of the matrix rate."
    )
    if result.get("tokens_per_second_ratio_half") is not None:
        half = (figure(result[f"{name}_ratio_half"]) for name in ("tokens_per_second", "peak_memory"))
        sentence += " With half the tokens per pass {} times at {}.".format(*half)
    for one in result.get("by_peer", {}).values():
        if one["setting"] != result["fastest_peer"]:
            sentence += f" Over `{one['setting']}` {figure(one['tokens_per_second_ratio'])} times at {figure(one['peak_memory_ratio'])}."
    if result["checks"]["first_loss_difference"] is None:
        sentence += " Not checked: that the first losses agree."
    return sentence


def roofline_section(result: Mapping[str, Any]) -> str:
    """Rate, share and where the time of a step goes."""
    if not result["medians"]:
        return "The measurement failed."
    rows = [[group, figure(share, ".0%")] for group, share in result["profile_shares"].items()]
    sentence = (
        f"{figure(result['medians'].get('roofline_share'), '.0%')} of the matrix rate "
        f"({figure(result['matrix_flops_per_second'] / 1e12)} TFLOP/s at these shapes): {figure(result['medians']['tokens_per_second'], '.0f')} of "
        f"{figure(result['roof_tokens_per_second'], '.0f')} tokens/s."
    )
    return f"{sentence}\n\n{table(['part of a step', 'share of time'], rows)}"


def scaling_section(result: Mapping[str, Any]) -> str:
    """One row per point."""
    rows = []
    for point in result["points"]:
        reached = point["medians"]
        figures = (
            [
                figure(reached["tokens_per_second"], ".0f"),
                figure(reached["peak_memory_bytes"] / GIGA, ".2f"),
                figure(reached.get("roofline_share"), ".0%"),
            ]
            if reached
            else ["failed", "–", "–"]
        )
        rows.append([f"{point['value']:,}", *figures])
    return table([result["work"]["quantity"], "tokens/s", "peak memory, GB", "share of the matrix rate"], rows)


def estimates_section(result: Mapping[str, Any]) -> str:
    """One row per token budget: predicted and measured, and by how much too much (+) or too little was predicted."""
    rows, tolerances = [], result["tolerances"]
    for point in result["points"]:
        predicted, reached, errors = point["predicted"], point["medians"], point["errors"]
        row = [f"{point['max_tokens_per_pack']:,}", figure(predicted["peak_memory_bytes"] / GIGA, ".2f")]
        row += [
            figure(reached["peak_memory_bytes"] / GIGA, ".2f") if reached else "failed",
            error_cell(errors, tolerances, "peak_memory_bytes"),
        ]
        row += [figure(predicted["tokens_per_second"], ".0f"), figure(reached["tokens_per_second"] if reached else None, ".0f")]
        rows.append([*row, error_cell(errors, tolerances, "tokens_per_second")])
    columns = ["tokens per pass", "GB predicted", "GB measured", "error", "tokens/s predicted", "tokens/s measured", "error"]
    promised = f"{tolerances['peak_memory_bytes']:.0%} of the memory and {tolerances['tokens_per_second']:.0%} of the speed"
    return table(columns, rows) + outside_sentence(rows, promised)


def error_cell(errors: Mapping[str, float | None], tolerances: Mapping[str, float], name: str) -> str:
    """In bold where it is outside of what is promised. To a tenth: what misses by less than half a per cent must not look as if it were kept."""
    error = errors[name]
    return f"**{error:+.1%}**" if error is not None and abs(error) > tolerances[name] else figure(error, "+.1%")


def outside_sentence(rows: Sequence[Sequence[str]], promised: str) -> str:
    return f"\n\nIn bold: outside of what is promised, {promised}." if any("**" in cell for row in rows for cell in row) else ""


def announced_section(result: Mapping[str, Any]) -> str:
    """One row per run of the story, the smallest first."""
    rows, tolerances = [], result["tolerances"]
    for run in sorted(result["runs"], key=lambda run: run["num_rows"]):
        row = [str(run["num_rows"])]
        for name, form, unit in (("peak_memory_bytes", ".2f", GIGA), ("seconds", ".0f", 1.0)):
            row += [figure(run[side][name] / unit, form) for side in ("announced", "taken")]
            row.append(error_cell(run["errors"], tolerances, name))
        rows.append(row)
    promised = f"{tolerances['peak_memory_bytes']:.0%} of the memory and {tolerances['seconds']:.0%} of the time"
    return table(["rows", "GB announced", "GB taken", "error", "s announced", "s taken", "error"], rows) + outside_sentence(rows, promised)


def allocator_section(result: Mapping[str, Any]) -> str:
    """One row per allocator."""
    rows = [
        [
            name, figure(value["tokens_per_second"], ".0f"), figure(value["peak_memory_bytes"] / GIGA, ".2f"),
            figure(result["page_faults_per_step"].get(name), ",.0f"),
        ] if value else [name, "failed", "–", "–"]
        for name, value in result["medians"].items()
    ]  # fmt: skip
    missing = "".join(f"\n\n{name}: not measured, {reason}." for name, reason in result["missing"].items())
    return table(["allocator", "tokens/s", "peak memory, GB", "page faults per step"], rows) + missing


SECTIONS = {
    "train_speed": train_speed_section, "roofline": roofline_section, "scaling": scaling_section, "estimates": estimates_section,
    "announced": announced_section, "allocator": allocator_section,
}  # fmt: skip


def machine_line(machine: Mapping[str, Any]) -> str:
    """Where it was measured, in one line."""
    flags = [name for name in ("amx", "avx512_bf16") if machine.get(name)]
    memory = f"{machine['memory_bytes'] / GIGA:.0f} GB" if machine["memory_bytes"] else "memory unknown"
    parts = [machine.get("gpu") or machine["cpu"], f"{machine['cores']} cores", *flags, memory]
    return f"{', '.join(parts)}; torch {machine['packages']['torch']}, transformers {machine['packages']['transformers']}"


def page(results: Sequence[Mapping[str, Any]]) -> str:
    """All sections in the order of `SECTIONS`, then by case; quick runs are left out."""
    parts = []
    for benchmark, section in SECTIONS.items():
        for result in sorted((r for r in results if r["benchmark"] == benchmark and not r["quick"]), key=lambda r: r["case"]):
            parts.append(f"### {benchmark}, {result['case']}, {result['dtype']}\n\n{machine_line(result['machine'])}\n\n{section(result)}")
    return "\n\n".join(parts) if parts else "Nothing has been measured yet."


def replace_between(text: str, inserted: str, place: str, between: tuple[str, str] = (BEGIN, END)) -> str:
    """`text` with what stands between the two markers replaced. Raises DataError where a marker is missing."""
    before, begin, rest = text.partition(between[0])
    _, end, after = rest.partition(between[1])
    if not (begin and end):
        remedy = "Put `{}` and `{}` on lines of their own.".format(*between)
        raise DataError("The markers of the tables are missing", place=place, remedy=remedy)
    return f"{before}{begin}\n\n{inserted}\n\n{end}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "benchmarks.md")
    options = parser.parse_args()
    results = [read_json(path) for path in sorted(options.results.glob("*.json"))]
    written = replace_between(options.page.read_text(encoding="utf-8"), page(results), str(options.page))
    with atomic_write(options.page, "w") as stream:
        stream.write(written)
    print(f"{options.page}: {len([r for r in results if not r.get('quick')])} results")


if __name__ == "__main__":
    main()
