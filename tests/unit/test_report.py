"""The report page: complete and incomplete contents, what a reader may rely on, and what must never get through."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from report_content import SAMPLES, arm, content, curve, evaluation, gates

from giong.evaluation.report import ReportContent, arms_table, curve_content, render, write_report
from giong.evaluation.report.axes import nice_ticks, tick_labels
from giong.evaluation.report.plots import MAX_LOSS_POINTS, forest_plot, learning_curve_plot, loss_plot
from giong.evaluation.report.sections import summary
from giong.evaluation.report.table import gate_value, gates_cell, pools_line, share, share_interval, signed_share_interval, verifier_line

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """Checks that every element is closed in order; keeps tags, attributes, visible text and table cells."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.tables: list[list[list[str]]] = []
        self.feed(source)
        self.close()
        assert not self.stack, f"never closed: {self.stack}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack[-1:] == [tag], f"</{tag}> inside {self.stack[-3:]}"
        self.stack.pop()
        self.text += " " if tag in ("td", "th", "dt", "dd", "p", "h1", "h2", "h3", "h4") else ""

    def handle_data(self, data):
        if "style" in self.stack:
            return
        self.text += data
        if "td" in self.stack or "th" in self.stack:
            self.tables[-1][-1][-1] += data

    def count(self, tag: str, kind: str) -> int:
        return sum(1 for name, attrs in self.tags if name == tag and kind in (attrs.get("class") or "").split())

    def one_line(self) -> str:
        return " ".join(self.text.split())


def page(**changes) -> Page:
    return Page(render(content(**changes)))


def cells(table: list[list[str]]) -> list[list[str]]:
    return [[" ".join(cell.split()) for cell in row] for row in table]


def test_the_whole_page_loads_and_runs_nothing():
    source = render(content())
    parsed = Page(source)
    assert source.lstrip().startswith("<!DOCTYPE html>")
    assert not [tag for tag, _ in parsed.tags if tag in ("script", "iframe", "object", "embed", "img", "base", "form")]
    for _, attrs in parsed.tags:
        assert not any(name.startswith("on") for name in attrs)
        for name in ("src", "href", "xlink:href", "action"):
            assert (attrs.get(name) or "#").startswith(("#", "data:,"))
    style = source[source.index("<style>") : source.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert "Content-Security-Policy" in source
    assert "not available" not in {text.lower() for text in re.findall(r'class="missing">(.*?):', source)}


def test_links_and_labels_lead_somewhere():
    parsed = page()
    ids = [attrs["id"] for _, attrs in parsed.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for _, attrs in parsed.tags:
        if (attrs.get("href") or "").startswith("#"):
            assert attrs["href"][1:] in ids
        assert set((attrs.get("aria-labelledby") or "").split()) <= set(ids)
    pictures = [attrs for tag, attrs in parsed.tags if tag == "svg"]
    assert len(pictures) == 3
    for attrs in pictures:
        assert attrs["role"] == "img"
        assert attrs["viewbox"].startswith("0 0 480 ")
        assert "width" not in attrs


MISSING = {
    "evaluation": "no arm has been evaluated",
    "curve": "no pilots have been run",
    "losses": "nothing has been trained yet",
    "samples": "no arm has answered",
    "journal": "no step has been done since the journal began",
    "costs": "no stage has been timed",
    "backends": "no estimate has been made",
    "usage": "no call has been measured",
    "bills": "no break-even",
    "data": "no writing has been imported",
    "hashes": "no hashes were recorded",
    "settings": "the settings were not recorded",
    "command": "was not recorded",
    "verdict": "Nothing has been decided yet",
}


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(ReportContent) if field.name not in ("project", "date")])
def test_each_part_may_be_missing(name):
    field = next(field for field in dataclasses.fields(ReportContent) if field.name == name)
    default = field.default_factory() if field.default is dataclasses.MISSING else field.default
    words = page(**{name: default}).one_line()
    assert MISSING.get(name, "") in words
    if name in MISSING:
        assert MISSING[name] not in page().one_line()


def test_a_content_with_nothing_in_it_says_so_everywhere():
    parsed = Page(render(ReportContent("Nothing yet", "2025-01-01")))
    for sentence in MISSING.values():
        assert sentence in parsed.one_line()
    assert not parsed.tables
    assert not [tag for tag, _ in parsed.tags if tag == "svg"]


def test_before_training_there_are_baselines_and_no_tuned_model():
    parsed = page(evaluation=evaluation(tuned=False), losses=[], verdict=None)
    words = parsed.one_line()
    assert "No tuned model has been measured yet; the best prompt (few-shot) closes 27% of the distance in style." in words
    assert "few-shot: ! warn: coherence" in words
    assert parsed.count("g", "arm") == 5


def test_hostile_texts_come_out_as_texts():
    evil = '<script>alert("x")</script><img src=x onerror=alert(1)>'
    spoiled = evaluation()
    spoiled["arms"][5]["label"] = evil
    spoiled["arms"][5]["gates"][0]["explanation"] = evil
    spoiled["notes"] = [evil]
    samples = [{"request": evil, "author": evil, "document_id": evil, "answers": {"fine_tuned": evil, evil: evil}}]
    full = content()
    parsed = page(
        project=evil, date=evil, author=evil, consent=evil, model_name=evil, evaluation=spoiled, samples=samples, notices=[evil],
        command=evil,
        verdict={"decision": evil, "reason": evil, "rule": evil, "numbers": {}},
        costs=[{"stage": evil, "seconds": 1.0, "usd": None, "tokens": 3}],
        data={
            **full.data, "entries": [{"place": evil, "status": "dropped", "reason": evil}],
            "synthesis": {"source": "teacher", "teacher": evil},
        },
        settings={"config": {evil: {evil: evil}}, "resolved": [{"name": evil, "value": evil, "reason": evil}]}, hashes={evil: evil},
        backends=[{**full.backends[0], "name": evil, "source": evil, "notes": [evil]}], bills=[{**full.bills[0], "name": evil, "source": evil, "notes": [evil]}],
    )  # fmt: skip
    assert not {tag for tag, _ in parsed.tags} & {"script", "img"}
    assert parsed.text.count(evil) > 30


def test_votes_are_shown_where_there_are_any():
    evil = "<b>An</b>"
    wins = {"arms": ["few_shot", "author"], "num_votes": 9, "num_wins": 2, "num_losses": 6, "num_ties": 1}
    votes = {
        "num_votes": 9, "num_outdated": 3, "raters": {evil: 9}, "labels": {"few_shot": evil, "author": "the author"},
        "pairs": [{**wins, "win_rate": {"point": 0.28, "low": 0.1, "high": 0.56, "level": 0.95}}], "strengths": [], "detections": [],
        "rater_pairs": [], "num_judged_twice": 0, "alpha": None, "left_rate": None,
    }  # fmt: skip
    parsed = page(votes=votes)
    assert f"{evil} the author 9 2 6 1 28% [10% to 56%]" in parsed.one_line()
    assert f"9 votes of {evil} (9)." in parsed.one_line()
    assert "3 more votes are on answers that have been replaced" in parsed.one_line()
    assert "What people chose" not in page().one_line()


def test_the_authors_line_breaks_and_every_answer_are_kept():
    poem = "One line,\n\n  and «another» & more."
    parsed = page(samples=[{"request": "r", "author": poem, "answers": {"few_shot": "a < b", "named_style": ""}}])
    assert poem in parsed.text
    assert "a < b" in parsed.text
    assert "(an empty reply)" in parsed.text


def test_the_table_holds_the_evaluations_numbers():
    table = arms_table(evaluation())
    assert table[0] == ["arm", "style gap closed [95% interval]", "meaning kept", "length ratio", "gates"]
    assert table[3] == ["named style", "-11% [-31% to 7%]", "key recall 71%, chrF++ 35.8", "1.34", "fail: end of turn, length"]
    assert table[6] == ["fine-tuned", "68% [55% to 80%]", "key recall 82%, chrF++ 46.3", "1.06", "pass"]
    assert table[7] == ["the author", "100% [100% to 100%]", "key recall 84%", "1.00", "(reference)"]
    assert len(table) == 8
    "".join(cell for row in table for cell in row).encode("ascii")


def test_the_page_shows_the_same_numbers_as_the_terminal():
    shown = cells(page().tables[0])
    for row, terminal in zip(shown[1:], arms_table(evaluation())[1:], strict=True):
        assert row[:2] == terminal[:2]
        assert row[2].lstrip("✓✗! ") == terminal[4]
        assert row[5] == terminal[3]
        assert f"key recall {row[3]}" in terminal[2]
    assert shown[3][2] == "✗ fail: end of turn, length"
    assert shown[6][3:] == ["82%", "46.3", "1.06", "98%", "+0.382 [+0.342 to +0.432]"]
    assert shown[1][7] == "not available"


def test_what_cannot_be_measured_is_never_a_zero():
    made = evaluation()
    for row in (*made["arms"], made["author"]):
        row["style_gap_closed"] = row["key_recall"] = row["joint"] = None
    made |= {"style_note": "Style is not measurable for this author yet: too few words.", "comparison": None, "best_prompt_arm": None}
    for row in arms_table(made)[1:-1]:
        assert row[1] == "not available"
        assert row[2].startswith("chrF++")
    parsed = page(evaluation=made)
    assert parsed.count("g", "arm") == 0
    assert "no arm has a style score" in parsed.one_line()
    assert summary(content(evaluation=made)).startswith("Style is not measurable for this author yet")


def test_the_summary_names_what_failed():
    failing = evaluation()
    failing["arms"][5]["gates"] = dataclasses.asdict(arm("x", (0, 0, 0), 0, 0, 1, 1, gates=gates(overlap="fail")))["gates"]
    words = summary(content(evaluation=failing))
    assert "closes 68% of the distance in style" in words
    assert "the best prompt (few-shot) closes 27%" in words
    assert "keeps 82%" in words
    assert "own answers: 84%" in words
    assert "fails 1 of the gates (overlap)" in words
    assert "40 test requests from 8 documents" in words


@pytest.mark.parametrize(
    ("value", "words"),
    [(0.684, "68%"), (0.0, "0%"), (1.0, "100%"), (0.998, "99.8%"), (0.0004, "0.04%"), (-0.003, "0%"), (-0.31, "-31%"), (1.2, "120%"),
     (None, "not available"), (math.nan, "not available")],
)  # fmt: skip
def test_shares_never_round_to_all_or_nothing(value, words):
    assert share(value) == words


def test_intervals_and_gate_values_are_written_with_their_units():
    assert share_interval({"point": 0.5, "low": -0.1, "high": None}) == "not available"
    assert signed_share_interval({"point": 0.1, "low": -0.002, "high": 0.25}) == "+10% [+0% to +25%]"
    assert gate_value({"name": "length", "value": math.log(1.25)}) == "+0.22 (1.25 times)"
    assert gate_value({"name": "overlap", "value": 0.0123}) == "1.2%"
    assert gate_value({"name": "forgetting", "value": None}) == "not available"
    assert arms_table(evaluation())[2][4] == "pass (2 not measured)"
    assert gates_cell({"gates": []}) == ("not available", "not available")


def test_every_gate_has_value_threshold_and_a_word_for_its_status():
    table = cells(page().tables[2])
    assert [row[0] for row in table[1:]] == [gate["name"] for gate in evaluation()["arms"][5]["gates"]]
    assert table[1][1:3] == ["✓ pass", "+0.021 nats/token"]
    assert "Threshold: at most +0.05 nats per token" in table[1][3]


def numbers(picture: str, tag: str, kind: str, name: str) -> list[float]:
    """One attribute of every element of a kind, in order."""
    attributes = [attrs for found, attrs in Page(picture).tags if found == tag and kind in (attrs.get("class") or "").split()]
    return [float(attrs[name]) for attrs in attributes]


def test_the_forest_plot_has_one_row_per_arm_at_its_place():
    picture = forest_plot(evaluation(), ["fine_tuned"])
    parsed = Page(picture)
    assert parsed.count("g", "arm") == 6
    assert parsed.count("g", "tuned") == 1
    base, author = numbers(picture, "line", "reference", "x1")
    dots = numbers(picture, "circle", "point", "cx")
    expected = [base + share * (author - base) for share in (0, 0.08, -0.11, 0.27, 0.22, 0.68)]
    assert dots == pytest.approx(expected, abs=0.2)
    assert parsed.count("polygon", "arrow") == 0


def test_an_interval_beyond_the_plot_is_cut_with_an_arrow():
    made = evaluation()
    made["arms"][2]["style_gap_closed"] = {"point": -4.0, "low": -9.0, "high": 3.0, "level": 0.95}
    picture = forest_plot(made)
    assert Page(picture).count("polygon", "arrow") == 2
    assert Page(picture).count("circle", "point") == 5
    assert all(0 <= x <= 480 for end in ("x1", "x2") for x in numbers(picture, "line", "interval", end))


def test_the_learning_curve_has_its_pilots_forecasts_and_band():
    picture = learning_curve_plot(curve_content(curve()))
    parsed = Page(picture)
    assert parsed.count("circle", "pilot") == 3
    assert parsed.count("g", "forecast") == 3
    assert parsed.count("polygon", "band") == 1
    x, y = numbers(picture, "circle", "pilot", "cx"), numbers(picture, "circle", "pilot", "cy")
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2)
    assert y == sorted(y)
    (untuned,) = numbers(picture, "line", "untuned", "y1")
    assert untuned < y[0]


def test_the_drawn_curve_runs_through_the_forecasts():
    picture = learning_curve_plot(curve_content(curve()))
    (line,) = [attrs["points"] for tag, attrs in Page(picture).tags if attrs.get("class") == "fitted"]
    ends = [tuple(map(float, pair.split(","))) for pair in line.split()]
    last = numbers(picture, "circle", "open", "cx")[-1], numbers(picture, "circle", "open", "cy")[-1]
    assert ends[-1] == pytest.approx(last, abs=0.2)


def test_a_curve_without_forecasts_says_that_there_is_no_band():
    words = page(curve=curve().to_dict()).one_line()
    assert "Forecasts: not available" in words
    assert "Band: not available" in words


def test_a_siblings_curve_is_called_that():
    words = page(curve={**curve_content(curve()), "note": "The pilots were trained on small."}).one_line()
    assert "The pilots were trained on small." in words and "the sibling's pilot, carried over" in words
    assert "sibling" not in page(curve=curve_content(curve())).one_line()


def test_a_speculative_forecast_is_marked():
    far = curve_content(curve(), factors=(2, 8))
    assert [row["speculative"] for row in far["forecasts"]] == [False, True]
    assert Page(learning_curve_plot(far)).count("g", "speculative") == 1
    assert "704 (speculative)" in page(curve=far).one_line()


def test_the_loss_plot_keeps_every_step_until_there_are_too_many():
    (raw,) = [attrs for _, attrs in Page(loss_plot(content().losses)).tags if attrs.get("class") == "raw"]
    assert len(raw["points"].split()) == 110
    many = [{"step": step, "loss": 3.0 - step / 4000} for step in range(4000)] + [{"step": 4000, "loss": math.nan}]
    picture = loss_plot(many)
    (thinned,) = [attrs for _, attrs in Page(picture).tags if attrs.get("class") == "raw"]
    assert 200 < len(thinned["points"].split()) <= MAX_LOSS_POINTS
    assert "nan" not in picture
    assert Page(loss_plot([{"step": 1, "loss": 2.5}])).count("polyline", "smoothed") == 1


def test_ticks_are_round():
    assert nice_ticks(-0.15, 1.15, 6) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert nice_ticks(2.42, 2.97) == [2.5, 2.6, 2.7, 2.8, 2.9]
    assert nice_ticks(3.0, 3.0) == [3.0]
    assert tick_labels([2.5, 2.75, 3.0]) == ["2.50", "2.75", "3.00"]
    assert tick_labels([0.0, 1000.0, 2000.0]) == ["0", "1,000", "2,000"]


def test_the_stand_in_is_named_wherever_it_wrote_something():
    data = {**content().data, "synthesis": {"source": "stand_in", "teacher": "stand-in", "kinds": {"neutral_rewrite": 148}}}
    parsed = page(data=data)
    words = parsed.one_line()
    assert words.count("request (written by the stand-in, no teacher model)") == len(SAMPLES)
    assert "synth (stand-in, no teacher model)" in words
    assert "requests written by the built-in stand-in" in words
    assert "not by a teacher model" in words
    assert parsed.count("span", "badge") == 1
    assert "stand-in" not in page().one_line()


def test_the_demo_says_what_it_does_not_show():
    assert "says nothing about large models" in page(is_demo=True).one_line()
    assert "says nothing about large models" not in page().one_line()


def test_counterfeits_are_shown_with_what_stops_them():
    gate = {"name": "collapse", "value": 0.5, "threshold_text": "", "explanation": ""}
    share = {"point": 0.0, "low": 0.0, "high": 0.09, "level": 0.95}
    controls = [
        {"name": "looped_sentence", "gates": [{**gate, "status": "fail"}], "style_gap_closed": None, "joint": share},
        {"name": "request", "gates": [{**gate, "status": "pass"}], "style_gap_closed": None, "joint": share},
        {"name": "shuffled_words", "gates": [{**gate, "status": "pass"}], "style_gap_closed": None, "joint": {**share, "low": 0.6}},
    ]
    pooled = {"style": 0.97, "coherence": 0.02, "all": 0.02}
    controls.append({**controls[-1], "name": "shuffled_spans", "pools": pooled})
    parsed = page(evaluation={**content().evaluation, "controls": controls, "alarms": ["Nothing stops the shuffled words."]})
    rows = next(table for table in map(cells, parsed.tables) if table[0][0] == "counterfeit")
    assert [row[-1] for row in rows[1:]] == ["collapse", "style and meaning, text by text", "NOTHING", "in pools of ten: coherence"]
    assert "Alarm: Nothing stops the shuffled words." in parsed.one_line()
    assert "Counterfeits" not in page().one_line()


def test_probes_stand_side_by_side_and_what_was_lost_is_named():
    def scores(reading: float, refused: int) -> dict:
        share = {"point": refused / 10, "low": 0.0, "high": 1.0, "level": 0.95}
        return {
            "tasks": {"repeat": 0.9, "reading": reading}, "num_tasks": 20, "refused_harmful": share, "refused_harmless": None,
            "stereotype_share": None,
        }  # fmt: skip

    probes = {"base": scores(0.6, 4), "fine_tuned": scores(0.2, 1)}
    parsed = page(probes=probes)
    rows = next(table for table in map(cells, parsed.tables) if table[0][0].startswith("short tasks"))
    assert rows[0][1:] == ["base", "tuned"]
    assert ["answer from a passage", "60%", "20%"] in rows
    assert ["harmless requests refused", "not available", "not available"] in rows
    assert "The tuned model does worse at: answer from a passage." in parsed.one_line()
    assert "Probes, before and after" not in page().one_line()
    assert "Probes, before and after" not in page(probes={"base": scores(0.6, 4)}).one_line()


def test_sums_leave_out_what_is_unknown_and_say_so():
    rows = next(table for table in map(cells, page().tables) if table[0][0] == "stage")
    assert rows[-1] == ["all together, as far as known", "3 min 33 s", "$0.03", "261,610"]
    assert rows[4] == ["eval", "31 s", "not available", "not available"]


def test_what_was_left_out_is_listed_with_its_reason():
    rows = next(table for table in map(cells, page().tables) if table[0][0] == "what happened")
    assert ["dropped", "the file is empty", "1", "letters/empty.md"] in rows
    assert ["no neutral rewrite", "the request shares 9 words with the answer", "1", "2022-11-clock:3"] in rows
    assert len(rows) == 5


def test_settings_and_hashes_are_all_there():
    words = page().one_line()
    for setting in ("train.batch_rows 8", "evaluation.num_bootstrap 2000", "split 55d0e1f2a3b4c5d6", "packages.torch 2.9.0"):
        assert setting in words
    assert "giong run --project letters --set train.seed=0" in words


def test_calls_and_bills_are_shown_with_the_break_even_of_each_prompt():
    words = page().one_line()
    assert "few-shot 1,110 102 0.77 +0.36" in words

    (mini,) = [bill for bill in content().bills if bill["name"].startswith("OpenAI gpt-4o-mini")]
    assert f"few-shot: {math.ceil(mini['break_even']['few_shot']['num_calls']):,} calls" in words
    never = {**mini, "break_even": {"few_shot": {**mini["break_even"]["few_shot"], "num_calls": math.inf}}}
    assert "few-shot: never" in page(bills=[never]).one_line()


def test_the_content_may_come_from_json(tmp_path):
    full = content()
    plain = json.loads(json.dumps(dataclasses.asdict(full), default=str))
    assert render(ReportContent(**plain)) == render(full)


def test_the_file_is_written_whole(tmp_path):
    path = tmp_path / "new" / "report.html"
    write_report(path, content())
    assert path.read_text(encoding="utf-8") == render(content())
    with pytest.raises(KeyError):
        write_report(path, content(evaluation={"arms": [{"label": "an arm without a name"}]}))
    assert path.read_text(encoding="utf-8") == render(content())
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]


def test_importing_the_report_is_cheap():
    code = "import sys, giong.evaluation.report; print({'jinja2', 'numpy', 'scipy', 'torch'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"


def test_the_verifiers_quality_stands_beside_every_style_figure():
    made = content()
    line = verifier_line(made.evaluation)
    quality = made.evaluation["verifier"]
    assert f"AUC {quality['auc']:.2f} (pools of {quality['pool_size']}: {quality['auc_pooled']:.2f})" in line
    assert f"c@1 {quality['c_at_1']:.2f}, Brier score {quality['brier']:.2f}" in line
    assert line in render(made)
    assert verifier_line({}) == pools_line({}) == ""
    author, tuned = {"name": "author", "pools": {"all": 0.95}}, {"name": "fine_tuned", "pools": {"all": 0.62}}
    controls = [{"name": name, "pools": {"all": passing}} for name, passing in (("request", 0.0), ("shuffled_spans", 0.04))]
    assert pools_line({"arms": [tuned], "author": author, "controls": controls}) == (
        "Pools of ten replies that pass as the author's: fine-tuned 62%, the author 95%; of counterfeits at most 4% (shuffled spans)."
    )
