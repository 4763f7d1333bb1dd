"""The pages of `giong serve`, through the HTTP interface and without a model: what they show, keep and give away."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from answered_project import make_answered
from test_advice import evaluated
from test_compare import asked
from test_server import ScriptedBackend

from giong.config import AdviceConfig, load
from giong.evaluation.compare import Comparison, read_votes
from giong.evaluation.compare.votes import votes_path
from giong.project import init, verdict
from giong.server.app import create_app
from giong.server.words import ADVISE, WORDS
from giong.sizing.questions import QUESTIONS
from giong.workspace import Project

HTML = {"accept": "text/html,*/*"}
OPEN = dict.fromkeys(QUESTIONS)

__all__ = ["evaluated"]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return make_answered(tmp_path_factory.mktemp("pages") / "voice")


def pages(project: Project, key: str | None = None) -> Any:
    return asked(create_app(ScriptedBackend(), key, project))


def test_the_first_page_links_to_the_others_and_names_the_models(project: Project) -> None:
    ask = pages(project)
    first = ask("GET", "/")
    assert first.status_code == 200
    assert [part for part in ('href="/compare"', "org/voice", "http://127.0.0.1/v1") if part not in first.text] == []
    assert 'href="/"' in ask("GET", "/compare").text
    # Nothing but what stands in the page may run or be loaded.
    assert all(part in first.headers["content-security-policy"] for part in ("default-src 'none'", "script-src 'nonce-"))
    assert asked(create_app(ScriptedBackend(), None))("GET", "/").status_code == 404


def test_votes_of_the_server_are_votes_of_the_project(project: Project) -> None:
    ask = pages(project)
    shown = ask("GET", "/compare/next?rater=An").json()["pair"]
    ballot = {"rater": "An", "pair": shown["id"], "choice": "left", "language": "vi"}
    assert ask("POST", "/compare/votes", json=ballot).json()["number"] == 2
    cast = read_votes(votes_path(project))[0]
    assert (cast.rater, cast.choice, cast.left_text, cast.right_text) == ("An", "left", shown["left"], shown["right"])
    assert Comparison(project).remaining("An")[0].id != cast.pair


def test_nobody_learns_or_forges_a_pair_by_its_id(project: Project) -> None:
    ask = pages(project)
    own = {pair.id for pair in Comparison(project).pairs}
    ids = {rater: ask("GET", f"/compare/next?rater={rater}").json()["pair"]["id"] for rater in ("Bea", "Cy")}
    ballot = {"rater": "Bea", "choice": "left", "language": "en"}
    # The plain hash, which can be computed for guessed arms, is neither shown nor taken; nor is what another rater was shown.
    for pair in (sorted(own)[0], ids["Cy"], "đ"):
        assert ask("POST", "/compare/votes", json={**ballot, "pair": pair}).status_code == 404
    assert not own & set(ids.values())
    foreign = {**ballot, "pair": ids["Bea"]}
    assert ask("POST", "/compare/votes", content=str(foreign), headers={"content-type": "text/plain"}).status_code == 400
    assert "Bea" not in {vote.rater for vote in read_votes(votes_path(project))}


def test_a_browser_gives_the_key_as_a_password(project: Project) -> None:
    ask = pages(project, "s3cret")

    def status(credentials: str, path: str = "/") -> httpx.Response:
        return ask("GET", path, headers={"authorization": f"Basic {base64.b64encode(credentials.encode()).decode()}"})

    assert [status(pair).status_code for pair in ("me:s3cret", ":s3cret", "s3cret", "me:wrong")] == [200, 200, 401, 401]
    assert ask("GET", "/compare/next?rater=An").status_code == 401
    assert ask("GET", "/", headers={"authorization": "Basic %%%"}).status_code == 401
    assert ask("GET", "/").headers["www-authenticate"].startswith("Basic")
    assert "www-authenticate" not in ask("GET", "/v1/models").headers


def test_what_is_not_there_yet_is_said_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("Some writing.")
    ask = pages(init(tmp_path / "voice", sources=[tmp_path / "a.md"]))
    shown = ask("GET", "/compare", headers=HTML)
    assert (shown.status_code, shown.headers["content-type"]) == (409, "text/html; charset=utf-8")
    assert "There are no requests yet. Run `giong run` first." in shown.text
    assert str(tmp_path) not in shown.text
    assert ask("GET", "/compare/next?rater=An").json()["error"]["message"].startswith("There are no requests yet")


def test_the_questionnaire_is_that_of_the_command_line(evaluated: Project) -> None:
    ask = pages(evaluated)
    page = ask("GET", "/advise").text
    words = json.loads(page.partition("const words = ")[2].partition(";\n")[0])
    assert all(words[language][name] == question.text[language] for language in ("en", "vi") for name, question in QUESTIONS.items())
    assert page.count("<fieldset") == len(QUESTIONS)
    assert page.count('type="radio" name="may_imitate"') == 3
    assert page.count('type="checkbox" name="goals"') == 6
    state = json.loads(page.partition("let state = ")[2].partition(";\n")[0])
    assert (state["advice"], state["verdict"]["en"]["decision"]) == (OPEN, "go")


def test_answers_go_into_giong_yaml_and_drive_the_verdict(evaluated: Project) -> None:
    ask, before = pages(evaluated), evaluated.config_path.read_text()
    sheet = {**OPEN, "goals": ["voice", "facts"], "must_cite": "true", "may_imitate": "true", "human_hours": "8"}
    state = ask("POST", "/advise/answers", json={"advice": sheet}).json()
    assert load(evaluated.config_path).advice == AdviceConfig(goals=["voice", "facts"], must_cite=True, may_imitate=True, human_hours=8)
    found = state["verdict"]
    assert (found["en"]["decision"], found["en"]["answer"], found["vi"]["answer"]) == ("combine", "must_cite", "must_cite")
    assert found["vi"]["reason"].startswith("Câu trả lời phải dẫn nguồn") and found["vi"]["cautions"][0].startswith("Chưa ai cho biết")
    assert verdict(evaluated).startswith("combine: Answers must cite sources")
    # What is not named stays as it is, what is not answered any longer is open again, and the rest of the file is as it was written.
    assert ask("POST", "/advise/answers", json={"advice": {"must_cite": False}}).json()["advice"] == {**state["advice"], "must_cite": False}
    assert ask("POST", "/advise/answers", json={"advice": OPEN}).json()["advice"] == OPEN
    assert load(evaluated.config_path).advice == AdviceConfig()
    assert "base_licensed" not in evaluated.config_path.read_text()
    assert before.strip() in evaluated.config_path.read_text()


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ({"advice": {"human_hours": "-1"}}, "human_hours"),
        ({"advice": {"goals": ["fame"]}}, "goals"),
        ({"advice": {"knowledge_changes": "hourly"}}, "knowledge_changes"),
        ({"advice": {"fame": True}}, "fame"),
        ({"advice": {}, "model": "x"}, "model"),
    ],
)
def test_what_is_no_answer_is_refused_and_nothing_written(project: Project, body: dict, part: str) -> None:
    before = project.config_path.read_text()
    refused = pages(project)("POST", "/advise/answers", json=body)
    assert refused.status_code == 400
    assert part in refused.json()["error"]["message"]
    form = pages(project)("POST", "/advise/answers", content='{"advice": {}}', headers={"content-type": "text/plain"})
    assert form.status_code == 400
    assert project.config_path.read_text() == before


def test_before_an_evaluation_the_page_says_so(project: Project) -> None:
    state = pages(project)("POST", "/advise/answers", json={"advice": OPEN}).json()
    assert state["verdict"] == {"en": None, "vi": None}


def test_every_language_of_the_pages_has_every_word() -> None:
    for words in (WORDS, ADVISE):
        assert set(words["en"]) == set(words["vi"])
