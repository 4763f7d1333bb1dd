"""Write the demo's results into README.md and README.vi.md, between the markers: nothing there is typed by hand.

giong demo && python benchmarks/readme_results.py --demo giong-demo
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from measuring import ROOT
from tables import replace_between, table

HEADS = {
    "README.md": ("request", "base as it is", "fine-tuned", "the author"),
    "README.vi.md": ("yêu cầu", "mô hình gốc", "đã tinh chỉnh", "tác giả"),
}


def percent(interval: dict | None) -> str:
    if interval is None:
        return "not measured"
    value, low, high = (round(100 * interval[name]) for name in ("point", "low", "high"))
    return f"{value}%" if low == high == value else f"{value}% [{low}% to {high}%]"


def arm_table(evaluation: dict) -> str:
    rows = []
    for arm in [*evaluation["arms"], evaluation["author"]]:
        is_author = arm["name"] == "author"
        recall = f"key recall {arm['key_recall']['point']:.0%}"
        meaning = recall if is_author else f"{recall}, chrF++ {arm['chrf']['point']:.1f}"
        failed = ", ".join(gate["name"].replace("_", " ") for gate in arm["gates"] if gate["status"] == "fail")
        cells = [
            arm["label"],
            percent(arm["style_gap_closed"]),
            meaning,
            f"{arm['length_ratio']:.2f}",
            "(reference)" if is_author else failed,
        ]
        if arm["name"] == "fine_tuned":
            cells[:2] = (f"**{cell}**" for cell in cells[:2])
        rows.append(cells)
    return table(["arm", "style gap closed [95 % interval]", "meaning kept", "length ratio", "gates failed"], rows)


def sample_table(samples: list[dict], heads: tuple[str, ...]) -> str:
    def cell(text: str) -> str:
        return re.sub(r"\s+", " ", text).replace("|", "\\|").strip()

    rows = []
    for sample in samples:
        request = sample["request"].partition("\n\n")[2] or sample["request"]
        rows.append([cell(text) for text in (request, *sample_texts(sample))])
    return table(heads, rows)


def sample_texts(sample: dict) -> tuple[str, str, str]:
    return sample["answers"]["base"], sample["answers"]["fine_tuned"], sample["author"]


def between(marker: str) -> tuple[str, str]:
    return f"<!-- {marker} -->", f"<!-- /{marker} -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, required=True)
    found = json.loads((parser.parse_args().demo / "evaluation.json").read_text(encoding="utf-8"))
    for name, heads in HEADS.items():
        path = ROOT / name
        text = replace_between(path.read_text(encoding="utf-8"), arm_table(found["evaluation"]), name, between("results"))
        path.write_text(replace_between(text, sample_table(found["samples"], heads), name, between("samples")), encoding="utf-8")
    print(f"{found['verdict']['decision']}: {found['verdict']['reason']}")


if __name__ == "__main__":
    main()
