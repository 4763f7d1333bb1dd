"""What each part of the page says, as plain rows: the template only lays them out.

A part without data is an empty list or None, and the template then prints one sentence that names the missing step.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from giong.evaluation.report.content import ReportContent
from giong.evaluation.report.plots import forecasts_beyond
from giong.evaluation.report.table import (
    ARM_LABELS,
    LEARNED,
    NOT_AVAILABLE,
    arm_label,
    gate_figure,
    gates_cell,
    is_known,
    number,
    plain_interval,
    pools_scope,
    share,
    share_interval,
    signed_interval,
    signed_share_interval,
)
from giong.sizing.questions import QUESTIONS
from giong.sizing.units import UNKNOWN, format_bytes, format_range, format_seconds, format_usd

NUM_SAMPLES = 3
"""Samples shown at once; the others are folded away."""
NUM_PLACES = 5

DECISIONS = {
    "go": ("go", "Fine-tuning is worth it: measured, and not forecast."),
    "combine": ("go", "Fine-tuning is worth it, together with a prompt or with passages that are looked up."),
    "collect more": ("collect", "Not decided yet: more writing, or more test documents, would settle it."),
    "prompt instead": ("prompt", "Prompting does as well, or nearly so: there is no need to train."),
    "retrieve": ("prompt", "The answers hold facts that have to be looked up: training does not teach them."),
    "no-go": ("no-go", "The tuned model must not be used as it is."),
}
SOURCES = {
    "teacher": "a teacher model",
    "recorded": "recorded answers, replayed",
    "stand_in": "the built-in stand-in (fixed rules, no teacher model)",
}
DEMO_NOTICE = (
    "This is the demo: the bundled tiny base model and an invented author, one seed. It shows how giong works; "
    "what prompting does at this scale says nothing about large models."
)
STAND_IN_NOTICE = (
    "The requests were written by the built-in stand-in, a set of fixed rules, and not by a teacher model. "
    "Read every figure here as a trial run; set synthesis.teacher for requests like those that people write."
)


def all_notices(content: ReportContent) -> list[str]:
    """What a reader must know before any figure: demo, stand-in, then what the caller says."""
    first = [DEMO_NOTICE] if content.is_demo else []
    return [*first, *([STAND_IN_NOTICE] if content.uses_stand_in else []), *content.notices]


def tuned_arm(content: ReportContent) -> Mapping[str, Any] | None:
    """The tuned arm that the verdict is about, or None before training."""
    comparison = content.evaluation.get("comparison") or {}
    names = [*([comparison["arm"]] if comparison else []), *content.tuned_arms]
    return next((arm for name in names if (arm := _arm(content, name))), None)


def summary(content: ReportContent) -> str:
    """The outcome in two to four plain sentences."""
    evaluation = content.evaluation
    if not evaluation.get("arms"):
        return "Nothing has been measured yet: there are no answers to the test requests."
    tuned, best = tuned_arm(content), _arm(content, evaluation.get("best_prompt_arm"))
    sentences = [_style_sentence(evaluation, tuned, best)]
    if tuned:
        sentences.append(_meaning_sentence(tuned, evaluation.get("author") or {}))
    requests, documents = evaluation.get("num_requests"), evaluation.get("num_documents")
    if requests and documents:
        kept_back = "document that was" if documents == 1 else "documents that were"
        sentences.append(f"All of this was measured on {requests} test requests from {documents} {kept_back} kept out of training.")
    return " ".join(filter(None, sentences))


def _style_sentence(evaluation: Mapping[str, Any], tuned: Mapping[str, Any] | None, best: Mapping[str, Any] | None) -> str:
    def closed(arm: Mapping[str, Any]) -> str:
        return share((arm["style_gap_closed"] or {}).get("point"))

    if evaluation.get("style_note"):
        return str(evaluation["style_note"])
    prompt = f"the best prompt ({arm_label(best)}) closes {closed(best)}" if best and is_known(best["style_gap_closed"]) else ""
    if prompt and best and best["name"] == evaluation.get("base_arm"):
        prompt = "no prompt that passes its gates does better than the base as it is"
    if tuned and is_known(tuned["style_gap_closed"]):
        gap = "of the distance in style between the base model and the author"
        return f"The tuned model closes {closed(tuned)} {gap}" + (f"; {prompt}." if prompt else ".")
    return "No tuned model has been measured yet" + (f"; {prompt} of the distance in style." if prompt else ".")


def _meaning_sentence(tuned: Mapping[str, Any], author: Mapping[str, Any]) -> str:
    recall, own = tuned.get("key_recall"), author.get("key_recall")
    failed = [gate["name"] for gate in tuned["gates"] if gate["status"] == "fail"]
    kept = ""
    if is_known(recall):
        kept = f"It keeps {share(recall['point'])} of the names, numbers and other key words of the request"
        kept += f" (the author's own answers: {share(own['point'])})" if is_known(own) else ""
    gates = f"it fails {len(failed)} of the gates ({', '.join(failed)})" if failed else "it fails no gate"
    return f"{kept}, {'but' if failed else 'and'} {gates}." if kept else f"{gates[0].upper()}{gates[1:]}."


def verdict_card(content: ReportContent) -> dict[str, Any] | None:
    """Decision, its meaning, reason, rule and the figures that it rests on; None where nothing was decided."""
    verdict = content.verdict
    if not verdict:
        return None
    numbers = verdict.get("numbers") or {}
    best = _arm(content, numbers.get("best_prompt_arm"))
    rows = [
        ("fine-tuned closes", share_interval(numbers.get("tuned"))),
        (f"best prompt closes{f' ({arm_label(best)})' if best else ''}", share_interval(numbers.get("best_prompt"))),
        ("difference", signed_share_interval(numbers.get("difference"))),
    ]
    if is_known(numbers.get("difference")):
        margin = (content.evaluation.get("comparison") or {}).get("margin")
        ahead = f"chance of a lead of {share(margin)} or more" if margin is not None else "chance of a large enough lead"
        rows.append((ahead, share(numbers.get("probability_of_margin"))))
    kind, meaning = DECISIONS.get(verdict["decision"], ("prompt", ""))
    question = QUESTIONS[verdict["answer"]].text["en"] if verdict.get("answer") else ""
    return {"cautions": (), **verdict, "kind": kind, "meaning": meaning, "rows": rows, "question": question}


def gate_tables(content: ReportContent) -> list[dict[str, Any]]:
    """One table of gates per arm: the tuned arm's first (the best prompt's before training), which alone is shown unfolded."""
    arms = list(content.evaluation.get("arms") or ())
    first = tuned_arm(content) or _arm(content, content.evaluation.get("best_prompt_arm"))
    arms.sort(key=lambda arm: arm is not first)
    return [
        {
            "label": arm_label(arm), "words": gates_cell(arm)[0], "status": gates_cell(arm)[1],
            "gates": [{**gate, "value": gate_figure(gate)} for gate in arm.get("gates") or ()],
        }
        for arm in arms
    ]  # fmt: skip


DETAILS: tuple[tuple[str, str, str], ...] = (
    ("chrf_corpus", "chrF++ (corpus)", ".1f"),
    ("key_add", "key items added", "share"),
    ("facts_found", "facts given that the request lacks", "share"),
    ("rep_4", "repeated 4-grams", "share"),
    ("distinct_2", "distinct bigrams", "share"),
    ("zlib_ratio", "zlib ratio", ".2f"),
    ("overlap", "copied 8-word runs", "share"),
    ("longest_copy_tokens", "longest copy, tokens", ".0f"),
    ("num_empty", "empty replies", ".0f"),
)


WITNESSES = {
    "char": "style: character n-grams", "mask": "style: n-grams, content masked", "delta": "style: frequent words (Delta)",
    "ppm": "style: compression", "learned": "style: learned vectors",
}  # fmt: skip


BESIDE_STYLE = (
    "told from the author: AUC (p)",
    "register: 0% the author's, -100% the neutral requests', above 0% overshoots",
    "five wordings: spread of style, chrF++ between replies",
)


def _told_apart(test: Mapping[str, Any] | None) -> str:
    return f"{test['auc']:.2f} (p = {test['p_value']:.3f})" if test else NOT_AVAILABLE


def _consistency(found: Mapping[str, Any] | None) -> str:
    return f"{number(found['style_spread'])}, {number(found['agreement'], '.1f')}" if found else NOT_AVAILABLE


def detail_table(evaluation: Mapping[str, Any]) -> list[list[str]]:
    """All other figures, header first, one row per arm and the author's own answers last."""
    arms = [arm for arm in (*(evaluation.get("arms") or ()), evaluation.get("author")) if arm]
    if not arms:
        return []
    of_pools = f"pools of ten that pass as the author's{pools_scope(evaluation)}"
    header = ["arm", "in style, meaning kept and clean at once", of_pools, "held-out bits per byte"]
    witnesses = [name for name in WITNESSES if any(name in (arm.get("style") or {}) for arm in arms)]
    learned = [name for name in LEARNED if any(name in (arm.get("learned") or {}) for arm in arms)]
    titles = [*(WITNESSES[name] for name in witnesses), *BESIDE_STYLE, *(LEARNED[name] for name in learned)]
    table = [[*header, *titles, *(title for _, title, _ in DETAILS)]]
    for arm in arms:
        known = {**arm, "facts_found": (arm.get("fact_recall") or {}).get("point")}
        figures = [share(known.get(key), 1) if form == "share" else number(known.get(key), form) for key, _, form in DETAILS]
        likelihood = number((arm.get("likelihood") or {}).get("bits_per_byte"), ".3f")
        label = ARM_LABELS["author"] if arm is evaluation.get("author") else arm_label(arm)
        beside = [
            _told_apart(arm.get("two_sample")),
            signed_share_interval(arm.get("register_shift")),
            _consistency(arm.get("consistency")),
        ]
        styles = [number((arm.get("style") or {}).get(name), "+.2f") for name in witnesses]
        beside += [plain_interval((arm.get("learned") or {}).get(name)) for name in learned]
        pools = share((arm.get("pools") or {}).get("all"))
        table.append([label, share_interval(arm.get("joint")), pools, likelihood, *styles, *beside, *figures])
    return table


def verifier_rows(evaluation: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(measure, value, how to read it) of the style verifier."""
    quality = evaluation.get("verifier")
    if not quality:
        return []
    pool = quality["pool_size"]
    return [
        ("AUC, single pieces", number(quality["auc"], ".3f"), "1 is perfect, 0.5 is guessing"),
        (f"AUC, pools of {pool} pieces", number(quality["auc_pooled"], ".3f"), "at least 0.80 is needed to print a style score at all"),
        ("c@1", number(quality["c_at_1"], ".3f"), "share of right decisions; leaving one open costs less than a mistake"),
        ("Brier score", number(quality["brier"], ".3f"), "0 is perfect, 0.25 is guessing"),
        ("unseen pieces judged", f"{quality['num_author']} of the author, {quality['num_background']} of others", "none was trained on"),
        ("can tell the author from others", "yes" if quality["measurable"] else "no", "if not, no style score is printed"),
    ]


def forecast_rows(curve: Mapping[str, Any] | None) -> list[list[str]]:
    """Rows, held-out loss, gain and style gap closed for each forecast beyond the pilots."""
    return [
        [
            f"{row['num_rows']:,}" + (" (speculative)" if row.get("speculative") else ""), plain_interval(row["nll"]),
            signed_interval(row["gain"]), share_interval(row.get("style_gap_closed")),
        ]
        for row in forecasts_beyond(curve or {})
    ]  # fmt: skip


def forecast_level(curve: Mapping[str, Any] | None) -> str:
    """The confidence level of the forecasts, "80%"."""
    return next((f"{100 * row['nll']['level']:g}%" for row in forecasts_beyond(curve or {})), NOT_AVAILABLE)


def sample_cards(content: ReportContent) -> list[dict[str, Any]]:
    """Each sample's request, the author's answer, and every arm's; `main` are tuned, best prompt and base, in that order."""
    base = content.evaluation.get("base_arm", "base")
    tuned = tuned_arm(content)
    leading = [tuned["name"] if tuned else None, content.evaluation.get("best_prompt_arm"), base]
    cards = []
    for sample in content.samples:
        answers = dict(sample.get("answers") or {})
        names = list(dict.fromkeys(name for name in leading if name in answers))
        others = [name for name in answers if name not in names]
        texts = {name: {"name": name, "label": _label(content, name), "text": text} for name, text in answers.items()}
        cards.append({"document_id": "", **sample, "main": [texts[name] for name in names], "others": [texts[name] for name in others]})
    return cards


def cost_rows(content: ReportContent) -> list[list[str]]:
    """Stage, time, money and tokens, with the sum of what is known last."""
    rows = [[_stage(content, row["stage"]), *_cost_cells(row.get("seconds"), row.get("usd"), row.get("tokens"))] for row in content.costs]
    if len(rows) > 1:
        known = [[row[key] for row in content.costs if _finite(row.get(key))] for key in ("seconds", "usd", "tokens")]
        is_whole = all(len(values) == len(rows) for values in known)
        title = "all together" if is_whole else "all together, as far as known"
        rows.append([title, *_cost_cells(*(sum(values) if values else None for values in known))])
    return rows


def _cost_cells(seconds: float | None, usd: float | None, tokens: float | None) -> list[str]:
    return [_known(format_seconds(seconds)), _known(format_usd(usd)), _count(tokens)]


def backend_rows(backends: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Each back end's time, cost and memory as ranges, with where the price comes from."""
    fits = {True: "yes", False: "no", None: NOT_AVAILABLE}
    return [
        {
            "name": row["name"],
            "seconds": _known(format_range(format_seconds(row.get("low_seconds")), format_seconds(row.get("high_seconds")))),
            "usd": _known(format_range(format_usd(row.get("low_usd")), format_usd(row.get("high_usd")))),
            "memory": _known(format_bytes(row.get("peak_memory_bytes"))),
            "fits": "" if row.get("kind") == "remote" else fits[row.get("fits")],
            "basis": row.get("basis", ""),
            "source": " as of ".join(str(part) for part in (row.get("source"), row.get("as_of")) if part),
            "notes": " ".join(row.get("notes") or ()),
        }
        for row in backends
    ]


def usage_rows(content: ReportContent) -> list[list[str]]:
    """Tokens and seconds of a call to each arm, and how much longer it takes than the tuned model."""
    tuned = next((content.usage[name] for name in content.tuned_arms if name in content.usage), None)
    return [
        [
            _label(content, name), f"{arm['prompt_tokens']:,.0f}", f"{arm['completion_tokens']:,.0f}", f"{arm['seconds']:.2f}",
            f"{arm['seconds'] - tuned['seconds']:+.2f}" if tuned else NOT_AVAILABLE,
        ]
        for name, arm in content.usage.items()
    ]  # fmt: skip


def bill_rows(content: ReportContent) -> list[dict[str, str]]:
    """What each place charges, and the calls until tuning there has paid for itself against each prompt."""
    return [
        {
            "name": bill["name"],
            **{name: _known(format_usd(bill.get(name))) for name in ("training_usd", "evaluation_usd", "hosting_usd_per_month", "usd_per_month")},
            "break_even": "; ".join(
                f"{_label(content, name)}: " + (f"{math.ceil(found['num_calls']):,} calls" if _finite(found["num_calls"]) else "never")
                for name, found in bill["break_even"].items()
            ) or NOT_AVAILABLE,
            "source": " as of ".join(str(part) for part in (bill.get("source"), bill.get("as_of")) if part),
            "notes": " ".join(bill.get("notes") or ()),
        }
        for bill in content.bills
    ]  # fmt: skip


def data_rows(content: ReportContent) -> list[tuple[str, str]]:
    """Counts of what was read, kept and made from it."""
    data, synthesis = content.data, content.data.get("synthesis") or {}
    names = {
        "num_documents": "documents", "num_passages": "passages", "num_words": "words",
        "num_kept": "files and rows kept", "num_dropped": "files and rows dropped", "num_skipped": "files skipped (not of a known kind)",
    }  # fmt: skip
    rows = [(title, _count(data[key])) for key, title in names.items() if data.get(key) is not None]
    if data.get("split_method"):
        rows.append(("split by", str(data["split_method"])))
    if synthesis:
        rows.append(("requests written by", source_words(content)))
        kinds = synthesis.get("kinds") or {}
        listed = [f"{kind.replace('_', ' ')} ({count})" for kind, count in kinds.items()] if isinstance(kinds, Mapping) else list(kinds)
        rows += [("kinds of requests", ", ".join(listed))] if listed else []
    return rows


def source_words(content: ReportContent) -> str:
    """Who wrote the requests; the stand-in is named as one whatever its teacher is called."""
    source, teacher = content.synthesis_source.replace("-", "_"), (content.data.get("synthesis") or {}).get("teacher")
    words = SOURCES.get(source, source or NOT_AVAILABLE)
    return f"{words}: {teacher}" if teacher and not content.uses_stand_in else words


def split_rows(data: Mapping[str, Any]) -> list[list[str]]:
    split = data.get("split") or {}
    keys = ("documents", "passages", "examples")
    return [[side, *(_count(sizes.get(key)) for key in keys)] for side, sizes in split.items()]


def left_out_rows(data: Mapping[str, Any]) -> list[list[str]]:
    """Why something was left out, how often, and where (the first few places)."""
    places: dict[tuple[str, str], list[str]] = {}
    for entry in data.get("entries") or ():
        if entry["status"] != "kept":
            places.setdefault((entry["status"], entry.get("reason") or "no reason given"), []).append(str(entry["place"]))
    for entry in data.get("left_out") or ():
        places.setdefault((f"no {entry['kind'].replace('_', ' ')}", entry["reason"]), []).append(str(entry["passage_id"]))
    counts = Counter({key: len(found) for key, found in places.items()})
    more = {key: f" and {count - NUM_PLACES} more" if count > NUM_PLACES else "" for key, count in counts.items()}
    return [[*key, str(count), ", ".join(places[key][:NUM_PLACES]) + more[key]] for key, count in counts.most_common()]


def flattened(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted name, value) rows."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            rows.extend(flattened(value, f"{name}."))
        else:
            rows.append((name, _written(value)))
    return rows


def resolved_rows(settings: Mapping[str, Any]) -> list[list[str]]:
    """Name, value and reason of every setting that was chosen from model and data."""
    return [[row["name"], _written(row.get("value")), row.get("reason") or ""] for row in settings.get("resolved") or ()]


def model_line(content: ReportContent) -> str:
    if not content.model_name or not content.num_parameters:
        return content.model_name or NOT_AVAILABLE
    millions = content.num_parameters / 1e6
    size = f"{millions / 1000:.1f} B" if millions >= 999.5 else f"{millions:.1f} M"
    return f"{content.model_name}, {size} parameters"


def _written(value: Any) -> str:
    if value is None:
        return "(chosen automatically)"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(_written(item) for item in value) or "(none)"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_written(item)}" for key, item in value.items()) or "(none)"
    return str(value) or "(empty)"


def _arm(content: ReportContent, name: str | None) -> Mapping[str, Any] | None:
    return next((arm for arm in content.evaluation.get("arms") or () if arm["name"] == name), None)


def _label(content: ReportContent, name: str) -> str:
    arm = _arm(content, name)
    return arm_label(arm or {"name": name})


def _stage(content: ReportContent, stage: str) -> str:
    return f"{stage} (stand-in, no teacher model)" if content.uses_stand_in and stage.startswith("synth") else stage


def _known(text: str) -> str:
    return NOT_AVAILABLE if text == UNKNOWN else text


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _count(value: float | None) -> str:
    return f"{value:,.0f}" if _finite(value) else NOT_AVAILABLE
