"""Reverse synthesis: leaks, refusals, the journal, the stand-in and recordings, with counted requests."""

from __future__ import annotations

import json
import threading
import unicodedata
from pathlib import Path

import pytest
from fake_teacher import Answer, Failure, FakeTeacher

from giong.clients import RemoteModel, SpendLedger
from giong.config import DataConfig, RemoteModelConfig, SynthesisConfig
from giong.contracts import Message, Passage, Reply, Sampling
from giong.data.split import split_documents
from giong.data.synthesis import KINDS, Recorded, StandIn, leaks, longest_shared_run, synthesise
from giong.data.synthesis.kinds import read_task, strip_wrapping
from giong.data.synthesis.leak import is_refusal, why_rejected
from giong.data.synthesis.stand_in import is_english, neutral_rewrite
from giong.errors import DataError, Interrupted, SpendCapReached, TeacherError

ENGLISH = [
    "I left the ladder out on Sunday, and by Tuesday it had rust on 3 of its 12 rungs. I'd meant to bring it in (I always mean to). "
    "You can guess what my brother said. He's right, of course, but I didn't tell him so.",
    "My watch stopped at twenty past four, which is when I wanted to leave anyway. So I left. The bus wasn't there, and I walked 5 miles "
    "in shoes that don't like rain. Would I do it again? I think I would.",
    "There's a jar of buttons on my desk, and I couldn't tell you where most of them came from. One is brass. My aunt says it's from a "
    "coat she wore in 1961, but she also says she never had a coat.",
    "I tried to learn the fiddle at 47. The neighbours were kind about it for 2 weeks. Then they weren't, and I can't blame them; "
    "I've heard the recordings. It sounds like a gate that's got opinions.",
]  # fmt: skip
CHINESE = "昨天下午我去河边散步，看见一位老人在钓鱼。他坐了三个小时，一条也没有钓到，却一直在笑。我问他为什么，他说：“鱼不在，水还在。”"
VIETNAMESE = (
    "Sáng nay tôi dậy lúc năm giờ, pha một ấm trà rồi ngồi ngoài hiên nhìn mưa. Con mèo nhà bên sang ngủ nhờ trên ghế, ướt như chuột. "
    "Tôi không đuổi nó, vì tôi cũng chẳng biết đi đâu."
)


@pytest.fixture
def passages() -> list[Passage]:
    return [Passage(f"d{number}#0", f"d{number}", 0, text) for number, text in enumerate(ENGLISH)]


@pytest.fixture
def split(passages):
    return split_documents(passages, DataConfig())


class Project:
    """A journal, a cost record and settings for one teacher; `run` is one run of the step."""

    def __init__(self, folder: Path, passages, split, *, max_usd: float = 5.0, **settings) -> None:
        self.passages, self.split = passages, split
        self.journal, self.costs = folder / "journal.jsonl", folder / "costs.jsonl"
        self.max_usd, self.settings = max_usd, settings
        self.events: list = []

    def run(self, teacher: FakeTeacher, **more):
        remote = RemoteModelConfig(
            base_url="http://127.0.0.1/v1", model="scribe", input_usd_per_million_tokens=100, output_usd_per_million_tokens=1000,
            max_retries=0, concurrency=2, timeout_seconds=5,
        )  # fmt: skip
        settings = {"source": "teacher", "teacher": remote, **self.settings, **more}
        config = SynthesisConfig(**settings)
        # The journal's keys hold the address, and every fake server has another port: the client alone is pointed at it.
        model = _at(teacher, remote.model_copy(update={"concurrency": config.teacher.concurrency}), SpendLedger(self.costs, self.max_usd))
        return synthesise(self.passages, self.split, config, journal=self.journal, teacher=model, emit=self.events.append)

    @property
    def rows(self) -> list[dict]:
        return [json.loads(line) for line in self.journal.read_text().splitlines()]


def _at(teacher: FakeTeacher, remote: RemoteModelConfig, ledger: SpendLedger):
    return RemoteModel(remote.model_copy(update={"base_url": teacher.base_url}), ledger, purpose="synthesis", sleep=lambda _: None)


def rewrite(call) -> str:
    return f"A statement of {len(call.passage)} characters was made."


def echo(call) -> str:
    return call.passage


# Leaks -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_text", "answer", "run"),
    [
        ("the cat sat on a mat", "the cat sat on the mat", 4),
        ("THE CAT, sat — on!", "the cat sat on the mat", 4),
        ("don’t ask me", "Well, don't ask me again", 3),
        ("nothing shared", "at all", 0),
        ("一位老人在河边", "看见一位老人在钓鱼", 5),
        ("a b c x d e f g", "d e f g y a b c", 4),
        ("", "words", 0),
    ],
)
def test_the_longest_shared_run_by_hand(request_text, answer, run):
    assert longest_shared_run(request_text, answer) == run


def test_the_limit_is_in_words_and_two_characters_are_one():
    eight = "one two three four five six seven eight"
    assert leaks(f"So {eight}.", f"{eight} nine", 8)
    assert not leaks("So one two three four five six seven.", f"{eight} nine", 8)
    assert leaks("某" + CHINESE[:17], CHINESE, 8)  # 16 characters and a comma between
    assert not leaks("某" + CHINESE[:16], CHINESE, 8)
    assert longest_shared_run("某" + CHINESE[:17], CHINESE) == 16


def test_spelling_of_accents_does_not_hide_a_leak():
    assert leaks(unicodedata.normalize("NFD", VIETNAMESE), VIETNAMESE, 8)


@pytest.mark.parametrize(
    ("request_text", "reason"),
    [
        ("", "the request is empty"),
        (" ... ", "the request is empty"),
        (ENGLISH[0].upper(), "the request is the answer itself"),
        ("I’m sorry, but I can't help with that.", "the teacher refused"),
        ("I can't rewrite this text.", "the teacher refused"),
        ("抱歉，我无法完成这个请求。", "the teacher refused"),
        ("Xin lỗi, tôi không thể giúp.", "the teacher refused"),
        ("It is stated that by Tuesday it had rust on 3 of those rungs.", "shares 8 words in a row with the answer: 'by Tuesday"),
        ("The ladder remained outside until Tuesday and 3 of 12 rungs rusted.", ""),
    ],
)
def test_why_a_request_is_rejected(request_text, reason):
    found = why_rejected(request_text, ENGLISH[0], 8)
    assert reason in found
    assert bool(found) == bool(reason)


def test_a_long_text_that_begins_with_an_apology_is_no_refusal():
    assert not is_refusal("I am sorry to report that " + "the bridge was closed for repairs " * 8)


# Kinds -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
def test_a_task_is_read_back_as_it_was_made(kind):
    text = "A text with {language} and </text> in it."
    messages = kind.teacher_messages(text, "Thai", "Try again.")
    assert read_task(messages) == (kind, text)
    assert messages[1].content.endswith("Try again.")
    assert ("Thai" in messages[1].content.partition("</text>\n\n")[2]) == (kind.name == "translation")


def test_the_instruction_can_be_left_out_of_the_training_request():
    kind = KINDS["neutral_rewrite"]
    whole = kind.training_messages("Plain {request} text.", drop_instruction=False)
    assert whole == (Message("user", "Rewrite the following text in my own voice:\n\nPlain {request} text."),)
    assert kind.training_messages("Plain text.", drop_instruction=True) == (Message("user", "Plain text."),)
    assert KINDS["question"].training_messages("Why?", drop_instruction=False) == (Message("user", "Why?"),)


def test_another_wording_or_language_is_another_version():
    translation = KINDS["translation"]
    assert translation.instruction_version("English") != translation.instruction_version("French")
    assert KINDS["outline"].instruction_version("English") == KINDS["outline"].instruction_version("French")
    assert len({kind.instruction_version("English") for kind in KINDS.values()}) == 4


@pytest.mark.parametrize("answer", ["Plain.", "<text>\nPlain.\n</text>", "```\nPlain.\n```", "```text\nPlain.\n```\n"])
def test_wrapping_is_taken_off(answer):
    assert strip_wrapping(answer) == "Plain."


# A teacher over HTTP ---------------------------------------------------------------------------------------------------


def test_every_passage_gets_a_request_and_keeps_its_own_words(tmp_path, passages, split):
    project = Project(tmp_path, passages, split, kinds=["neutral_rewrite", "question"])
    with FakeTeacher(rewrite) as teacher:
        examples, report = project.run(teacher)
    assert [example.id for example in examples] == [f"{p.id}:{kind}" for p in passages for kind in ("neutral_rewrite", "question")]
    assert [example.answer for example in examples[::2]] == [p.text for p in passages]
    assert all(example.side == split.side_of(p) for example, p in zip(examples[::2], passages, strict=True))
    assert examples[0].messages[0].content.startswith("Rewrite the following text in my own voice:\n\nA statement of")
    assert examples[0].source == "scribe"
    assert (report.num_asked, report.num_resumed, report.num_examples) == (8, 0, 8)
    # 100 tokens at 100 $/M and 50 at 1000 $/M, eight times
    assert report.cost_usd == pytest.approx(0.48)
    assert report.examples_per_kind == {"neutral_rewrite": 4, "question": 4}
    assert not report.left_out


def test_a_leak_is_asked_again_with_the_phrase_and_then_left_out(tmp_path, passages, split):
    def script(call):
        if call.passage == ENGLISH[0]:
            return f"Here: {ENGLISH[0][:80]}"
        if call.passage == ENGLISH[1] and "rejected" not in call.user:
            return echo(call)
        return rewrite(call)

    project = Project(tmp_path, passages, split, max_attempts=3)
    with FakeTeacher(script) as teacher:
        examples, report = project.run(teacher)
    assert [example.document_id for example in examples] == ["d1", "d2", "d3"]
    left = report.left_out[0]
    assert (left.passage_id, left.kind, left.num_attempts, left.failed) == ("d0#0", "neutral_rewrite", 3, False)
    assert "words in a row with the answer: 'I left the ladder out" in left.reason
    assert report.num_rejected == 4
    assert teacher.num_calls == 3 + 2 + 1 + 1
    second = next(call for call in teacher.calls if call.passage == ENGLISH[1] and "rejected" in call.user)
    assert "the request is the answer itself" in second.user
    assert "at most 5 words in a row" in second.user
    assert [event.message for event in project.events] == [f"d0#0 (neutral_rewrite) is left out: {left.reason}"]


def test_what_was_left_out_is_not_paid_again_unless_more_attempts_are_allowed(tmp_path, passages, split):
    project = Project(tmp_path, passages, split, max_attempts=2)
    with FakeTeacher(lambda call: echo(call) if call.passage == ENGLISH[0] else rewrite(call)) as teacher:
        project.run(teacher)
        assert teacher.num_calls == 5
        examples, report = project.run(teacher)
        assert (teacher.num_calls, len(examples), report.num_asked, report.num_resumed) == (5, 3, 0, 5)
        assert report.left_out[0].num_attempts == 2
        project.run(teacher, max_attempts=3)
        assert teacher.num_calls == 6


def test_answers_in_the_journal_are_judged_by_the_settings_of_the_day(tmp_path, passages, split):
    def script(call):
        return f"Note {call.number}: {' '.join(call.passage.split()[:5])}"

    project = Project(tmp_path, passages, split, max_attempts=1)
    with FakeTeacher(script) as teacher:
        assert len(project.run(teacher)[0]) == 4
        with pytest.raises(TeacherError, match="no usable request for any of 4"):
            project.run(teacher, max_shared_words=4)
        assert len(project.run(teacher)[0]) == 4
        assert teacher.num_calls == 4


@pytest.mark.parametrize(("cut", "num_asked"), [(1, 0), (2, 1), (40, 1)])
def test_after_a_kill_nothing_that_was_answered_is_asked_again(tmp_path, passages, split, cut, num_asked):
    project = Project(tmp_path, passages, split)
    with FakeTeacher(rewrite) as teacher:
        before, _ = project.run(teacher)
        lines = project.journal.read_bytes().splitlines(keepends=True)
        # A kill in the middle of the last line: the three before it are whole; without its line break it is whole, too.
        project.journal.write_bytes(b"".join(lines[:-1]) + lines[-1][:-cut])
        after, report = project.run(teacher)
    assert after == before
    assert (report.num_asked, report.num_resumed, teacher.num_calls) == (num_asked, 4 - num_asked, 4 + num_asked)
    assert len(project.rows) == 4


def test_a_changed_passage_teacher_or_language_is_asked_again(tmp_path, passages, split):
    project = Project(tmp_path, passages, split, kinds=["translation"])
    with FakeTeacher(rewrite) as teacher:
        project.run(teacher)
        project.run(teacher, language="French")
        assert teacher.num_calls == 8
        project.run(teacher, language="English")
        assert teacher.num_calls == 8


def test_a_journal_line_of_another_shape_is_refused(tmp_path, passages, split):
    project = Project(tmp_path, passages, split)
    project.journal.write_text('{"key": "x"}\n')
    with FakeTeacher(rewrite) as teacher, pytest.raises(DataError, match="Not a line of the synthesis journal") as caught:
        project.run(teacher)
    assert caught.value.place == f"{project.journal}:1"


def test_the_spend_cap_stops_cleanly_and_goes_on_when_raised(tmp_path, passages, split):
    # A request may cost about 0.7 $ and costs 0.06 $: the cap lets the first ones through.
    project = Project(tmp_path, passages, split, max_usd=0.8)
    project.settings["teacher"] = RemoteModelConfig(base_url="http://127.0.0.1/v1", model="scribe", concurrency=1)
    with FakeTeacher(rewrite) as teacher:
        with pytest.raises(SpendCapReached) as caught:
            project.run(teacher)
        answered = teacher.num_calls
        assert 1 <= answered <= 3
        assert len(project.rows) == answered
        assert "budget.max_usd" in caught.value.remedy
        assert caught.value.exit_code == 6
        project.max_usd = 5.0
        examples, report = project.run(teacher)
        assert (len(examples), report.num_resumed, teacher.num_calls) == (4, answered, 4)


def test_a_refused_key_stops_at_once(tmp_path, passages, split):
    project = Project(tmp_path, passages, split)
    with FakeTeacher([Failure(401, "no")]) as teacher, pytest.raises(TeacherError, match="OPENAI_API_KEY") as caught:
        project.run(teacher)
    assert caught.value.permanent
    # two were under way together
    assert teacher.num_calls <= 2
    assert not project.journal.exists()


def test_a_teacher_that_is_down_is_not_asked_for_everything(tmp_path, passages, split):
    project = Project(tmp_path, passages, split, kinds=["neutral_rewrite", "question", "outline"])
    with FakeTeacher([Failure(500, "down")]) as teacher, pytest.raises(TeacherError, match="HTTP 500: down") as caught:
        project.run(teacher)
    # three failures, and one that was under way beside the third
    assert 3 <= teacher.num_calls <= 4
    assert "run the same command again" in caught.value.remedy


def test_one_passage_that_fails_is_listed_and_asked_by_the_next_run(tmp_path, passages, split):
    failing = [True]
    project = Project(tmp_path, passages, split)
    with FakeTeacher(lambda call: Failure(500, "hiccup") if failing[0] and call.passage == ENGLISH[2] else rewrite(call)) as teacher:
        examples, report = project.run(teacher)
        assert [example.document_id for example in examples] == ["d0", "d1", "d3"]
        assert [(left.passage_id, left.failed) for left in report.left_out] == [("d2#0", True)]
        assert "HTTP 500: hiccup" in report.left_out[0].reason
        failing[0] = False
        examples, report = project.run(teacher)
        assert (len(examples), report.num_asked, teacher.num_calls) == (4, 1, 5)


@pytest.mark.parametrize("answer", [Answer(""), Answer(None), Answer(choices=[])])
def test_an_empty_answer_is_listed_and_not_paid_again(tmp_path, passages, split, answer):
    project = Project(tmp_path, passages, split)
    with FakeTeacher(lambda call: answer if call.passage == ENGLISH[2] else rewrite(call)) as teacher:
        examples, report = project.run(teacher)
        assert len(examples) == 3
        assert (report.left_out[0].passage_id, report.left_out[0].failed) == ("d2#0", False)
        _, report = project.run(teacher)
        assert (report.num_asked, teacher.num_calls) == (0, 4)
        assert report.left_out[0].passage_id == "d2#0"


def test_an_answer_cut_off_is_asked_again_with_more_room(tmp_path, passages, split):
    def script(call):
        return Answer("It was", finish_reason="length") if call.body["max_tokens"] < 1000 else rewrite(call)

    project = Project(tmp_path, passages, split)
    with FakeTeacher(script) as teacher:
        examples, _ = project.run(teacher)
    assert len(examples) == 4
    assert teacher.num_calls == 8
    assert {row["rejected"] for row in project.rows} == {"", "the teacher's answer was cut off at the length limit"}


def test_refusals_everywhere_end_with_the_first_reason(tmp_path, passages, split):
    project = Project(tmp_path, passages, split, max_attempts=1)
    with FakeTeacher(["I'm sorry, but I can't do that."]) as teacher, pytest.raises(TeacherError, match="the teacher refused") as caught:
        project.run(teacher)
    assert caught.value.place == "d0#0"
    assert "another teacher" in caught.value.remedy


def test_the_teacher_is_asked_concurrently(tmp_path, passages, split):
    barrier = threading.Barrier(2, timeout=5)

    def script(call):
        barrier.wait()
        return rewrite(call)

    with FakeTeacher(script) as teacher:
        Project(tmp_path, passages, split).run(teacher)
    assert teacher.most_at_once == 2


def test_an_interrupt_keeps_what_was_answered(tmp_path, passages, split):
    project = Project(tmp_path, passages, split)
    project.settings["teacher"] = RemoteModelConfig(base_url="http://127.0.0.1/v1", model="scribe", concurrency=1)

    def interrupt(done: int, total: int) -> None:
        raise Interrupted("Stopped by request")

    with FakeTeacher(rewrite) as teacher:
        config = SynthesisConfig(source="teacher", teacher=project.settings["teacher"])
        model = _at(teacher, config.teacher, SpendLedger(project.costs, 5.0))
        with pytest.raises(Interrupted):
            synthesise(passages, split, config, journal=project.journal, teacher=model, on_progress=interrupt)
        answered = teacher.num_calls
        assert answered < 4
        assert len(project.rows) == answered
        examples, _ = synthesise(passages, split, config, journal=project.journal, teacher=model)
        assert (len(examples), teacher.num_calls) == (4, 4)


def test_a_passage_that_stands_on_no_side_is_left_out_and_listed(tmp_path, passages):
    copies = [*passages, Passage("d9#0", "d9", 0, ENGLISH[0])]
    split = split_documents(copies[:4], DataConfig())
    _, report = synthesise(copies, split, SynthesisConfig(), journal=tmp_path / "journal.jsonl")
    assert [(left.passage_id, left.reason) for left in report.left_out] == [("d9#0", "is not in the split")]


# Stand-in and recordings -----------------------------------------------------------------------------------------------


def ask(teacher, kind: str, text: str) -> Reply:
    return teacher.ask(KINDS[kind].teacher_messages(text, "English"), Sampling())


@pytest.mark.parametrize("text", [*ENGLISH, CHINESE, VIETNAMESE])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_shared_words", [8, 5])
def test_the_stand_in_never_leaks_and_repeats_itself_exactly(text, kind, max_shared_words):
    teacher = StandIn(max_shared_words)
    request = ask(teacher, kind, text).text
    assert why_rejected(request, text, max_shared_words) == ""
    assert ask(teacher, kind, text).text == request


def test_the_stand_in_writes_stiff_english():
    text = "I didn't buy it (too dear), but I've used one. I think it's good! You can keep yours, and I'd like to try."
    rewritten = neutral_rewrite(text)
    assert "(" not in rewritten
    assert "'" not in rewritten
    assert "!" not in rewritten
    assert "the writer has utilised one" in rewritten
    assert "it is considered that it is satisfactory" in rewritten.lower()
    assert "it is possible to retain yours" in rewritten.lower()
    assert neutral_rewrite("") == ""


def test_the_stand_in_knows_what_it_cannot_rewrite():
    assert is_english(ENGLISH[0])
    assert not is_english(CHINESE)
    assert not is_english(VIETNAMESE)
    assert ask(StandIn(), "neutral_rewrite", CHINESE).text.startswith("- 昨天下午")
    assert ask(StandIn(), "question", VIETNAMESE).text.startswith("Bạn sẽ viết gì về ")


def test_the_stand_in_breaks_a_text_of_names_that_no_table_knows():
    names = " ".join(f"Ortelius{chr(97 + number)}" for number in range(25))
    text = f"I saw {names} and it was all that I had in mind, to be one of them."
    assert not leaks(ask(StandIn(8), "outline", text).text, text, 8)
    assert not leaks(ask(StandIn(8), "neutral_rewrite", text).text, text, 8)


def test_the_stand_in_is_the_default_needs_no_journal_and_is_labelled(tmp_path, passages, split):
    examples, report = synthesise(passages, split, SynthesisConfig(), journal=tmp_path / "journal.jsonl")
    assert len(examples) == 4
    assert {example.source for example in examples} == {"stand-in"}
    assert report.teacher == "stand-in"
    assert [example.answer for example in examples] == ENGLISH
    assert not (tmp_path / "journal.jsonl").exists()


def test_recorded_answers_are_found_by_number_by_text_and_joined(tmp_path, passages, split):
    path = tmp_path / "recorded.jsonl"
    rows = [
        {"document_id": "d0", "passage": 1, "neutral_rewrite": "By number."},
        {"text": ENGLISH[1], "neutral_rewrite": "By text."},
        {"text": ENGLISH[2], "document_id": "d3", "passage": 1, "neutral_rewrite": "Of another text."},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = SynthesisConfig(source="recorded", recorded="recorded.jsonl", drop_instruction=True)
    examples, report = synthesise(passages, split, config, journal=tmp_path / "journal.jsonl", root=tmp_path)
    assert {example.document_id: example.messages[0].content for example in examples} == {
        "d0": "By number.", "d1": "By text.", "d2": "Of another text.",
    }  # fmt: skip
    assert {example.source for example in examples} == {"recorded"}
    assert [left.passage_id for left in report.left_out] == ["d3#0"]
    assert "There is no recorded `neutral_rewrite` for 'd3#0'" in report.left_out[0].reason
    joined = f"{ENGLISH[1]}\n\n{ENGLISH[2]}"
    assert ask(Recorded(path), "neutral_rewrite", joined).text == "By text.\n\nOf another text."


def test_recordings_that_are_missing_or_belong_to_nothing(tmp_path):
    with pytest.raises(DataError, match="no file of recorded answers") as caught:
        Recorded(tmp_path / "gone.jsonl")
    assert "synthesis.recorded" in caught.value.remedy
    path = tmp_path / "recorded.jsonl"
    path.write_text('{"text": "a", "outline": "b"}\n{"outline": "c"}\n')
    with pytest.raises(DataError, match="neither for which `text`") as caught:
        Recorded(path)
    assert caught.value.place == f"{path}:2"
