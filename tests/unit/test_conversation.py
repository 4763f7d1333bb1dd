"""Conversations: what of them carries loss, against transformers' own masks; chat files, and what is wrong with a line of one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from parity.tolerances import PLANTED_FACTOR, allowed

from giong.contracts import Example, Message
from giong.data.conversations import Conversation, conversations_from, parse_conversation, read_conversations
from giong.data.synthesis.run import NUM_TOLD
from giong.engine.step import backward
from giong.errors import DataError, ModelError
from giong.models.chat_template import ChatFormat
from giong.models.conversation import encode_conversation
from giong.models.rows import example_rows
from giong.objectives import sft
from giong.project import init
from giong.workflow import Story, perform
from giong.workspace import content_hash, read_json, read_jsonl, write_jsonl

TOOL_CHATML = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] }}{% for call in message['tool_calls'] or [] %}<tool_call>{{ call.function.name }} "
    "{{ call.function.arguments | tojson }}</tool_call>{% endfor %}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = (
    {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"place": {"type": "string"}}}}},
)
CALL = {"type": "function", "id": "a1", "function": {"name": "weather", "arguments": {"place": "the yard"}}}
CHAT = (
    Message("system", "Write as the author does."),
    Message("user", "Is the kettle on?"),
    Message("assistant", "It is on, friend."),
    Message("user", "And the ladder?"),
    Message("assistant", "Nobody knows who took it.", weight=0.0),
    Message("user", "Thank you."),
    Message("assistant", "I'd do it again, mind you."),
)
TOOL_CHAT = (
    Message("user", "Will it rain?"),
    Message("assistant", "", tool_calls=(CALL,)),
    Message("tool", "rain at noon", tool_call_id="a1", name="weather"),
    Message("assistant", "Take a coat."),
    Message("user", "And after?"),
    Message("assistant", "Let me look.", tool_calls=(CALL,)),
)
CASES = {"chat": (CHAT, ()), "tools": (TOOL_CHAT, TOOLS)}


@pytest.fixture(scope="module")
def loaded(tiny_model: Callable):
    """Qwen's twin with a template that marks what the assistant writes."""
    model = tiny_model("qwen2")
    model.chat = ChatFormat(model.tokenizer, model.model, TOOL_CHATML)
    return model


def transformers_mask(loaded, messages, tools, planted: str | None = None) -> tuple[list[int], np.ndarray]:  # type: ignore[no-untyped-def]
    """Token ids and the assistant's mask, times the weights of the messages."""
    made = loaded.tokenizer.apply_chat_template(
        [message.to_dict() for message in messages], chat_template=TOOL_CHATML, tools=list(tools) or None, tokenize=True,
        return_dict=True, return_assistant_tokens_mask=True,
    )  # fmt: skip
    ids, mask = list(made["input_ids"]), np.array(made["assistant_masks"], dtype=np.float32)
    starts = np.flatnonzero(np.diff(np.concatenate([[0.0], mask])) > 0)
    for start, message in zip(starts, [message for message in messages if message.role == "assistant"], strict=True):
        if not message.weight and planted != "weights forgotten":
            mask[start:][: int(np.argmin(np.append(mask[start:], 0)))] = 0.0
    return ids, np.roll(mask, 1) if planted == "one token too far" else mask


@pytest.mark.parametrize("case", CASES)
def test_the_mask_is_that_of_transformers(loaded, case: str):
    messages, tools = CASES[case]
    ids, weights = encode_conversation(loaded.chat, messages, tools=tools)
    expected_ids, mask = transformers_mask(loaded, messages, tools)
    # Behind the last end-of-turn token stands a line break, which nobody has to learn.
    assert ids.tolist() == expected_ids[: len(ids)]
    assert weights.tolist() == mask[: len(ids)].tolist()
    assert not mask[len(ids) :].any()


@pytest.mark.parametrize(
    ("case", "planted"), [("chat", "weights forgotten"), ("chat", "one token too far"), ("tools", "one token too far")]
)
def test_another_mask_is_seen(loaded, case: str, planted: str):
    messages, tools = CASES[case]
    ids, weights = encode_conversation(loaded.chat, messages, tools=tools)
    assert weights.tolist() != transformers_mask(loaded, messages, tools, planted)[1][: len(ids)].tolist()


def gradient_gap(loaded, planted: str | None = None) -> float:  # type: ignore[no-untyped-def]
    """Largest difference of gradients between our rows and transformers' loss with its labels masked."""
    model = loaded.model.requires_grad_(True)
    examples = [Example(name, name, "conversation", messages, "", tools=tools) for name, (messages, tools) in CASES.items()]
    rows, _ = example_rows(loaded, examples)
    backward(model, rows, sft.loss, 512)
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    total = sum(float(row.weights.sum()) for row in rows)
    for messages, tools in CASES.values():
        ids, mask = transformers_mask(loaded, messages, tools, planted)
        labels = torch.where(torch.from_numpy(mask) > 0, torch.tensor(ids), -100)
        (model(input_ids=torch.tensor([ids]), labels=labels[None]).loss * float(mask.sum()) / total).backward()
    gap = max(float((parameter.grad - found[name]).abs().max() / found[name].abs().max()) for name, parameter in model.named_parameters())
    model.zero_grad()
    model.requires_grad_(False)
    return gap


def test_masked_tokens_have_no_gradient(loaded):
    assert gradient_gap(loaded) < allowed("gradients")
    for planted in ("weights forgotten", "one token too far"):
        assert gradient_gap(loaded, planted) > PLANTED_FACTOR * allowed("gradients")


def test_what_carries_loss(loaded):
    ids, answers = encode_conversation(loaded.chat, CHAT)
    text = lambda weights: loaded.tokenizer.decode(ids[weights > 0])  # noqa: E731
    assert text(answers) == "It is on, friend.<|im_end|>I'd do it again, mind you.<|im_end|>"
    assert text(encode_conversation(loaded.chat, CHAT, loss_on="last_answer")[1]) == "I'd do it again, mind you.<|im_end|>"
    everything = encode_conversation(loaded.chat, CHAT, loss_on="all")[1]
    silent = loaded.tokenizer.decode(ids[everything == 0][1:])
    assert silent == "Nobody knows who took it.<|im_end|>"
    assert encode_conversation(loaded.chat, [*CHAT[:-1], Message("assistant", "No.", weight=0.0)], loss_on="last_answer")[1].sum() == 0


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_template(tiny_model: Callable, family: str):
    """The last turn is what `encode` makes of it; each other turn is learned after the prompt that asks for it, and ends as it does."""
    chat = tiny_model(family).chat
    messages = [Message("user", "Is it on?"), Message("assistant", "It is on."), Message("user", "Again?"), Message("assistant", "On! 🦊")]
    ids, weights = encode_conversation(chat, messages)
    single = chat.encode(messages[:-1], messages[-1].content)
    assert ids.tolist() == single.input_ids.tolist()
    assert encode_conversation(chat, messages, loss_on="last_answer")[1].tolist() == single.weights.tolist()
    learned = chat.tokenizer.decode(ids[weights > 0]).replace(" It", "It").replace(" On", "On")
    end = tiny_models._CHAT[family][2]
    assert learned == f"It is on.{end}On! 🦊{end}"
    if family != "qwen3":
        # Qwen 3 thinks (of nothing) before its last answer alone.
        prompt = chat.encode_prompt(messages[:1])
        assert ids[: len(prompt)].tolist() == prompt and weights[len(prompt)] == 1.0


def test_an_answer_keeps_what_a_template_would_trim_or_take_for_its_own(tiny_model: Callable):
    chat = tiny_model("llama").chat
    odd = "  two spaces, <|eot_id|> spelt out  "
    ids, weights = encode_conversation(
        chat, [Message("user", "a"), Message("assistant", odd), Message("user", "b"), Message("assistant", "c")]
    )
    assert chat.tokenizer.decode(ids[weights > 0]) == f"{odd}<|eot_id|>c<|eot_id|>"
    assert (ids[weights > 0] == chat.end_token_ids[0]).sum() == 2


def test_a_template_that_drops_tools_is_refused_with_the_line(tiny_model: Callable):
    example = Example("chat.jsonl:7", "d", "conversation", TOOL_CHAT, "", source="/data/chat.jsonl:7", tools=TOOLS)
    with pytest.raises(ModelError, match=r"leaves the tool 'weather' out \(/data/chat.jsonl:7\)"):
        example_rows(tiny_model("llama"), [example])


def test_a_plain_example_is_what_it_was(loaded):
    """Hashes and files know nothing of what few rows have."""
    example = Example("e", "d", "given", (Message("user", "Hi"),), "Ho.")
    assert "tools" not in json.dumps(json.loads(_line(example))) and json.loads(_line(example))["messages"] == [
        {"role": "user", "content": "Hi"}
    ]
    assert content_hash(Message("user", "Hi")) == content_hash({"role": "user", "content": "Hi"})


def _line(value: object) -> str:
    from giong.workspace import plain

    return json.dumps(value, default=plain)


# ---- chat files --------------------------------------------------------------------------------------------------------

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho."}
OPENAI_CALL = {"id": "a1", "type": "function", "function": {"name": "weather", "arguments": '{"place": "the yard"}'}}


def test_openai_spellings():
    row = {
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}]},
            USER, {"role": "assistant", "content": None, "tool_calls": [OPENAI_CALL]},
            {"role": "tool", "tool_call_id": "a1", "content": "rain"}, {**ASSISTANT, "weight": 0}, USER, {**ASSISTANT, "weight": 1},
        ],
        "tools": list(TOOLS), "parallel_tool_calls": False, "topic": "x",
    }  # fmt: skip
    conversation, note = parse_conversation(json.dumps(row), "c:1", "/c:1")
    assert note == "not used: topic"
    assert [message.role for message in conversation.messages] == ["system", "user", "assistant", "tool", "assistant", "user", "assistant"]
    assert conversation.messages[0].content == "Be kind."
    assert conversation.messages[2].tool_calls[0]["function"] == {"name": "weather", "arguments": {"place": "the yard"}}
    assert [message.weight for message in conversation.messages if message.role == "assistant"] == [1.0, 0.0, 1.0]
    assert conversation.answer == ""
    stored = json.loads(_line([conversation]))
    assert json.loads(_line(conversations_from(stored))) == stored
    assert Conversation("c", (Message("user", "Hi"), Message("assistant", "Ho."))).answer == "Ho."


BAD_ROWS = {
    "{": "not valid JSON",
    "[]": "no list `messages`",
    json.dumps({"messages": [USER]}): "no answer to it",
    json.dumps({"messages": [USER, {**ASSISTANT, "weight": 0}]}): "nothing is left to learn",
    json.dumps({"messages": [USER, {**ASSISTANT, "weight": 0.5}]}): "can be 0 or 1",
    json.dumps({"messages": [{**USER, "weight": 1}, ASSISTANT]}): "only the assistant's messages carry loss",
    json.dumps({"messages": [{"role": "bot", "content": "x"}, ASSISTANT]}): "role is 'bot'",
    json.dumps({"messages": [USER, {"role": "assistant", "content": " "}]}): r"messages[1].content is empty",
    json.dumps({"messages": [USER, {"role": "assistant", "content": {"a": 1}}]}): "something else than text",
    json.dumps(
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}
    ): "not valid JSON",
    json.dumps({"messages": [USER, {"role": "assistant", "function_call": {"name": "f"}}]}): "old spelling",
    json.dumps({"messages": [USER, ASSISTANT], "tools": [{"name": "f"}]}): "tools[0] has no function",
}


def test_bad_rows_are_named_with_their_line(tmp_path: Path):
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join([json.dumps({"messages": [USER, ASSISTANT]}), "", *BAD_ROWS]) + "\n", encoding="utf-8")
    found, entries = read_conversations(path)
    assert [conversation.id for conversation in found] == ["chat.jsonl:1"]
    assert read_conversations(path, "a/chat.jsonl")[0][0].id == "a/chat.jsonl:1"
    dropped = [entry for entry in entries if entry.status == "dropped"]
    assert [entry.place for entry in dropped] == [f"{path}:{number}" for number in range(3, 3 + len(BAD_ROWS))]
    for entry, reason in zip(dropped, BAD_ROWS.values()):
        assert reason in entry.reason
    path.write_text("[]\n", encoding="utf-8")
    with pytest.raises(DataError, match="line 1: no list `messages`"):
        read_conversations(path)
    with pytest.raises(DataError, match="data.conversations"):
        read_conversations(tmp_path / "nowhere.jsonl")


def test_a_project_of_conversations(tmp_path: Path, tiny_folder: Callable):
    """They are split, and asked for nothing; those with tools are trained on alone; bad lines are told."""
    rows = [{"messages": [USER, {"role": "assistant", "content": f"It is number {number}, mind you."}]} for number in range(12)]
    rows += [{"messages": [USER, {"role": "assistant", "tool_calls": [OPENAI_CALL]}], "tools": list(TOOLS)}]
    write_jsonl(tmp_path / "chat.jsonl", [*rows, *({"messages": []} for _ in range(NUM_TOLD + 2))])
    project = init(
        tmp_path / "voice", settings={"data": {"conversations": ["../chat.jsonl"]}, "model": {"name_or_path": str(tiny_folder("qwen2"))}}
    )
    events: list = []
    story = Story(project, emit=events.append)
    perform(story, ["import", "synth"])
    told = [event.message for event in events if "is left out" in event.message]
    assert len(told) == NUM_TOLD and told[0].startswith(f"{(tmp_path / 'chat.jsonl').resolve()}:14 ")
    assert read_json(project.data / "import_report.json")["files"]["num_dropped"] == NUM_TOLD + 2
    examples = read_jsonl(project.examples_path)
    assert {example["kind"] for example in examples} == {"conversation"} and len(examples) == 13
    sides = {side: {example.answer for example in story.examples_of(side)} for side in ("train", "calibration", "test")}
    assert sum(map(len, sides.values())) == 12 and all(sides.values())
    assert len(story.training_examples) == len(sides["train"]) + 1
    assert all(example["source"] == example["document_id"] for example in examples)
    again: list = []
    perform(Story(project, emit=again.append), ["import", "synth"])
    assert [event.kind for event in again if event.stage in ("import", "synth") and event.kind == "stage_skipped"] == ["stage_skipped"] * 2
