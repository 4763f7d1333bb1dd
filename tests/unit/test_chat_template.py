"""From conversations to tokens, for every kind of template: what carries loss, what the answer's bytes are, where it ends."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from giong.contracts import Example, Message
from giong.errors import ModelError
from giong.models.chat_template import DEFAULT_TEMPLATE, ChatFormat
from giong.models.rows import example_rows

FAMILIES = tiny_models.FAMILIES
SYSTEM = Message("system", "Write as the author does.")
USER = Message("user", "Say that the kettle is on, and to whom.")
CONVERSATIONS = {
    "one turn": (USER,),
    "system": (SYSTEM, USER),
    "few-shot": (USER, Message("assistant", "It is on."), Message("user", "Again."), Message("assistant", "On!"), USER),
    "system and few-shot": (SYSTEM, USER, Message("assistant", "It is on, <b>friend</b>."), USER),
}
# White space at the ends of an answer is the author's too: templates of Llama, Gemma and Mistral would trim it, giong does not.
ANSWERS = {
    "plain": "The kettle is on.",
    "leading spaces": "   indented, on purpose",
    "trailing spaces": "and then nothing  ",
    "newlines": "\n\nOne line.\n\n\tAnother.\r\n\n",
    "quotes": "“Curly”, 'single', \"double\" and `back`.",
    "emoji": "A fox 🦊, a family 👩‍👩‍👧 and a flag 🇻🇳.",
    "vietnamese": "Giọng văn của tôi không giống ai: trời ơi, đẹp quá!",
    "vietnamese, decomposed": unicodedata.normalize("NFD", "Giọng văn của tôi."),
    "chinese": "我们走了一整天的路，直到太阳落山。",
    "template code": "{{ messages }} {% for x in y %} and ### Assistant\n or [INST",
    "special tokens spelt out": "Qwen writes <|im_end|> and <|im_start|>, Llama <|eot_id|>, Gemma <end_of_turn>, Mistral </s>[/INST], GPT <|endoftext|>.",
    "only the end token": "<|im_end|><|eot_id|><end_of_turn></s><|endoftext|>",
    "thinking": "<think>\nNo.\n</think>\n\nYes.",
    "one character": "a",
    "the probes of the renderer": "QxqA ZjzB",
}  # fmt: skip


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_lies_on_the_answer_and_its_end_of_turn_token_only(tiny_model: Callable, family: str, conversation: str):
    loaded = tiny_model(family)
    chat, messages = loaded.chat, CONVERSATIONS[conversation]
    end = tiny_models._CHAT[family][2]
    prompt_ids = chat.encode_prompt(messages)
    prompt_text = loaded.tokenizer.decode(prompt_ids)
    for name, answer in ANSWERS.items():
        encoded = chat.encode(messages, answer)
        ids, weights = encoded.input_ids.tolist(), encoded.weights
        start = len(ids) - encoded.num_answer_tokens
        assert weights.tolist() == [0.0] * start + [1.0] * encoded.num_answer_tokens, name
        assert ids[:start] == prompt_ids, f"{name}: training and generation see another prompt"
        if family.startswith("qwen"):
            # Qwen's tokenizer composes characters (NFC), as giong's import has done before.
            answer = unicodedata.normalize("NFC", answer)
        assert chat.decode(ids[start:]).encode() == answer.encode(), name
        assert chat.decode(ids[start:-1]).encode() == answer.encode(), name
        assert loaded.tokenizer.decode(ids) == prompt_text + (" " if family == "mistral" else "") + answer + end, name
        assert ids[-1] == chat.end_token_ids[0] == loaded.tokenizer.convert_tokens_to_ids(end), name
        assert not set(ids[start:-1]) & chat._special_ids, f"{name}: a special token inside the author's text"


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_prompt_is_what_the_template_itself_gives_for_generation(tiny_model: Callable, family: str, conversation: str):
    """What vLLM or transformers would send to the model, so that a tuned model is asked as it was taught."""
    loaded, messages = tiny_model(family), CONVERSATIONS[conversation]
    if family in ("gemma", "gemma2") and messages[0].role == "system":
        messages = (Message("user", f"{messages[0].content}\n\n{messages[1].content}"), *messages[2:])
    expected = loaded.tokenizer.apply_chat_template(
        [message.to_dict() for message in messages], chat_template=loaded.chat.template, add_generation_prompt=True,
        enable_thinking=False, tokenize=True, return_dict=False,
    )  # fmt: skip
    assert loaded.chat.encode_prompt(CONVERSATIONS[conversation]) == expected
    assert loaded.chat.count_tokens(CONVERSATIONS[conversation]) == len(expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_training_row_ends_with_the_end_token(tiny_model: Callable, family: str):
    loaded = tiny_model(family)
    examples = [
        Example(f"{conversation}/{name}", "d", "neutral_rewrite", messages, answer)
        for conversation, messages in CONVERSATIONS.items()
        for name, answer in ANSWERS.items()
    ]
    rows, report = example_rows(loaded, examples)
    assert report.too_long == []
    assert len(rows) == len(examples) == report.num_rows
    assert {int(row.input_ids[-1]) for row in rows} == {loaded.chat.end_token_ids[0]}
    assert all(row.weights[-1] == 1.0 for row in rows)
    assert report.num_loss_tokens == sum(int(row.weights.sum()) for row in rows) < report.num_tokens


def test_a_row_that_is_too_long_is_left_out_and_named(tiny_model: Callable):
    loaded = tiny_model("qwen2")
    fits = Example("fits", "d", "neutral_rewrite", (USER,), "Short.")
    long = Example("long", "d", "neutral_rewrite", (USER,), "very " * 600)
    rows, report = example_rows(loaded, [fits, long])
    assert report.too_long == ["long"]
    assert len(rows) == 1


def test_gemma_refuses_the_system_role_and_its_text_opens_the_user_turn(tiny_model: Callable):
    chat = tiny_model("gemma").chat
    prompt, closing = chat.render((SYSTEM, USER))
    assert prompt == f"<bos><start_of_turn>user\n{SYSTEM.content}\n\n{USER.content}<end_of_turn>\n<start_of_turn>model\n"
    assert closing == "<end_of_turn>\n"


def test_a_template_that_leaves_the_system_role_out_gets_it_folded_in(tiny_model: Callable):
    template = (
        "{% for message in messages %}{% if message['role'] != 'system' %}<|im_start|>{{ message['role'] }}\n"
        "{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    chat = ChatFormat(tiny_model("qwen2").tokenizer, template=template)
    assert chat.render((SYSTEM, USER))[0] == f"<|im_start|>user\n{SYSTEM.content}\n\n{USER.content}<|im_end|>\n<|im_start|>assistant\n"
    assert chat.render((USER,))[0] == f"<|im_start|>user\n{USER.content}<|im_end|>\n<|im_start|>assistant\n"
    assert chat.render((SYSTEM,))[0] == f"<|im_start|>user\n{SYSTEM.content}<|im_end|>\n<|im_start|>assistant\n"


def test_a_conversation_that_a_template_refuses_altogether_is_one_sentence(tiny_model: Callable):
    chat = tiny_model("gemma").chat
    for messages in ((USER, USER), (SYSTEM, USER, USER)):
        with pytest.raises(ModelError, match="refuses this conversation.*roles must alternate"):
            chat.encode_prompt(messages)


def test_thinking_is_switched_off(tiny_model: Callable):
    chat = tiny_model("qwen3").chat
    prompt, _ = chat.render(CONVERSATIONS["few-shot"])
    assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert prompt.count("<think>") == 1


def test_a_model_without_a_template_gets_the_plain_one_and_a_notice(tiny_model: Callable):
    loaded = tiny_model("gpt2")
    assert loaded.chat.is_default
    assert loaded.chat.template == DEFAULT_TEMPLATE
    assert any("brings no chat template" in notice and "model.chat_template" in notice for notice in loaded.notices)
    prompt, closing = loaded.chat.render((SYSTEM, USER))
    assert prompt == f"### System\n{SYSTEM.content}\n\n### User\n{USER.content}\n\n### Assistant\n"
    assert closing == "<|endoftext|>\n\n"
    for family in ("llama", "qwen2", "qwen3", "gemma", "mistral"):
        other = tiny_model(family)
        assert not other.chat.is_default
        assert other.notices == []


def test_a_template_from_a_file_takes_the_place_of_the_models_own(tiny_folder: Callable, tmp_path: Path):
    from giong.config import ModelConfig
    from giong.models.load import load_model

    template = tmp_path / "plain.jinja"
    template.write_text(
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    loaded = load_model(ModelConfig(name_or_path=str(tiny_folder("qwen2")), chat_template=str(template)))
    assert loaded.chat.render((USER,)) == (f"<user>{USER.content}\n<assistant>", "\n")
    # This template never ends a turn with a token: the end-of-text token is put right after the answer.
    for answer in ("On.", "On.\n", " on", ANSWERS["special tokens spelt out"]):
        ids = loaded.chat.encode((USER,), answer).input_ids.tolist()
        assert ids[-1] == loaded.tokenizer.eos_token_id
        assert ids.count(loaded.tokenizer.eos_token_id) == 1
        assert loaded.chat.decode(ids[len(loaded.chat.encode_prompt((USER,))) :]).strip() == answer.strip()


def test_an_end_of_turn_token_that_is_not_the_end_of_text_is_found(tiny_folder: Callable, tmp_path: Path):
    """Bases often keep <|end_of_text|> as their EOS while the template ends a turn with <|eot_id|>."""
    source = tiny_folder("llama")
    (tmp_path / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<|end_of_text|>"}))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    chat = ChatFormat(tokenizer)
    assert tokenizer.convert_ids_to_tokens(list(chat.end_token_ids)) == ["<|eot_id|>", "<|end_of_text|>"]
    assert chat.encode((USER,), "On.").input_ids[-1] == tokenizer.convert_tokens_to_ids("<|eot_id|>")


def test_a_tokenizer_without_an_end_token_is_refused(tiny_folder: Callable, tmp_path: Path):
    source = tiny_folder("llama")
    (tmp_path / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    with pytest.raises(ModelError, match="no end-of-text token"):
        ChatFormat(AutoTokenizer.from_pretrained(tmp_path))


def test_a_tokenizer_that_marks_word_starts_loses_nothing_inside_an_answer(tmp_path: Path):
    """SentencePiece style (Llama 2, Mistral 7B, Gemma): the space before a word is part of its token."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(tiny_models._SENTENCES, trainer)
    tokenizer.pre_tokenizer = None
    content = json.loads(tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    vocabulary.update({f"<0x{value:02X}>": len(vocabulary) + value for value in range(256)})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": tiny_models.MISTRAL}))
    chat = ChatFormat(AutoTokenizer.from_pretrained(tmp_path))
    for answer in ("The kettle is on.", "The kettle\nis on.\n", "Trời ơi 🦊", ANSWERS["chinese"]):
        encoded = chat.encode((USER,), answer)
        start = len(encoded.input_ids) - encoded.num_answer_tokens
        assert encoded.input_ids[:start].tolist() == chat.encode_prompt((USER,))
        assert chat.decode(encoded.input_ids[start:]) == answer
        assert encoded.input_ids[-1] == chat.end_token_ids[0]


def test_a_planted_trim_would_be_seen(tiny_model: Callable):
    """The planted error of the byte tests: an answer put through the template itself comes out trimmed."""
    loaded = tiny_model("gemma")
    rendered = loaded.tokenizer.apply_chat_template(
        [USER.to_dict(), {"role": "assistant", "content": ANSWERS["leading spaces"]}], tokenize=False
    )
    assert ANSWERS["leading spaces"] not in rendered
    assert ANSWERS["leading spaces"].strip() in rendered


def test_weights_never_ask_for_the_first_token(tiny_model: Callable):
    """A template without any prompt text: nothing stands before the answer's first token, so it cannot be predicted."""
    tokenizer = tiny_model("gpt2").tokenizer
    chat = ChatFormat(
        tokenizer,
        template="{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}",
    )
    encoded = chat.encode((USER,), "Two words")
    assert encoded.weights[0] == 0.0
    assert np.all(encoded.weights[1:] == 1.0)
