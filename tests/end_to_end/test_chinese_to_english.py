"""A Chinese author and a teacher that translates into English: from a folder to requests, over HTTP, with kills in between.

The tuned model is to write Chinese as this author does; so the request is the English and the answer the author's own text,
which must come through byte for byte.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fake_teacher import Answer, Failure, FakeTeacher

from giong.clients import RemoteModel, SpendLedger
from giong.config import DataConfig, RemoteModelConfig, SynthesisConfig
from giong.data.cleaning import count_words, cut_passages, deduplicate
from giong.data.importers import import_documents
from giong.data.split import freeze, load_split, split_documents
from giong.data.synthesis import synthesise

DOCUMENTS = {
    "2021-03-02 修伞.md": """---
title: 修伞
---
# 修伞

巷口的老周修了四十年伞。他说，现在的伞不是用来修的，是用来丢的。我把那把断了一根骨的黑伞递给他，他看了看，没有说话，只伸出三根手指：三块钱。

> 伞者，散也。——这话不是我说的。

他用一截旧铁丝接上断处，又拿小锤敲了七下。我数过，正好七下。“下雨的时候，”他说，“它会记得你。”我笑了，可是第二天真的下了雨。
""",
    "2021-06-11 西瓜.txt": """夏天的第一个西瓜总是买错的。我敲了又敲，听了又听，像个大夫，回家切开一看，还是白的。

> 邻居说：你该找我。

母亲倒不生气，撒上一点盐，说西瓜也有害羞的。我们坐在门槛上吃完了那半个，另一半留给晚上，晚上它就甜了一点，大概是等久了的缘故。
""",
    "2022-01-20 钥匙.md": """我把钥匙锁在屋里，这已经是今年的第二次了；可今年才过了二十天。站在楼道里，我忽然觉得这扇门比我更像主人。

开锁的师傅来得很快，开得也很快，前后不到一分钟。我付了八十块，心里想：原来我和家之间，只隔着一分钟和八十块钱。

```bash
echo 钥匙
```
""",
    "2022-09-05 蚂蚁.md": """厨房里来了一队蚂蚁，沿着缝走，比我写字还直。我想拿水冲，转念一想，它们搬的不过是我昨天掉的饼屑，等于替我扫地。

于是我在窗台上放了一小块糖，算是工钱。第三天糖没有了，蚂蚁也没有了。做工的人就是这样，结了账便走，一句客气话也不留。
""",
    "2023-02-14 信箱.html": """<html><head><title>信箱</title></head><body><article><h1>信箱</h1>
<p>楼下的信箱，我每天都看一眼，其实早就没有人写信了。里面有的，是卖房子的、修空调的，还有一张三年前的电费单，我一直没舍得拿走。</p>
<blockquote><p>见字如面。</p></blockquote>
<p>今天里面却真有一封信，写的是别人的名字。我把它插在门口最显眼的地方，像插一枝花；一个星期过去，它还在那里，一个字也没有凋谢。</p>
</article></body></html>""",
    "2023-11-30 火车.txt": """慢车经过小站，停两分钟，没有人上，也没有人下。站长还是出来了，整整帽子，对着空空的月台吹了一声哨子。

我隔着玻璃看他，忽然很敬重他：两分钟也是时间，没有人也是一站。车开了，他变得很小，哨子还含在嘴里，像含着一颗没有化完的糖。
""",
}  # fmt: skip
KEPT_OUT = ("伞者，散也", "你该找我", "echo", "见字如面", "# 修伞")


def english(number: int) -> str:
    return f"Translation number {number}: a short scene is told, an object is named, and a remark closes it."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "文章"
    folder.mkdir()
    for name, text in DOCUMENTS.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


class Story:
    """Import, cut and split as the workflow does; `synthesise` asks the teacher at the address given."""

    def __init__(self, folder: Path, work: Path) -> None:
        config = DataConfig(min_words=20, max_words=60, split="date")
        documents, self.report = import_documents([folder], config)
        self.documents = {document.id: document for document in documents}
        self.passages, _ = deduplicate(cut_passages(documents, config.min_words, config.max_words))
        freeze(split_documents(self.passages, config), work / "split.json")
        self.split = load_split(work / "split.json", self.passages)
        self.journal, self.costs = work / "journal.jsonl", work / "costs.jsonl"

    def synthesise(self, teacher: FakeTeacher, **settings):
        remote = RemoteModelConfig(
            base_url=teacher.base_url, model="translator", timeout_seconds=0.5, max_retries=2, concurrency=3,
            input_usd_per_million_tokens=1.0, output_usd_per_million_tokens=4.0,
        )  # fmt: skip
        config = SynthesisConfig(source="teacher", teacher=remote, kinds=["translation"], language="English", **settings)
        self.waits: list[float] = []
        model = RemoteModel(remote, SpendLedger(self.costs, 5.0), sleep=self.waits.append)
        return synthesise(self.passages, self.split, config, journal=self.journal, teacher=model)

    def check(self, examples) -> None:
        """Every answer is a piece of the author's file, byte for byte."""
        by_id = {passage.id: passage for passage in self.passages}
        for example in examples:
            passage = by_id[example.id.removesuffix(":translation")]
            source = DOCUMENTS[example.document_id].encode()
            paragraphs = example.answer.encode().split(b"\n\n")
            assert example.answer.encode() == passage.text.encode()
            assert all(paragraph in source for paragraph in paragraphs)
            assert example.side == self.split.side_of(passage)
            instruction, _, request = example.messages[-1].content.partition("\n\n")
            assert instruction == "Translate the following into the author's language, in their voice:"
            assert request.startswith("Translation number")


@pytest.fixture
def story(folder: Path, tmp_path: Path) -> Story:
    return Story(folder, tmp_path)


def test_the_folder_becomes_passages_of_the_authors_own_words(story):
    assert sorted(story.documents) == sorted(DOCUMENTS)
    text = "".join(document.text for document in story.documents.values())
    assert not any(piece in text for piece in KEPT_OUT)
    assert "“下雨的时候，”他说，“它会记得你。”我笑了" in text
    assert len(story.passages) >= 6
    assert all(20 <= count_words(passage.text) <= 60 for passage in story.passages)
    assert story.split.test == ["2023-11-30 火车.txt"]
    assert story.documents["2023-02-14 信箱.html"].date == "2023-02-14"


def test_every_answer_is_the_authors_text_byte_for_byte(story):
    with FakeTeacher(lambda call: english(call.number)) as teacher:
        examples, report = story.synthesise(teacher)
    story.check(examples)
    assert len(examples) == len(story.passages) == teacher.num_calls
    assert {call.passage for call in teacher.calls} == {passage.text for passage in story.passages}
    assert all("into English" in call.user for call in teacher.calls)
    # 100 tokens at 1 $/M and 50 at 4 $/M for each
    assert report.cost_usd == pytest.approx(0.0003 * len(examples))
    assert SpendLedger(story.costs, 5.0).spent_usd == pytest.approx(report.cost_usd)


def test_a_teacher_that_fails_in_every_way_still_ends_with_clean_requests(story):
    misbehave = [
        Failure(429, headers={"Retry-After": "3"}),
        Failure(500),
        Answer(""),
        Answer(body=b"{not json"),
        Failure(delay_seconds=2.0),
        "抱歉，我无法翻译这段文字。",
        "I'm sorry, but I can't translate that.",
    ]

    def script(call):
        # The answer itself and half of it, once each for the passage on the ants. Nothing else happens to that one: which calls are
        # whose depends on the threads, and all of it would be more than the attempts that a passage has.
        if "蚂蚁" in call.passage and "rejected" not in call.user:
            return call.passage
        if "蚂蚁" in call.passage and "answer itself" in call.user:
            return f"Ants: {call.passage[:30]}"
        if misbehave and "蚂蚁" not in call.passage:
            return misbehave.pop(0)
        return english(call.number)

    with FakeTeacher(script) as teacher:
        examples, report = story.synthesise(teacher, max_attempts=8)
    story.check(examples)
    assert len(examples) == len(story.passages)
    assert not report.left_out
    assert 3.0 in story.waits
    rejected = [json.loads(line)["rejected"] for line in story.journal.read_text(encoding="utf-8").splitlines()]
    assert sum("refused" in reason for reason in rejected) == 2
    assert sum("the answer itself" in reason for reason in rejected) >= 1
    assert sum("in a row with the answer" in reason for reason in rejected) >= 1


def test_a_teacher_that_only_echoes_one_text_leaves_just_that_one_out(story):
    with FakeTeacher(lambda call: call.passage if "钥匙" in call.passage else english(call.number)) as teacher:
        examples, report = story.synthesise(teacher, max_attempts=2)
    story.check(examples)
    keys = [passage.id for passage in story.passages if "钥匙" in passage.text]
    assert [left.passage_id for left in report.left_out] == keys
    assert {left.reason for left in report.left_out} == {"the request is the answer itself"}
    assert len(examples) == len(story.passages) - len(keys)
    assert teacher.num_calls == len(story.passages) + len(keys)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, "before a line's end"])
def test_after_a_kill_only_what_was_lost_is_asked_and_paid_again(story, share):
    with FakeTeacher(lambda call: english(call.number)) as teacher:
        story.synthesise(teacher)
        whole, asked = story.journal.read_bytes(), teacher.num_calls
        # The journal as a kill leaves it: cut anywhere, here often in the middle of a Chinese or JSON line.
        cut = whole.index(b"\n") if isinstance(share, str) else int(len(whole) * share)
        story.journal.write_bytes(whole[:cut])
        # A line without its line feed counts when it is whole: what it holds was answered and paid.
        lines = whole.splitlines()
        kept = sum(line == lines[index] for index, line in enumerate(whole[:cut].splitlines()))
        assert kept < asked
        examples, report = story.synthesise(teacher)
        story.check(examples)
        assert len(examples) == len(story.passages)
        assert (report.num_resumed, report.num_asked) == (kept, asked - kept)
        assert teacher.num_calls == asked + asked - kept
        again, report = story.synthesise(teacher)
    assert again == examples
    assert (report.num_asked, teacher.num_calls) == (0, asked + asked - kept)
    assert len(story.costs.read_text().splitlines()) == teacher.num_calls
