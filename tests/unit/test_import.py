"""Importing: what is kept word for word, what is not the author's prose, and every kind of bad file."""

from __future__ import annotations

import codecs
import os
import unicodedata
from pathlib import Path

import pytest

from giong.config import DataConfig
from giong.data.importers import import_documents
from giong.errors import DataError

CONFIG = DataConfig()


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def import_one(path: Path, **settings):
    documents, _ = import_documents([path], DataConfig(**settings))
    assert len(documents) == 1
    return documents[0]


def entry_of(report, path: Path, line: int = 0):
    place = f"{path}:{line}" if line else str(path)
    return next(entry for entry in report.entries if entry.place == place)


MARKDOWN = """---
title: "Beans, late"
date: 2023-04-05
tags: [garden]
---
# Not this heading

I planted the beans *late*, on a Monday – “too late”, said [my neighbour](https://example.org/n).
She’s right; she often is...

> A gardener's quote that is not mine.
>
> - and its list

```python
print("beans")
```

    indented = code

- one packet of `Phaseolus` seeds
- two sticks
  and a string

  > quoted inside a list

1. dig
2. wait

![a bean](bean.png)

| crop | weight |
|------|--------|
| bean | 2 kg   |

<div class="note">raw html</div>

## A heading

They came up anyway.[^1]\\
All seven.
"""


def test_markdown_keeps_the_authors_words_and_nothing_else(tmp_path):
    document = import_one(write(tmp_path, "notes/beans.md", MARKDOWN))
    assert document.text == (
        "I planted the beans late, on a Monday – “too late”, said my neighbour. She’s right; she often is...\n\n"
        "one packet of Phaseolus seeds\ntwo sticks and a string\n\n"
        "dig\nwait\n\n"
        "They came up anyway.\nAll seven."
    )
    assert (document.title, document.date) == ("Beans, late", "2023-04-05")
    assert document.id == "beans.md"


def test_titles_and_dates_come_from_where_they_stand(tmp_path):
    write(tmp_path, "a.md", "# Heading *here*\n\nText of a.")
    write(tmp_path, "2021-02-03-b.md", "Text of b.")
    write(tmp_path, "c 2024-13-45.txt", "---\ndate: spring\n---\nText of c.")
    write(tmp_path, "d.txt", "---\ntitle: D\ndate: 2022/7/9\n---\nText of d.")
    documents, report = import_documents([tmp_path], CONFIG)
    found = [(d.title, d.date) for d in documents]
    assert found == [("2021-02-03-b", "2021-02-03"), ("Heading here", ""), ("c 2024-13-45", ""), ("D", "2022-07-09")]
    assert "date 'spring' not understood, write YYYY-MM-DD" in entry_of(report, tmp_path / "c 2024-13-45.txt").reason


def test_front_matter_that_is_no_yaml_is_noted_and_is_still_no_prose(tmp_path):
    path = write(tmp_path, "a.md", "---\ntitle: [open\n---\nThe text itself.")
    documents, report = import_documents([path], CONFIG)
    assert documents[0].text == "The text itself."
    assert "front matter is not valid YAML (line 3)" in entry_of(report, path).reason


def test_front_matter_in_toml(tmp_path):
    path = write(tmp_path, "a.md", '+++\ntitle = "Beans"\ndate = 2023-04-05T10:00:00+07:00\ntags = ["x"]\n+++\nThe text itself.')
    document = import_one(path)
    assert (document.title, document.date, document.text) == ("Beans", "2023-04-05", "The text itself.")
    broken = write(tmp_path, "b.md", '+++\ntitle = "Beans"\ndate = soon\n+++\nOther text.')
    documents, report = import_documents([broken], CONFIG)
    assert documents[0].text == "Other text."
    assert "front matter is not valid TOML (line 3)" in entry_of(report, broken).reason


def test_a_rule_around_prose_is_not_front_matter(tmp_path):
    assert import_one(write(tmp_path, "b.txt", "---\nOnly a thought.\n---\nAnd more.")).text == "---\nOnly a thought.\n---\nAnd more."


def test_plain_text_drops_quoted_lines_and_joins_wrapped_ones(tmp_path):
    text = (
        "I began this letter in the train to Hue, and the train was late,\n"
        "as trains are when you have somebody waiting at the other end of\n"
        "the line.\n\n> You wrote this,\n>and this.\n\nRoses are red,\nviolets are blue.\n"
    )
    assert import_one(write(tmp_path, "letter.txt", text.replace("\n", "\r\n"))).text == (
        "I began this letter in the train to Hue, and the train was late, as trains are when you have somebody waiting at the other end of "
        "the line.\n\nRoses are red,\nviolets are blue."
    )


def test_vietnamese_is_composed_and_otherwise_left_alone(tmp_path):
    text = "Sáng nay tôi dậy sớm… “Trời ơi,” mẹ nói, “mưa rồi!” Đường lầy, tôi vẫn đi."
    document = import_one(write(tmp_path, "mưa.txt", unicodedata.normalize("NFD", text)))
    assert document.text == text
    assert import_one(write(tmp_path, "mưa2.md", text)).text == text


def test_chinese_keeps_its_full_width_punctuation_and_joins_lines_without_a_space(tmp_path):
    text = "昨天下午，我去河边（一个人），\n看见一位老人在钓鱼。\n\n　　他说：“鱼不在，水还在！”"
    document = import_one(write(tmp_path, "河边.md", text))
    assert document.text == "昨天下午，我去河边（一个人），看见一位老人在钓鱼。\n\n他说：“鱼不在，水还在！”"
    wrapped = "昨天下午我一个人去河边散步看见一位白头发的老人坐在那里钓鱼已经三个小时，\n一条也没有钓到。"
    assert import_one(write(tmp_path, "wrapped.txt", wrapped)).text == wrapped.replace("\n", "")


HTML = """<!doctype html><html><head><title>Beans</title>
<meta property="article:published_time" content="2023-04-05T10:00:00Z"></head><body><nav><a href="/">Home</a></nav>
<article><h1>Beans</h1><p>I planted the beans on a Monday, <em>late</em>, and the rain came at 4 o’clock.</p>
<blockquote><p>Somebody else said this about beans, at some length, long ago.</p></blockquote>
<pre><code>print("beans")</code></pre><div class="highlight"><p>more_code()</p></div>
<p>They came up with <code>care</code> and a <a href="http://example.org">little string</a>, all seven of them.</p></article>
<footer>Copyright 2020</footer></body></html>"""


def test_html_gives_the_main_text_with_title_and_date(tmp_path):
    document = import_one(write(tmp_path, "beans.html", HTML))
    assert document.text == (
        "I planted the beans on a Monday, late, and the rain came at 4 o’clock.\n\n"
        "They came up with care and a little string, all seven of them."
    )
    assert (document.title, document.date) == ("Beans", "2023-04-05")


def test_html_in_the_encoding_that_it_declares(tmp_path):
    page = '<html><head><meta charset="gb2312"><title>豆子</title></head><body><p>星期一我种了豆子，雨四点钟就来了。</p></body></html>'
    path = write(tmp_path, "a.html", page.encode("gb2312"))
    documents, report = import_documents([path], CONFIG)
    assert documents[0].text == "星期一我种了豆子，雨四点钟就来了。"
    assert "gb2312" in entry_of(report, path).reason


def test_html_without_prose_is_listed(tmp_path):
    write(tmp_path, "a.txt", "Something.")
    path = write(tmp_path, "empty.html", "<html><body></body></html>")
    _, report = import_documents([tmp_path], CONFIG)
    assert (entry_of(report, path).status, entry_of(report, path).reason) == ("dropped", "no main text was found on the page")


def test_jsonl_rows_with_named_fields_and_bad_lines_listed_by_number(tmp_path):
    first = '{"no": 1, "body": "First text.", "head": "One", "day": "2020-01-02"}\n'
    rows = first + '{broken\n\n[1]\n{"body": ""}\n{"body": 5}\n{"other": "x"}\n'
    path = write(tmp_path, "rows.jsonl", rows + '{"no": 2, "body": "Second text."}\n')
    config = DataConfig(text_field="body", title_field="head", date_field="day", id_field="no")
    documents, report = import_documents([path], config)
    found = [(d.id, d.text, d.title, d.date) for d in documents]
    assert found == [("1", "First text.", "One", "2020-01-02"), ("2", "Second text.", "", "")]
    reasons = {int(entry.place.rsplit(":", 1)[1]): entry.reason for entry in report.with_status("dropped")}
    assert set(reasons) == {2, 4, 5, 6, 7}
    assert reasons[2].startswith("not valid JSON")
    assert reasons[4] == "not a JSON object with named fields"
    assert reasons[5] == "field 'body' is empty"
    assert reasons[6] == "field 'body' holds no text but int"
    assert reasons[7] == "no field 'body'; it has: other"
    assert documents[0].source == f"{path}:1"


def test_rows_without_ids_are_known_by_file_and_line(tmp_path):
    path = write(tmp_path, "rows.jsonl", '{"text": "First."}\n{"text": "Second."}\n')
    assert [d.id for d in import_documents([path], CONFIG)[0]] == ["rows.jsonl:1", "rows.jsonl:2"]


def test_an_id_used_twice_is_listed_with_its_first_place(tmp_path):
    path = write(tmp_path, "rows.jsonl", '{"id": "a", "text": "First."}\n{"id": "a", "text": "Other."}\n')
    documents, report = import_documents([path], CONFIG)
    assert [d.text for d in documents] == ["First."]
    assert entry_of(report, path, 2).reason == f"the id 'a' was already used at {path}:1"


def test_markdown_in_rows_is_read_as_markdown_for_the_whole_file(tmp_path):
    rows = '{"text": "## Head\\n\\nUse `ls` here.\\n\\n> quote"}\n{"text": "Only `cd` and prose."}\n'
    documents, report = import_documents([write(tmp_path, "rows.jsonl", rows)], CONFIG)
    assert [d.text for d in documents] == ["Use ls here.", "Only cd and prose."]
    assert all(entry.reason == "read as Markdown" for entry in report.entries)
    plain = import_documents([write(tmp_path, "plain.jsonl", '{"text": "Two * three = 6, `so` there."}\n')], CONFIG)[0]
    assert plain[0].text == "Two * three = 6, `so` there."


def test_csv_with_quoted_line_breaks_and_a_short_row(tmp_path):
    path = write(tmp_path, "rows.csv", 'id;text;date\nx;"Line one.\n\nLine; two.";2020-05-06\ny;too short\nz;Third.;\n')
    documents, report = import_documents([path], CONFIG)
    assert [(d.id, d.text, d.date) for d in documents] == [("x", "Line one.\n\nLine; two.", "2020-05-06"), ("z", "Third.", "")]
    assert entry_of(report, path, 2).status == "kept"
    assert "number of fields" in entry_of(report, path, 5).reason


def test_csv_with_an_open_quote_keeps_what_came_before(tmp_path):
    path = write(tmp_path, "rows.csv", 'text\nFine.\n"never closed\n')
    documents, report = import_documents([path], CONFIG)
    assert [d.text for d in documents] == ["Fine."]
    assert "not valid CSV" in entry_of(report, path, 3).reason


@pytest.mark.parametrize(
    ("name", "content", "fields"),
    [("rows.jsonl", '{"body": "x", "headline": "y"}\n', "body, headline"), ("rows.csv", "body,headline\nx,y\n", "body, headline")],
)
def test_a_missing_text_field_names_the_fields_that_are_there(tmp_path, name, content, fields):
    path = write(tmp_path, name, content)
    with pytest.raises(DataError, match=f"No field 'text' in {name}; it has: {fields}") as caught:
        import_documents([path], CONFIG)
    assert caught.value.place == f"{path}:1"
    assert "data.text_field" in caught.value.remedy


BAD_FILES = {
    "empty.txt": (b"", "the file is empty (0 bytes)"),
    "picture.txt": (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", "binary, not text (a NUL byte at byte 8)"),
    "noise.md": (bytes(range(1, 32)) * 3 + b"\xff\xfe\xfd" * 40, "binary, not text (undecodable from byte 93)"),
    "broken.txt": ("Đường lầy".encode() + b" \xff ", "not valid UTF-8 at byte 16 (0xff); save it as UTF-8"),
    "legacy.txt": ("昨天下午我去河边散步，看见一位老人在钓鱼。".encode("gb2312"), "not valid UTF-8 at byte 0 (0xd7); save it as UTF-8"),
    "utf16.txt": (codecs.BOM_UTF16_LE + b"a\x00\x00\xd8a\x00", "not valid UTF-16 at byte 4; save it as UTF-8"),
    "code.md": (
        b"---\ntitle: x\n---\n# Head\n\n```\nls\n```\n\n> q\n",
        "no prose is left without front matter, headings, code and quotations",
    ),
}


def test_every_bad_file_is_listed_with_its_reason_and_stops_nothing(tmp_path):
    for name, (content, _) in BAD_FILES.items():
        write(tmp_path, name, content)
    write(tmp_path, "good.txt", "The only good one.")
    write(tmp_path, "photo.jpg", b"\xff\xd8")
    write(tmp_path, ".hidden.txt", "Not looked at.")
    write(tmp_path, ".git/config.txt", "Not looked at.")
    documents, report = import_documents([tmp_path], CONFIG)
    assert [d.id for d in documents] == ["good.txt"]
    for name, (_, reason) in BAD_FILES.items():
        assert (entry_of(report, tmp_path / name).status, entry_of(report, tmp_path / name).reason) == ("dropped", reason)
    assert entry_of(report, tmp_path / "photo.jpg").reason == "unknown kind '.jpg'"
    counts = report.to_dict()
    assert (counts["num_kept"], counts["num_dropped"], counts["num_skipped"], counts["num_words"]) == (1, len(BAD_FILES), 1, 4)
    assert not any("hidden" in entry.place or ".git" in entry.place for entry in report.entries)


@pytest.mark.parametrize(
    ("content", "text", "note"),
    [
        (codecs.BOM_UTF8 + b"Caf\xc3\xa9.", "Café.", ""),
        ("Một ngày.".encode("utf-16"), "Một ngày.", "read as UTF-16"),
        ("The caf\xe9 closes at six, and I\x92m late.".encode("latin-1"), "The café closes at six, and I’m late.", "read as Windows-1252"),
    ],
)
def test_encodings_that_are_certain_are_read(tmp_path, content, text, note):
    path = write(tmp_path, "a.txt", content)
    documents, report = import_documents([path], CONFIG)
    assert (documents[0].text, entry_of(report, path).reason) == (text, note)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="needs a user whom permissions bind")
def test_a_file_without_permission_is_listed(tmp_path):
    write(tmp_path, "good.txt", "Good.")
    path = write(tmp_path, "locked.txt", "Locked.")
    path.chmod(0)
    assert entry_of(import_documents([tmp_path], CONFIG)[1], path).reason == "cannot be read: Permission denied"


def test_an_empty_folder_says_what_to_do(tmp_path):
    with pytest.raises(DataError, match="Nothing was found to import: the folder is empty") as caught:
        import_documents([tmp_path], CONFIG)
    assert caught.value.place == str(tmp_path)
    assert ".md" in caught.value.remedy
    assert "data.paths" in caught.value.remedy
    assert caught.value.exit_code == 3


def test_a_folder_with_nothing_usable_names_the_first_reason(tmp_path):
    path = write(tmp_path, "empty.txt", b"")
    write(tmp_path, "photo.jpg", b"\xff\xd8")
    with pytest.raises(DataError) as caught:
        import_documents([tmp_path], CONFIG)
    assert f"{path}: the file is empty (0 bytes) (and 1 more)" in caught.value.message


def test_a_path_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="no file or folder 'gone'") as caught:
        import_documents([tmp_path / "gone"], CONFIG)
    assert "data.paths" in caught.value.remedy
    with pytest.raises(DataError, match="names no file or folder"):
        import_documents([], CONFIG)


def test_a_project_inside_the_folder_is_not_imported_as_writing(tmp_path):
    write(tmp_path, "mine.txt", "Mine.")
    write(tmp_path, "voice/giong.yaml", "name: voice\n")
    write(tmp_path, "voice/data/documents.jsonl", '{"id": "x", "text": "Mine."}\n')
    write(tmp_path, "voice/report.html", HTML)
    write(tmp_path, "voice/texts/more.txt", "More of mine.")
    documents, report = import_documents([tmp_path], CONFIG)
    assert [d.id for d in documents] == ["mine.txt", "voice/texts/more.txt"]
    assert entry_of(report, tmp_path / "voice").status == "skipped"


def test_two_folders_with_the_same_names_keep_both(tmp_path):
    write(tmp_path, "a/x.txt", "From a.")
    write(tmp_path, "b/x.txt", "From b.")
    documents, _ = import_documents([tmp_path / "a", tmp_path / "b"], CONFIG)
    assert [d.text for d in documents] == ["From a.", "From b."]
    assert len({d.id for d in documents}) == 2


def test_files_are_read_in_sorted_order_through_sub_folders(tmp_path):
    for name in ("b.txt", "a/z.txt", "a/b/c.txt", "c.txt"):
        write(tmp_path, name, f"Text {name}.")
    assert [d.id for d in import_documents([tmp_path], CONFIG)[0]] == ["b.txt", "c.txt", "a/z.txt", "a/b/c.txt"]
