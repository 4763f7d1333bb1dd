"""Blind comparison: pairs and order, votes on disk, figures by hand, the exported preferences, and the page's HTTP side."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from answered_project import answer, make_answered
from command_line import giong

import giong as package
from giong import errors
from giong.contracts import Message
from giong.data.preferences import read_preferences
from giong.evaluation.compare import Comparison, export_preferences, vote_results
from giong.evaluation.compare.agreement import krippendorff_alpha, rater_pairs
from giong.evaluation.compare.pairs import in_order, make_pairs
from giong.evaluation.compare.results import sum_up
from giong.evaluation.compare.strength import bradley_terry
from giong.evaluation.compare.votes import Vote, read_votes, votes_path
from giong.evaluation.compare.words import WORDS, words_for
from giong.evaluation.report.opinions import vote_tables
from giong.workspace import Project, plain, read_jsonl, write_json

LABELS = {"base": "base as it is", "few_shot": "few-shot", "fine_tuned": "fine-tuned", "author": "the author"}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return make_answered(tmp_path_factory.mktemp("compare") / "voice")


@pytest.fixture(autouse=True)
def _no_votes(project: Project) -> None:
    votes_path(project).unlink(missing_ok=True)


def ballot(left: str, right: str, choice: str, *, rater: str = "An", request: str = "r1", mode: str = "preference") -> Vote:
    pair = f"{request}:{min(left, right)}:{max(left, right)}"
    texts = f"{left} on {request}", f"{right} on {request}"
    messages = (Message("user", request),)
    return Vote(pair, mode, rater, "2026-01-01T00:00:00+00:00", choice, left, right, request, f"doc-{request}", messages, *texts, 0, "yes")  # type: ignore[arg-type]


# Pairs and their order


def test_all_pairs_are_there_and_equal_texts_are_not(project: Project) -> None:
    comparison = package.compare(project)
    assert comparison.arms == ["fine_tuned", "few_shot", "author"]
    assert len(comparison.pairs) == 3 * 8
    test = [pair for pair in comparison.pairs if pair.arms == ("fine_tuned", "author")]
    assert len(test) == 8
    twice = {"base": ["same", "one"], "few_shot": ["same ", "two"]}
    pairs, num_equal = make_pairs(_examples(comparison)[:2], twice, "preference")
    assert (len(pairs), num_equal) == (1, 1)


def _examples(comparison: Comparison) -> list[Any]:
    from giong.config import load
    from giong.evaluation.answers import answered

    return answered(comparison.project, load(comparison.project.config_path))[0]


def test_the_order_is_random_known_by_its_seed_and_shows_every_request_before_any_again(project: Project) -> None:
    pairs = package.compare(project).pairs
    shown = in_order(pairs, "An", "preference", 0)
    assert shown == in_order(pairs[::-1], "An", "preference", 0)
    assert len({pair.request_id for pair in shown[:8]}) == 8
    orders = {tuple(pair.id for pair in in_order(pairs, rater, "preference", seed)) for rater in ("An", "Bea") for seed in (0, 1)}
    assert len(orders) == 4
    sides = Counter(
        pair.arms.index("author") for rater in range(40) for pair in in_order(pairs, str(rater), "preference", 0) if "author" in pair.arms
    )
    # 640 fair coins: four standard deviations are 51.
    assert abs(sides[0] - 320) < 51


def test_the_authors_text_never_returns_when_it_is_to_be_recognised(project: Project) -> None:
    comparison = package.compare(project, ["fine_tuned", "few_shot", "base"], mode="author")
    shown = comparison.all_for("An")
    assert all("author" in pair.arms for pair in shown)
    assert Counter(pair.request_id for pair in shown).most_common(1)[0][1] == 1
    assert len({pair.arms for pair in shown} | {pair.arms[::-1] for pair in shown}) > 2


# Votes


def test_votes_are_appended_and_a_rater_goes_on_where_she_stopped(project: Project) -> None:
    comparison = package.compare(project, num_pairs=5)
    first, second, *_ = comparison.remaining("An")
    comparison.vote(first, "left", rater=" An ", consent="I was told")
    comparison.vote(second, "tie", rater="An", consent="I was told")
    comparison.vote(second, "right", rater="An", consent="I was told")
    again = package.compare(project, num_pairs=5)
    assert again.remaining("An") == again.all_for("An")[2:]
    assert len(again.remaining("Bea")) == 5
    rows = read_jsonl(votes_path(project))
    assert [row["choice"] for row in rows] == ["left", "tie", "right"]
    assert rows[0]["consent"] == "I was told"
    assert (rows[0]["left"], rows[0]["right"], rows[0]["left_text"]) == (*first.arms, first.texts[0])
    assert rows[0]["time"].endswith("+00:00")
    results = again.results()
    assert (results.num_votes, results.num_replaced, results.raters) == (2, 1, {"An": 2})
    # A kill in the middle of a line costs that line alone.
    with votes_path(project).open("a") as stream:
        stream.write('{"pair": "torn')
    assert len(read_votes(votes_path(project))) == 3


def test_votes_on_replaced_answers_do_not_count_but_are_exported(project: Project, tmp_path: Path) -> None:
    comparison = package.compare(project, ["few_shot", "author"])
    for pair in comparison.remaining("An"):
        comparison.vote(pair, "left", rater="An", consent="yes")
    before = [reply["text"] for reply in read_jsonl(project.arm_path("few_shot"))]
    try:
        answer(project, "few_shot", ["something else", *before[1:]])
        results = vote_results(project)
        assert (results.num_votes, results.num_outdated) == (7, 1)
        assert comparison.export(tmp_path / "prefs.jsonl").num_pairs == 8
    finally:
        answer(project, "few_shot", before)


@pytest.mark.parametrize(
    ("arms", "mode", "error", "part"),
    [
        (["few_shoot", "author"], "preference", errors.ConfigError, "few_shoot"),
        (["author"], "preference", errors.StoryError, "nothing to compare with the author"),
        (None, "guess", errors.ConfigError, "'guess'"),
    ],
)
def test_what_cannot_be_compared(project: Project, arms: Any, mode: Any, error: type[Exception], part: str) -> None:
    with pytest.raises(error, match=part):
        package.compare(project, arms, mode=mode)


def test_answers_to_other_requests_are_never_shown(project: Project) -> None:
    step = project.step_path("baseline-base")
    record = json.loads(step.read_text())
    write_json(step, {**record, "result": {**record["result"], "examples_hash": "of other requests"}})
    try:
        with pytest.raises(errors.StoryError, match="other test requests"):
            package.compare(project, ["base", "author"])
    finally:
        write_json(step, record)


def test_a_vote_needs_a_name_a_choice_and_a_consent(project: Project) -> None:
    comparison = package.compare(project)
    pair = comparison.remaining("An")[0]
    for rater, choice, consent in ((" ", "left", "yes"), ("An", "both", "yes"), ("An", "left", " ")):
        with pytest.raises(errors.ConfigError):
            comparison.vote(pair, choice, rater=rater, consent=consent)
    assert not votes_path(project).exists()
    votes_path(project).write_text('{"pair": "x"}\n')
    with pytest.raises(errors.DataError, match=r"votes\.jsonl:1"):
        comparison.remaining("An")


# Figures


def test_win_rates_by_hand() -> None:
    votes = [
        ballot("fine_tuned", "few_shot", "left", request="r1"), ballot("few_shot", "fine_tuned", "right", request="r2"),
        ballot("few_shot", "fine_tuned", "tie", request="r3"), ballot("fine_tuned", "few_shot", "right", request="r4"),
        ballot("fine_tuned", "few_shot", "left", request="r4"),
    ]  # fmt: skip
    results = sum_up(votes, LABELS, num_bootstrap=200)
    pair = results.pairs[0]
    # The order of the labels, whatever the sides; the last vote on r4 replaced the one before: lost 0, won 3, one tie.
    assert pair.arms == ("few_shot", "fine_tuned")
    assert (pair.num_votes, pair.num_wins, pair.num_losses, pair.num_ties) == (4, 0, 3, 1)
    assert pair.win_rate.point == 0.125
    assert results.num_replaced == 1
    # Decided: left, right, left.
    assert results.left_rate is not None
    assert results.left_rate.point == pytest.approx(2 / 3)


def test_unanimous_votes_are_not_certainty() -> None:
    votes = [ballot("fine_tuned", "base", "left", request=f"r{number}", rater=rater) for number in range(10) for rater in ("An", "Bea")]
    rate = sum_up(votes, LABELS, num_bootstrap=200).pairs[0].win_rate
    # Wilson for 0 of 10 requests (20 votes are no 20 requests): 1 / (1 + 10 / 1.96^2).
    assert (rate.point, rate.low, rate.high) == pytest.approx((0.0, 0.0, 0.27754), abs=1e-4)


def test_bradley_terry_by_hand_and_from_known_strengths() -> None:
    two = bradley_terry(np.array([[0.0, 3.0], [1.0, 0.0]]), ridge=1e-9)
    assert two[0] - two[1] == pytest.approx(np.log(3))
    theta = np.array([0.8, 0.1, -0.9])
    chance = 1 / (1 + np.exp(theta[None, :] - theta[:, None]))
    wins = 1000 * chance * (1 - np.eye(3))
    assert bradley_terry(wins) == pytest.approx(theta, abs=1e-3)
    assert bradley_terry(np.stack([wins, wins.T]))[1] == pytest.approx(-theta, abs=1e-3)
    assert np.isfinite(bradley_terry(np.array([[0.0, 50.0], [0.0, 0.0]]))).all()


def test_strengths_need_votes_that_link_all_arms() -> None:
    circle = [("fine_tuned", "base", "left"), ("base", "few_shot", "tie"), ("fine_tuned", "few_shot", "left")]
    votes = [ballot(*row, request=f"r{number}") for number in range(8) for row in circle]
    results = sum_up(votes, LABELS, num_bootstrap=200)
    assert results.strengths[0].arm == "fine_tuned"
    assert results.strengths[0].win_probability.point > 0.9
    assert results.strengths[1].theta == pytest.approx(results.strengths[2].theta, abs=1e-6)
    assert sum_up(votes[:12], LABELS, num_bootstrap=200).strengths == []
    apart = [ballot(*row, request=f"r{number}") for number in range(12) for row in (circle[0], ("few_shot", "author", "left"))]
    assert sum_up(apart, LABELS, num_bootstrap=200).strengths == []


def test_krippendorffs_alpha_is_that_of_his_example() -> None:
    # Krippendorff 2011, "Computing Krippendorff's alpha-reliability", section C: four observers, twelve units, nominal: 0.743.
    observers = (
        (1, 2, 3, 3, 2, 1, 4, 1, 2, 0, 0, 0), (1, 2, 3, 3, 2, 2, 4, 1, 2, 5, 0, 3),
        (0, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, 0), (1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, 0),
    )  # fmt: skip
    assert krippendorff_alpha([[value for value in unit if value] for unit in zip(*observers)]) == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha([["a"], ["b"]]) is None
    assert krippendorff_alpha([["a", "a"], ["a", "a"]]) is None


def test_cohens_kappa_by_hand() -> None:
    units = [{"An": one, "Bea": other} for one, other in (("a", "a"), ("a", "a"), ("b", "b"), ("a", "b"))] + [{"An": "a"}]
    pair = rater_pairs(units)[0]
    # Observed 3/4, by chance 3/4 x 2/4 + 1/4 x 2/4 = 1/2.
    assert (pair.raters, pair.num_common, pair.agreement, pair.kappa) == (("An", "Bea"), 4, 0.75, pytest.approx(0.5))
    assert rater_pairs([{"An": "a", "Bea": "a"}])[0].kappa is None


def test_detection_against_chance() -> None:
    seen = [ballot("author", "fine_tuned", "left", request=f"r{number}", mode="author") for number in range(12)]
    blind = [ballot("author", "base", ("left", "right", "tie")[number % 3], request=f"s{number}", mode="author") for number in range(12)]
    results = sum_up([*seen, *blind], LABELS, num_bootstrap=200)
    found = {row.arm: row for row in results.detections}
    assert list(found) == ["all", "base", "fine_tuned"]
    assert (found["base"].num_right, found["base"].num_wrong, found["base"].num_unsure) == (4, 4, 4)
    assert found["base"].rate.point == 0.5
    assert (found["fine_tuned"].above_chance, found["base"].above_chance) == (True, False)
    assert results.pairs == []
    table = vote_tables(results.to_dict())["tables"][0]
    assert [row[-1] for row in table["rows"]] == ["recognised", "not told from chance", "recognised"]


# Export


def test_preferences_are_by_majority_and_name_what_is_left_out(project: Project, tmp_path: Path) -> None:
    rows = [
        ballot("few_shot", "author", "right", rater="An"), ballot("author", "few_shot", "left", rater="Bea"), ballot("few_shot", "author", "left", rater="Cy"),
        ballot("few_shot", "author", "tie", request="r2"),
        ballot("few_shot", "author", "left", request="r3"), ballot("few_shot", "author", "right", request="r3", rater="Bea"),
        ballot("few_shot", "author", "left", request="r4", mode="author"),
    ]  # fmt: skip
    from dataclasses import replace

    rows.append(replace(ballot("few_shot", "author", "left", request="r5"), left_text=" "))
    rows.append(replace(ballot("few_shot", "author", "right", request="r6"), left_text=""))
    votes_path(project).write_text("".join(json.dumps(row, default=plain) + "\n" for row in rows))
    done = export_preferences(project, tmp_path / "prefs.jsonl")
    assert (done.num_pairs, done.num_ties, done.num_divided, done.num_empty, done.num_author_votes) == (1, 1, 1, 2, 1)
    assert read_jsonl(done.path) == [
        {
            "prompt": [{"role": "user", "content": "r1"}],
            "chosen": [{"role": "assistant", "content": "author on r1"}],
            "rejected": [{"role": "assistant", "content": "few_shot on r1"}],
        }
    ]
    # What is exported can be learnt from.
    pairs = read_preferences(done.path)
    assert [(pair.messages[0].content, pair.chosen, pair.rejected) for pair in pairs] == [("r1", "author on r1", "few_shot on r1")]
    export_preferences(project, tmp_path / "named.jsonl", with_raters=True)
    named = read_jsonl(tmp_path / "named.jsonl")[0]["votes"]
    assert [(row["rater"], row["choice"]) for row in named] == [("An", "chosen"), ("Bea", "chosen"), ("Cy", "rejected")]


# Terminal and page


def test_the_command_line_from_votes_to_preferences(project: Project, tmp_path: Path) -> None:
    told = ("compare", "--project", project.root, "--rater", "An")
    giong("compare", "results", "--project", project.root).refused(errors.StoryError, "Nobody has voted yet", "giong compare")
    first = giong(*told, "--agree", given="1\nx\n0\nb\n2\nq\n").worked()
    assert first.out == ""
    assert "1 of 24" in first.told
    assert giong(*told, given="n\n").code == 1
    assert [row["choice"] for row in read_jsonl(votes_path(project))] == ["left", "tie", "right"]
    vietnamese = giong(*told, "--language", "vi", given="y\n1\n").worked()
    assert "3 trên 24" in vietnamese.told
    assert read_votes(votes_path(project))[-1].consent == WORDS["vi"]["consent"]
    results = json.loads(giong("compare", "--project", project.root, "results", "--json").worked().out)
    assert results["num_votes"] == 3
    exported = giong("compare", "export", "--project", project.root, "--to", tmp_path / "prefs.jsonl").worked()
    assert exported.out.strip() == str(tmp_path / "prefs.jsonl")
    assert "3 preference pairs" in exported.told
    giong(*told, "--mode", "guess").refused(errors.ConfigError, "'guess'")


def test_the_page_says_nothing_about_the_arms(project: Project) -> None:
    from giong.server.app import create_compare_app

    comparison = package.compare(project)
    answer_of = asked(create_compare_app(comparison))
    page = answer_of("GET", "/compare")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert not [name for name in ("fine_tuned", "few_shot", "http://", "https://") if name in page.text]
    words = json.loads(page.text.partition("const words = ")[2].partition(";\n")[0])
    assert words["vi"]["consent"] == WORDS["vi"]["consent"]
    shown = answer_of("GET", "/compare/next?rater=An").json()
    assert set(shown["pair"]) == {"id", "request", "left", "right"}
    cast = {"rater": "An", "pair": shown["pair"]["id"], "choice": "right", "language": "en"}
    after = answer_of("POST", "/compare/votes", json=cast).json()
    assert (shown["number"], after["number"], after["total"]) == (1, 2, 24)
    assert read_votes(votes_path(project))[0].consent == WORDS["en"]["consent"]
    assert answer_of("POST", "/compare/votes", json={**cast, "pair": "0"}).status_code == 404
    assert answer_of("POST", "/compare/votes", json={**cast, "choice": "both"}).status_code == 400
    assert answer_of("GET", "/compare/next?rater=%20").status_code == 400
    # What another site's page could send here: a form, and a host name that points at this machine.
    assert answer_of("POST", "/compare/votes", content="rater=An", headers={"content-type": "text/plain"}).status_code == 400
    assert answer_of("GET", "/compare", headers={"host": "evil.example"}).status_code == 403
    assert len(read_votes(votes_path(project))) == 1


def asked(app: Any) -> Any:
    """A function that sends one request to the application, without a socket."""
    import asyncio

    async def send(method: str, path: str, **more: Any) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
            return await client.request(method, path, **more)

    return lambda *arguments, **more: asyncio.run(send(*arguments, **more))


def test_every_language_has_every_word() -> None:
    assert {language: set(words) for language, words in WORDS.items()} == {language: set(WORDS["en"]) for language in WORDS}
    assert words_for("en", "author", "")["question"] == "Which one did the author write?"
    assert words_for("vi", "author", "Bé {An}")["question"] == "Bài nào do Bé {An} viết?"
