"""Results on standard output: the table of arms, the verdict, samples side by side, the sizing."""

from __future__ import annotations

from typing import Any

from giong.workspace import Project, read_json

MAX_SAMPLE_WORDS = 180


def show_results(project: Project, *, with_samples: bool = False) -> None:
    """The table, the verdict and the report's path; plain text that also reads well in a file."""
    from rich.console import Console
    from rich.table import Table

    from giong.evaluation.report.checks import tasks_line
    from giong.evaluation.report.table import arms_table, pools_line, verifier_line

    stored = read_json(project.root / "evaluation.json")
    console = Console(width=None if Console().is_terminal else 150, highlight=False)
    header, *rows = stored["table"] if "table" in stored else arms_table(stored["evaluation"])
    table = Table(*header, title="", title_justify="left")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if "evaluation" in stored:
        found = stored["evaluation"]
        said = [
            verifier_line(found),
            found["style_note"],
            found.get("coherence_note", ""),
            pools_line(found),
            tasks_line(stored.get("tasks") or {}),
        ]
        console.print("\n".join(filter(None, said)), markup=False)
    if with_samples:
        show_samples(stored, console)
    verdict = stored["verdict"]
    console.print(f"\n[bold]Verdict: {verdict['decision']}[/bold]")
    console.print(verdict["reason"], markup=False)
    if project.report_path.is_file():
        console.print(f"\nReport: {project.report_path}", markup=False, soft_wrap=True)


def show_samples(stored: dict[str, Any], console: Any) -> None:
    """The first test requests as they came out: request, base, best prompt, fine-tuned, author."""
    from rich.columns import Columns
    from rich.panel import Panel
    from rich.text import Text

    labels = {arm["name"]: arm["label"] for arm in stored["evaluation"]["arms"]}
    best = stored["evaluation"]["best_prompt_arm"]
    shown = list(dict.fromkeys(["base", best or "few_shot", "fine_tuned"]))
    for number, sample in enumerate(stored["samples"], start=1):
        console.print(f"\n[bold]Sample {number} of {len(stored['samples'])}[/bold] (the first test requests, not chosen)")
        console.print(Text(sample["request"], style="dim"))
        texts = [(labels[name], sample["answers"][name]) for name in shown if name in sample["answers"]] + [
            ("the author", sample["author"])
        ]
        width = max(30, console.width // len(texts) - 2)
        console.print(Columns([Panel(Text(_shortened(text)), title=label, width=width) for label, text in texts]))


def _shortened(text: str) -> str:
    """A text that will not stop is cut for the terminal; the report has all of it."""
    words = text.split(" ")
    return text if len(words) <= MAX_SAMPLE_WORDS else f"{' '.join(words[:MAX_SAMPLE_WORDS])} [{len(words) - MAX_SAMPLE_WORDS} more words]"


def show_sizing(project: Project) -> None:
    """The learning curve in words, the forecast, and the back ends."""
    from rich.console import Console
    from rich.table import Table

    from giong.sizing.units import format_bytes, format_range, format_seconds, format_usd

    result = project.step_result("size") or {}
    console = Console(highlight=False)
    table = Table("rows", "gain over untuned, nats per token (P50)", "P10 to P90", title="forecast on held-out text", title_justify="left")
    for forecast in result["forecasts"]:
        gain = forecast["gain"]
        label = f"{forecast['num_rows']}{' (speculative)' if forecast['speculative'] else ''}"
        table.add_row(label, f"{gain['point']:.3f}", f"{gain['low']:.3f} to {gain['high']:.3f}")
    console.print(table)
    if note := result["curve"].get("note"):
        console.print(note)
    table = Table("back end", "time", "cost", "memory", "basis", title="the same training elsewhere", title_justify="left")
    for row in result["backends"]:
        table.add_row(
            row["name"], format_range(format_seconds(row["low_seconds"]), format_seconds(row["high_seconds"])),
            format_range(format_usd(row["low_usd"]), format_usd(row["high_usd"])),
            format_bytes(row["peak_memory_bytes"]) + ("" if row["fits"] in (True, None) else " (does not fit)"), row["basis"],
        )  # fmt: skip
    console.print(table)
