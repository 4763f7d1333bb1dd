"""Steps `import` and `synth`: from the author's files to requests and answers. Nothing here needs torch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from giong.contracts import Document, Example, Passage, Side
from giong.data.cleaning import cut_with_report, deduplicate
from giong.data.conversations import Conversation, read_conversations
from giong.data.importers import ImportReport, import_documents, source_files
from giong.data.split import Split, freeze, load_split, split_documents, update_split
from giong.data.synthesis.run import NUM_TOLD, synthesise
from giong.errors import ConfigError, DataError
from giong.workflow.story import Stage, Story
from giong.workspace import content_hash, write_json, write_jsonl

CONSENT = "no consent to imitate this author is recorded; if it was given, say so in giong.yaml: data.consent"


def source_paths(story: Story) -> list[Path]:
    """The configured files and folders, relative to the project. Raises ConfigError where none is named."""
    if not story.config.data.paths and not story.config.data.conversations:
        raise ConfigError(
            "No writing is named", place=f"{story.project.config_path}: data.paths", remedy="List the folders with the author's writing."
        )
    return _resolved(story, story.config.data.paths)


def _resolved(story: Story, paths: Sequence[str]) -> list[Path]:
    return [(story.project.root / Path(path).expanduser()).resolve() for path in paths]


def import_writing(story: Story) -> None:
    """Read, clean, cut and split the author's writing; the test side is frozen the first time and kept ever after."""
    config, project = story.config.data, story.project
    paths = source_paths(story)
    chats = _resolved(story, config.conversations)
    files = [*(file for _, file in source_files(paths)), *chats]
    if not config.consent.granted:
        story.notice("import", CONSENT)
    # A file that may not be read is listed by the import, with the others.
    readable = [file if os.access(file, os.R_OK) else "(unreadable)" for file in files]
    key = content_hash(config, [str(file) for file in files], *readable)
    if story.is_current("import", key):
        return
    with Stage(story, "import", f"{len(files)} files") as stage:
        documents, report = import_documents(paths, config, story.progress("import", "files")) if paths else ([], ImportReport())
        conversations = _conversations(chats, report)
        # Written before the split too: where too little is left to split, it says what became of the rest.
        write_json(project.data / "import_report.json", {"files": report.to_dict()})
        documents, duplicates = deduplicate(documents)
        passages, dropped = cut_with_report(documents, config.min_words, config.max_words, merge_paragraphs=config.merge_paragraphs)
        answered = [conversation for conversation in conversations if conversation.answer]
        documents += [Document(each.id, each.answer, source=each.place) for each in answered]
        passages += [Passage(each.id, each.id, 0, each.answer) for each in answered]
        unique, repeated = deduplicate(passages)
        split = freeze_split(story, unique)
        unique = [passage for passage in unique if split.side_of(passage)]
        result = _summary(unique, split.passage_hashes) | {"dropped": len(dropped) + len(report.with_status("dropped"))}
        write_jsonl(project.documents_path, documents)
        write_jsonl(project.passages_path, unique)
        if conversations or project.conversations_path.is_file():
            write_jsonl(project.conversations_path, conversations)
        write_json(
            project.data / "import_report.json",
            {
                "files": report.to_dict(), "duplicate_documents": duplicates.to_dict(), "duplicate_passages": repeated.to_dict(),
                "dropped_passages": dropped, "repeated_across_sides": split.removed, "summary": result,
            },
        )  # fmt: skip
    for entry in [entry for entry in report.with_status("dropped") if entry.place.rpartition(":")[0] in map(str, chats)][:NUM_TOLD]:
        story.notice("import", f"{entry.place} is left out: {entry.reason}")
    made = [project.documents_path, project.passages_path, project.split_path]
    project.finish_step("import", key, made, {**result, "seconds": stage.seconds})
    sides = ", ".join(f"{count} {side}" for side, count in result["sides"].items())
    story.notice("import", f"{result['num_documents']} documents, {result['num_words']} words, {result['num_passages']} passages ({sides})")
    if result["dropped"]:
        story.notice("import", f"{result['dropped']} pieces were left out; the reasons are in data/import_report.json")


def _conversations(paths: Sequence[Path], report: ImportReport) -> list[Conversation]:
    """Those of all chat files; their lines are entered into the report."""
    found: list[Conversation] = []
    names = [path.name for path in paths]
    for path in paths:
        # Files of one name in two folders must not share their ids.
        conversations, entries = read_conversations(path, str(path) if names.count(path.name) > 1 else "")
        found += conversations
        report.entries += entries
    return found


def freeze_split(story: Story, passages: list[Passage]) -> Split:
    """Draw the split and freeze it; one that is frozen takes newer passages to its training side."""
    path = story.project.split_path
    split = update_split(load_split(path), passages, story.config.data) if path.is_file() else split_documents(passages, story.config.data)
    freeze(split, path)
    return split


def _summary(passages: list[Passage], hashes: dict[str, dict[str, str]]) -> dict:
    from giong.data.words import count_words

    return {
        "num_documents": len({passage.document_id for passage in passages}),
        "num_passages": len(passages),
        "num_words": sum(count_words(passage.text) for passage in passages),
        "sides": {side: len(members) for side, members in hashes.items()},
    }


def synthesise_requests(story: Story) -> None:
    """Give every passage its requests; answered requests are kept in a journal and never asked (or paid) twice."""
    config, project = story.config.synthesis, story.project
    conversations = {conversation.id: conversation for conversation in story.conversations}
    everything, split = story.passages, story.split
    passages = [passage for passage in everything if passage.document_id not in conversations]
    recorded = project.root / config.recorded if config.recorded else None
    if recorded is not None and not recorded.is_file():
        raise DataError(
            "There are no recorded requests at this path", place=str(recorded), remedy="Correct synthesis.recorded in giong.yaml."
        )
    asked = (
        config.model_dump(exclude={"teacher": {"timeout_seconds", "max_retries", "concurrency"}}) if config.teacher else config.model_dump()
    )
    key = content_hash(passages, split.passage_hashes, asked, recorded or "", *([story.conversations] if conversations else []))
    if story.is_current("synth", key):
        return
    source = {"teacher": "a teacher model", "recorded": "recorded requests", "stand_in": "the rule-based stand-in (not a model)"}[
        config.source
    ]
    with Stage(story, "synth", f"{len(passages)} passages, {', '.join(config.kinds)}, from {source}") as stage:
        if config.source == "teacher" and config.teacher:
            _announce_cost(story, passages)
        ledger = story.ledger if config.source == "teacher" else None
        examples, report = synthesise(
            passages, split, config, journal=project.data / "synthesis.jsonl", ledger=ledger, root=project.root,
            emit=story.emit, on_progress=story.progress("synth", "requests"),
        )  # fmt: skip
        own = [passage for passage in everything if passage.document_id in conversations]
        examples += conversation_examples(conversations.values(), {passage.document_id: split.side_of(passage) for passage in own})
        write_jsonl(project.examples_path, examples)
        write_json(project.data / "synthesis_report.json", report.to_dict())
    failed = sum(left.failed for left in report.left_out)
    if failed:
        story.notice("synth", f"{failed} requests got no answer; run `giong synth` again to ask for those alone")
    # Not the key of a finished step, so that the next run asks for what failed.
    key = f"{key} without {failed}" if failed else key
    project.finish_step("synth", key, [project.examples_path], {**report.to_dict(), "seconds": stage.seconds})
    story.__dict__.pop("examples", None)


def conversation_examples(conversations: Iterable[Conversation], sides: Mapping[str, Side | None]) -> list[Example]:
    """Rows of the conversations: to be answered on their side where they have an answer, else (with tools) to be trained on."""
    made = []
    for each in conversations:
        given = {"document_id": each.id, "kind": "conversation", "source": each.id}
        if not each.answer:
            made.append(Example(each.id, messages=each.messages, answer="", tools=each.tools, **given))
        elif side := sides.get(each.id):
            made.append(Example(each.id, messages=each.messages[:-1], answer=each.answer, side=side, json_schema=each.json_schema, **given))
    return made


def _announce_cost(story: Story, passages: list[Passage]) -> None:
    from giong.clients.openai_compatible import estimate_tokens
    from giong.sizing.units import format_usd

    teacher = story.config.synthesis.teacher
    assert teacher is not None
    tokens = sum(estimate_tokens(passage.text) for passage in passages) * len(story.config.synthesis.kinds)
    instructions = 150 * len(passages) * len(story.config.synthesis.kinds)
    usd = ((tokens + instructions) * teacher.input_usd_per_million_tokens + tokens * teacher.output_usd_per_million_tokens) / 1e6
    story.notice(
        "synth",
        f"about {format_usd(usd)} at {teacher.model}; spent so far {format_usd(story.ledger.spent_usd)} of {format_usd(story.ledger.max_usd)}",
    )
