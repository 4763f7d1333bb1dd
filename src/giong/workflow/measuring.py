"""Steps `eval` and `report`: the tuned arm answers, everything is measured by one code path, and the verdict is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from giong import samples
from giong.baselines import BASELINES
from giong.config.json_schema import read_schema
from giong.contracts import Example, Message, Predictor, Reply, Request, Sampling, ScoreRequest, TokenScores, request_text
from giong.data.examples import spread
from giong.data.synthesis.kinds import KINDS
from giong.data.synthesis.stand_in import is_english
from giong.data.words import count_words
from giong.errors import DataError, StoryError
from giong.evaluation.answers import prompted_arms, read_replies, write_replies
from giong.evaluation.canaries import candidates, exposure, plant
from giong.evaluation.consistency import WORDINGS, reworded
from giong.evaluation.controls import make_controls
from giong.evaluation.decision import answers_given
from giong.evaluation.order import disordered, together
from giong.evaluation.probes import ProbeItem, ProbeScores, bundled_items, first_of_each, probe_scores
from giong.evaluation.questions import FactScores, Question
from giong.evaluation.report.table import ARM_LABELS
from giong.evaluation.results import AUTHOR, CALIBRATION, TUNED, ArmOutput, Comparison, Evaluation, finite
from giong.sizing.advice import advise
from giong.sizing.verdict import MARGIN, Combination, Evidence
from giong.workflow.arms import announce_answers, long_answer_tokens, read_scores, scores_path
from giong.workflow.harness import asked_of, compare_tasks, load_tasks, task_scores
from giong.workflow.judging import judge_outputs, make_judge
from giong.workflow.learned import learned_figures, style_vectors
from giong.workflow.other_models import measuring_models
from giong.workflow.questioning import ask_questions, questions_of
from giong.workflow.story import Stage, Story, examples_hash
from giong.workspace import content_hash, read_json, read_jsonl, write_json

if TYPE_CHECKING:
    from giong.generation.local import LocalModel

NUM_SAMPLES = 3
MAX_CALIBRATION = 48
"""The author's held-out texts that pools of replies are compared with: the scale needs no more, and each is scored twice."""
MAX_PROBE_TOKENS = 120


def background_voices(story: Story) -> tuple[dict[str, list[str]], str]:
    """Other writers to tell the author from, and a sentence about them."""
    path = story.config.evaluation.background
    if path:
        return _read_background((story.project.root / path).resolve()), f"background: {path}"
    if is_english(" ".join(story.passage_texts("train")[:20])):
        return samples.background_voices(), "background: the eight bundled English voices"
    return {}, "there are no bundled background voices in this language; name some in evaluation.background"


def _read_background(path: Path) -> dict[str, list[str]]:
    if path.is_file():
        voices: dict[str, list[str]] = {}
        for number, row in enumerate(read_jsonl(path), start=1):
            if not {"voice", "text"} <= set(row):
                raise DataError("A background row needs `voice` and `text`", place=f"{path}:{number}", remedy="Add the missing key.")
            voices.setdefault(row["voice"], []).append(row["text"])
        return voices
    if path.is_dir():
        from giong.config import DataConfig
        from giong.data.cleaning import cut_passages
        from giong.data.importers import import_documents

        settings = DataConfig()
        return {
            folder.name: [p.text for p in cut_passages(import_documents([folder], settings)[0], settings.min_words, settings.max_words)]
            for folder in sorted(path.iterdir())
            if folder.is_dir()
        }
    raise DataError("There is no background at this path", place=str(path), remedy="Correct evaluation.background.")


def prompted_outputs(story: Story) -> list[ArmOutput]:
    """What the prompted arms answered."""
    return [
        ArmOutput(
            name, read_replies(story.project, name), uses_training_text=name.partition("@")[0] in ("few_shot", "retrieval"), label=label
        )
        for name, label in prompted_arms(story.project)
    ]


def measure_arms(
    story: Story,
    outputs: list[ArmOutput],
    held_out: dict[str, list[TokenScores]],
    general: dict[str, list[TokenScores]],
    tuned_arms: Sequence[str],
    *,
    training: dict[str, list[TokenScores]] | None = None,
    exposures: Sequence[float] = (),
    wordings: dict[str, list[list[str]]] | None = None,
    combined_arms: Sequence[str] = (),
) -> Evaluation:
    """One evaluation of these arms, beside the counterfeits, on the test requests. The scores as `evaluate` takes them."""
    from giong.evaluation.run import evaluate

    test, train = story.test_examples, story.passage_texts("train")
    background, _ = background_voices(story)
    others = [text for texts in background.values() for text in texts]
    requests = [request_text(example.messages) for example in test]
    controls = make_controls([example.answer for example in test], requests, train, others, story.config.evaluation.seed)
    calibration = spread(story.examples_of("calibration"), MAX_CALIBRATION)
    coherence, shuffled = _coherence(story, outputs, test, controls, calibration)
    return evaluate(
        outputs, test, train, story.passage_texts("calibration"), background, story.config.evaluation, held_out=held_out, general=general,
        coherence=coherence, disordered=shuffled, base_model=story.config.model.name_or_path, calibration=calibration, training=training,
        training_documents=[example.document_id for example in training_sample(story)], exposures=exposures, controls=controls,
        learned=learned_figures(story, outputs), style_vectors=style_vectors(story),
        json_schema=read_schema(story.config.evaluation.json_schema, story.project.root), tuned_arms=tuned_arms, combined_arms=combined_arms, register_pairs=_neutral_pairs(story.examples_of("train")),
        reworded_replies=wordings, neutral_requests=[request for request, _ in _neutral_pairs(test)],
    )  # fmt: skip


def _neutral_pairs(examples: Sequence[Example]) -> list[tuple[str, str]]:
    """(request without its instruction, the author's answer) of the neutral rewrites among the examples."""
    kind = KINDS["neutral_rewrite"]
    return [(kind.content(request_text(example.messages)), example.answer) for example in examples if example.kind == kind.name]


def evaluate_model(story: Story) -> None:
    """Answer the test requests with the tuned model, measure all arms, decide."""
    test = story.test_examples
    model = story.project.model_path(story.config.name)
    if not (model / "model.json").is_file():
        raise StoryError("There is no tuned model yet", place=str(model), remedy="Run `giong train` first.")
    arms = prompted_arms(story.project)
    if not any(name == "base" for name, _ in arms):
        raise StoryError("The base has not answered yet", place=str(story.project.root), remedy="Run `giong baseline` first.")
    record = read_json(model / "model.json")
    answers = [path for name, _ in arms for path in (story.project.arm_path(name), scores_path(story, name))]
    questions = questions_of(story)
    background, background_note = background_voices(story)
    tasks = load_tasks(story)
    key = content_hash(
        record["run"], record["sampling"], examples_hash(test), story.config.evaluation, background, *answers,
        story.passage_texts("train"), story.passage_texts("calibration"), story.project.step_result("size"), questions,
        read_schema(story.config.evaluation.json_schema, story.project.root),
        *(file for folder in measuring_models(story.project, story.config.evaluation).values() for file in sorted(folder.glob("*.json"))),
        *asked_of(story, tasks),
    )  # fmt: skip
    if story.is_current("eval", key):
        return
    judge = make_judge(story, [*(name for name, _ in arms), TUNED])
    with Stage(story, "eval", f"{len(arms) + 1} arms, {len(test)} test requests") as stage:
        story.notice("eval", background_note)
        announce_answers(story, "eval", _num_answers(story, test, questions))
        if tasks:
            story.notice("eval", f"tasks of lm-evaluation-harness: {', '.join(tasks)}")
        found = _ask_tuned(story, model, record, test, questions, tasks)
        replies, scores = found.replies, found.scores
        for name, answers_of in replies.items():
            write_replies(story.project, name, answers_of)
        outputs = [
            *prompted_outputs(story),
            *(ArmOutput(name, of, uses_training_text=True, label=combined_label(name)) for name, of in replies.items()),
        ]
        evaluation = measure_arms(
            story, outputs, scores["held_out"], scores["general"], [TUNED], training=scores["training"],
            exposures=found.exposures, wordings=found.wordings, combined_arms=[name for name in replies if name != TUNED],
        )  # fmt: skip
        evidence = gather_evidence(story, evaluation, found.facts)
        verdict = advise(evidence, answers_given(story.config))
        settings = story.config.evaluation.judge
        judged = judge_outputs(story, judge, settings, outputs, evaluation) if judge and settings else {}
    result = {
        "evaluation": evaluation.to_dict(), "evidence": finite(evidence.to_dict()), "verdict": finite(verdict.to_dict()), "samples": first_samples(outputs, test),
        "probes": finite(found.probes), "seconds": stage.seconds, "run": record["run"], "judge": judged, "facts": finite(found.facts), "num_questions": len(questions),
        "tasks": finite(found.tasks),
    }  # fmt: skip
    write_json(story.project.root / "evaluation.json", result)
    said = {"decision": verdict.decision, "reason": verdict.reason, "examples_hash": examples_hash(test)}
    made = [story.project.root / "evaluation.json", story.project.arm_path(TUNED)]
    story.project.finish_step("eval", key, made, {**said, "seconds": stage.seconds})
    for alarm in evaluation.alarms:
        story.notice("eval", alarm)
    story.notice("eval", f"verdict: {verdict.decision}. {verdict.reason}")


def first_samples(outputs: list[ArmOutput], test: list[Example]) -> list[dict[str, Any]]:
    """The first test requests with every arm's answer: not chosen, so that they show what came out."""
    return [
        {
            "document_id": example.document_id, "request": example.messages[-1].content, "author": example.answer,
            "answers": {output.name: output.replies[index].text for output in outputs},
        }
        for index, example in enumerate(test[:NUM_SAMPLES])
    ]  # fmt: skip


@dataclass(frozen=True)
class _Answers:
    """What base and tuned model said: replies by arm, likelihoods by what was scored, probes, exposures of the planted canaries, replies to
    reworded requests (one list per wording), what came of the question set, and of the tasks of `evaluation.lm_eval_tasks`.
    """

    replies: dict[str, list[Reply]]
    scores: dict[str, dict[str, list[TokenScores]]]
    probes: dict[str, ProbeScores]
    exposures: list[float]
    wordings: dict[str, list[list[str]]]
    facts: dict[str, FactScores]
    tasks: dict[str, dict[str, Any]]


def _ask_tuned(
    story: Story, model: Path, record: dict[str, Any], test: list[Example], questions: list[Question], tasks: Mapping[str, Any]
) -> _Answers:  # fmt: skip
    """Ask the base and the tuned model, alone and with each prompt of `evaluation.combined` on top, all that is measured of them."""
    from giong.engine.score import LocalScorer
    from giong.workflow.training import score_answers, tuned

    requests = [Request(example.id, example.messages) for example in test]
    general = [ScoreRequest(text) for text in samples.general_texts()]
    held_out = {name: scores for name, _ in prompted_arms(story.project) if (scores := read_scores(story, name))}
    training = training_sample(story)
    training_scores = {"base": score_answers(story.local, None, training)}
    with story.local.using(None):
        general_scores = {"base": LocalScorer(story.local.loaded).score(general)}
        probes = {"base": _probe_scores(story, story.local, None)}
        facts = ask_questions(story, questions, story.local, None)
        base_tasks = task_scores(story, story.local.loaded, tasks)
    with tuned(story, model / record["format"], record["name"]) as (local, adapter):
        sampling = Sampling(**record["sampling"])
        predictor = local.predictor(TUNED, adapter, sampling)
        replies = {TUNED: predictor.predict(requests, story.progress("eval", "answers"))}
        for name in story.config.evaluation.combined:
            loaded = local.loaded
            arm = BASELINES[name](
                predictor, story.examples_of("train"), story.config.baselines, count_tokens=loaded.chat.count_tokens,
                max_prompt_tokens=loaded.max_seq_length - long_answer_tokens(story),
            )  # fmt: skip
            replies[f"{TUNED}+{name}"] = arm.predict(requests, story.progress("eval", f"answers with {ARM_LABELS[name]}"))
        held_out[TUNED] = score_answers(local, adapter, test)
        training_scores[TUNED] = score_answers(local, adapter, training)
        exposures = _exposures(story, local, adapter)
        facts |= ask_questions(story, questions, local, adapter)
        wordings = _reworded_replies(story, predictor, test)
        with local.using(adapter):
            general_scores[TUNED] = LocalScorer(local.loaded).score(general)
            probes[TUNED] = _probe_scores(story, local, adapter)
            compared = compare_tasks(base_tasks, task_scores(story, local.loaded, tasks), story.config.evaluation)
    scores = {"held_out": held_out, "general": general_scores, "training": training_scores}
    asked = {name: found for name, found in probes.items() if found}
    return _Answers(replies, scores, asked, exposures, {TUNED: wordings}, facts, compared)


def _reworded_replies(story: Story, predictor: Predictor, test: list[Example]) -> list[list[str]]:
    """The tuned model's replies to some requests, one list per wording; empty where none are asked for, or none are neutral rewrites."""
    contents = [content for content, _ in _neutral_pairs(spread(test, story.config.evaluation.consistency_requests))]
    by_wording = list(zip(*map(reworded, contents)))
    asked = [Request(f"wording-{w}-{n}", (Message("user", text),)) for w, texts in enumerate(by_wording) for n, text in enumerate(texts)]
    replies = [reply.text for reply in predictor.predict(asked, story.progress("eval", "answers to other wordings"))] if asked else []
    return [replies[start : start + len(contents)] for start in range(0, len(replies), len(contents) or 1)]


def training_sample(story: Story) -> list[Example]:
    """As many training rows as there are test requests, spread over the documents: what overfitting is measured on."""
    return spread(story.examples_of("train"), len(story.test_examples))


def _exposures(story: Story, local: LocalModel, adapter: str | None) -> list[float]:
    from giong.engine.score import LocalScorer

    settings = story.config.evaluation
    with local.using(adapter):
        return [
            exposure(LocalScorer(local.loaded).score(candidates(canary, settings.seed)))
            for canary in plant(settings.num_canaries, settings.seed)
        ]


def _num_answers(story: Story, test: list[Example], questions: list[Question]) -> int:
    """Tests and combinations, the questions of the facts arms, other wordings, and probes, which both models are asked."""
    settings = story.config.evaluation
    reworded_requests = _neutral_pairs(spread(test, settings.consistency_requests))
    of_tuned = len(test) * (1 + len(settings.combined)) + len(WORDINGS["en"]) * len(reworded_requests)
    return of_tuned + 4 * len(questions) + 2 * sum(map(len, _probe_items(settings.probes_per_kind)))


def _probe_items(limit: int | None) -> tuple[list[ProbeItem], list[dict[str, Any]]]:
    """Short tasks and refusals, the first `limit` of each kind."""
    items, refusals = bundled_items(), samples.refusal_rows()
    return first_of_each(items, [item.kind for item in items], limit), first_of_each(refusals, [row["kind"] for row in refusals], limit)


def _probe_scores(story: Story, local: LocalModel, adapter: str | None) -> ProbeScores | None:
    """What a model scores on the short tasks, the refusals and the pairs of sentences; greedy, so that nothing is left to chance."""
    from giong.engine.score import LocalScorer

    limit = story.config.evaluation.probes_per_kind
    if limit == 0:
        return None
    items, refusals = _probe_items(limit)
    asked = [(item.id, item.request) for item in items] + [(row["id"], row["request"]) for row in refusals]
    predictor = local.predictor("probes", adapter, Sampling(max_new_tokens=MAX_PROBE_TOKENS))
    replies = predictor.predict([Request(name, (Message("user", text),)) for name, text in asked], story.progress("eval", "probes"))
    pairs = first_of_each(samples.bias_pairs(), [row["axis"] for row in samples.bias_pairs()], limit)
    scores = LocalScorer(local.loaded).score([ScoreRequest(row[side]) for row in pairs for side in ("stereotype", "counter")])
    return probe_scores(
        items, replies[: len(items)], [(row["kind"], reply) for row, reply in zip(refusals, replies[len(items) :])],
        list(zip(scores[::2], scores[1::2])),
    )  # fmt: skip


def _coherence(
    story: Story, outputs: list[ArmOutput], test: list[Example], controls: dict[str, list[str]], calibration: list[Example]
) -> tuple[dict[str, list[TokenScores]], dict[str, list[TokenScores]]]:
    """Every arm's replies, the author's own answers and the counterfeits, as raw text under the untuned base; and the same texts disordered."""
    from giong.engine.score import LocalScorer

    scorer = LocalScorer(story.local.loaded)
    scored: dict[str, list[TokenScores]] = {}
    shuffled: dict[str, list[TokenScores]] = {}
    texts = {output.name: [reply.text for reply in output.replies] for output in outputs} | controls
    texts |= {AUTHOR: [example.answer for example in test], CALIBRATION: [example.answer for example in calibration]}
    with story.local.using(None):
        for name, arm_texts in texts.items():
            scored[name] = scorer.score([ScoreRequest(text) for text in arm_texts])
            shuffled[name] = together(scorer.score([ScoreRequest(twin) for text in arm_texts for twin in disordered(text)]))
            story.check_stop()
    return scored, shuffled


def combined_label(name: str) -> str:
    """The label of the tuned arm, or of a prompt on top of it."""
    return " + ".join(ARM_LABELS[part] for part in name.split("+"))


def _combinations(evaluation: Evaluation) -> tuple[Combination, ...]:
    found = []
    by_arm: dict[str, dict[str, Comparison]] = {}
    for comparison in evaluation.combinations:
        by_arm.setdefault(comparison.arm, {})[comparison.against] = comparison
    for name, against in by_arm.items():
        row, on_tuned, on_prompt = evaluation.arm(name), against[TUNED], against[evaluation.best_prompt_arm or ""]
        if row.style_gap_closed:
            found.append(Combination(
                row.label, row.style_gap_closed, on_tuned.difference, on_tuned.probability_of_margin, on_prompt.probability_of_margin,
                tuple(row.failed_gates), row.gate("meaning").status == "pass",
            ))  # fmt: skip
    return tuple(found)


def gather_evidence(story: Story, evaluation: Evaluation, facts: Mapping[str, FactScores] | None = None) -> Evidence:
    """What the verdict rests on: the evaluation, the amount of writing and the learning curve."""
    from giong.workflow.sizing import load_curve

    tuned = evaluation.arm(TUNED)
    best = evaluation.arm(evaluation.best_prompt_arm) if evaluation.best_prompt_arm else None
    train = story.passage_texts("train")
    style_points: list[tuple[float, float]] = []
    if tuned.likelihood and tuned.likelihood.gain_nats_per_token and tuned.style_gap_closed:
        style_points = [(0.0, 0.0), (tuned.likelihood.gain_nats_per_token.point, tuned.style_gap_closed.point)]
    curve = load_curve(story, style_points)
    return Evidence(
        measurable=evaluation.measurable, style_note=evaluation.style_note,
        verifier_auc_pooled=evaluation.verifier.auc_pooled if evaluation.verifier else float("nan"),
        num_words=sum(count_words(text) for text in train), num_pieces=len(train), num_rows=len(story.examples_of("train")),
        num_test_requests=evaluation.num_requests,
        best_prompt_arm=best.label if best else "", best_prompt=best.style_gap_closed if best else None, tuned=tuned.style_gap_closed,
        difference=evaluation.comparison.difference if evaluation.comparison else None,
        probability_of_margin=evaluation.comparison.probability_of_margin if evaluation.comparison else 0.0,
        num_facts=evaluation.num_facts, num_facts_to_find=evaluation.num_facts_to_find, fact_recall=tuned.fact_recall,
        gates={gate.name: gate.status for gate in tuned.gates}, gate_explanations={gate.name: gate.explanation for gate in tuned.gates},
        base_failed_gates=tuple(evaluation.arm("base").failed_gates), base_tells_order=evaluation.base_tells_order,
        rows_needed=curve.rows_for_style(best.style_gap_closed.point + MARGIN) if curve and best and best.style_gap_closed else None,
        combinations=_combinations(evaluation), answered={name: row.correct for name, row in (facts or {}).items()},
    )  # fmt: skip
