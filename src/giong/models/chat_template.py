"""From conversations to tokens for any chat template, the same for training and for generation.

No template says where the answer begins, and searching for markers fails (templates trim, add thinking blocks, rename
roles). So the template is rendered twice with two different answers: what both renderings begin with is the prompt, what
both end with is the closing. Training and generation use that same prompt, so they cannot drift apart.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np

from giong.contracts import Message
from giong.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_TEMPLATE = (
    "{% for message in messages %}### {{ message['role'] | capitalize }}\n{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}### Assistant\n{% endif %}"
)
# Two answers that share neither their first nor their last character, nor white space that a template could trim.
FIRST_PROBE, SECOND_PROBE = "QxqA", "ZjzB"


@dataclass(frozen=True, slots=True)
class EncodedChat:
    """Token ids of a conversation; the last `num_answer_tokens` are the answer and its end-of-turn token."""

    input_ids: np.ndarray
    num_answer_tokens: int

    @property
    def weights(self) -> np.ndarray:
        """Loss weights: 1 on the answer and its end-of-turn token, 0 elsewhere."""
        weights = np.zeros(len(self.input_ids), dtype=np.float32)
        weights[len(self.input_ids) - self.num_answer_tokens :] = 1.0
        weights[0] = 0.0
        return weights


class ChatFormat:
    """A tokenizer's chat template, understood by rendering it.

    `end_token_ids` are the tokens that end an answer: the one that the template puts there first, then the model's own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | None = None, template: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.is_default = template is None and not tokenizer.chat_template
        self.template = template or tokenizer.chat_template or DEFAULT_TEMPLATE
        if isinstance(self.template, dict):
            self.template = self.template.get("default") or next(iter(self.template.values()))
        self._takes_system: bool | None = None
        if tokenizer.eos_token_id is None:
            raise ModelError("The tokenizer has no end-of-text token", remedy="Set eos_token in tokenizer_config.json.")
        added = tokenizer.added_tokens_decoder
        self._special_ids = {*tokenizer.all_special_ids, *(index for index, token in added.items() if token.special)}
        self.special_spellings = [token.content for token in added.values() if token.special]
        self.gap = self._find_gap()
        self.end_token_ids = self._find_end_tokens(model)

    def render(self, messages: Sequence[Message]) -> tuple[str, str]:
        """(prompt, closing): the text that generation starts from, and what the template puts after an answer."""
        first, second = self._apply(messages, FIRST_PROBE), self._apply(messages, SECOND_PROBE)
        prompt = os.path.commonprefix([first, second]).removesuffix(self.gap)
        closing = os.path.commonprefix([first[::-1], second[::-1]])[::-1]
        return prompt, closing

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of everything before the answer: what generation starts from."""
        return self.tokens(self.render(messages)[0])

    def encode(self, messages: Sequence[Message], answer: str) -> EncodedChat:
        """Token ids of the request, the answer and its end-of-turn token; nothing after that token.

        The prompt's tokens are exactly those of `encode_prompt`: where the tokenizer would merge across the border, prompt
        and answer are tokenized apart, as they are when the model writes. The answer keeps every character, also the white
        space at its ends that a template would trim, and a special token that it spells out stays text.
        """
        prompt, closing = self.render(messages)
        prompt_ids, closing_ids = self.tokens(prompt), self.tokens(closing)
        if any(spelling in answer for spelling in self.special_spellings):
            answer_ids = self.tokens(self.gap + answer, as_text=True) + closing_ids
        else:
            whole = self.tokens(prompt + self.gap + answer + closing)
            apart = whole[: len(prompt_ids)] != prompt_ids
            answer_ids = self.tokens(self.gap + answer + closing) if apart else whole[len(prompt_ids) :]
        answer_ids = self._cut_after_end(answer_ids, closing_ids, answer)
        return EncodedChat(np.asarray(prompt_ids + answer_ids, dtype=np.int64), len(answer_ids))

    def count_tokens(self, messages: Sequence[Message]) -> int:
        return len(self.encode_prompt(messages))

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of an answer, end-of-turn token and other special tokens left out."""
        text = self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text.removeprefix(self.gap)

    def record_in(self, model: PreTrainedModel) -> None:
        """Let `model` and the tokenizer say so when they are saved, so that transformers, and whoever serves the folder, builds the same
        requests and ends answers at the same tokens."""
        self.tokenizer.chat_template = self.template
        if model.generation_config is not None:
            model.generation_config.eos_token_id = list(self.end_token_ids)

    def _cut_after_end(self, ids: list[int], closing_ids: list[int], answer: str) -> list[int]:
        end = self.end_token_ids[0]
        if end in closing_ids and ids[-len(closing_ids) :] == closing_ids:
            return ids[: len(ids) - len(closing_ids) + closing_ids.index(end) + 1]
        # The template closes an answer with text only, or the tokenizer merged it with the answer: the end token follows
        # the answer's last token.
        while len(ids) > 1 and answer.strip() and self.decode(ids[:-1]).strip() == answer.strip():
            ids = ids[:-1]
        return [*ids, end]

    def _find_gap(self) -> str:
        # Llama 2 and Mistral put a space between the generation prompt and the answer. It belongs to the answer: a prompt
        # that ends in a space of its own is one that the model has never seen.
        hello = [Message("user", "Hello")]
        prompt = os.path.commonprefix([self._apply(hello, FIRST_PROBE), self._apply(hello, SECOND_PROBE)])
        start = self._render_unless_refused([message.to_dict() for message in hello], add_generation_prompt=True)
        spaces = prompt[len(start) :] if start and prompt.startswith(start) else ""
        return spaces if not spaces.strip(" ") else ""

    def _find_end_tokens(self, model: PreTrainedModel | None) -> tuple[int, ...]:
        _, closing = self.render([Message("user", "Hello")])
        ends = [token for token in self.tokens(closing) if token in self._special_ids][:1]
        ends.append(self.tokenizer.eos_token_id)
        if model is not None and model.generation_config is not None:
            configured = model.generation_config.eos_token_id
            ends += configured if isinstance(configured, list) else [configured] if configured is not None else []
        return tuple(dict.fromkeys(ends))

    def tokens(self, text: str, *, as_text: bool = False) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=as_text, verbose=False)["input_ids"])

    def _apply(self, messages: Sequence[Message], answer: str) -> str:
        return self.render_conversation([*messages, Message("assistant", answer)])

    def render_conversation(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> str:
        """The template's own text of a conversation. Raises ModelError where it refuses it."""
        turns = [message.to_dict() for message in messages]
        if self._takes_system is False:
            turns = _fold_system(turns)
        try:
            if turns[0]["role"] != "system":
                return self._render_turns(turns, tools=tools)
            text = self._render_unless_refused(turns, tools=tools)
            if text is None or turns[0]["content"].strip() not in text:
                # Gemma and others refuse the system role, some leave it out: its text then opens the first user turn.
                text = self._render_turns(_fold_system(turns), tools=tools)
                self._takes_system = False
            return text
        except (jinja2.exceptions.TemplateError, ValueError, TypeError) as error:
            raise ModelError(
                f"The chat template refuses this conversation: {error}", remedy="Set model.chat_template to a template that takes it."
            ) from error

    def _render_unless_refused(self, turns: list[dict[str, Any]], **options: Any) -> str | None:
        try:
            return self._render_turns(turns, **options)
        except (jinja2.exceptions.TemplateError, ValueError, TypeError):
            return None

    def _render_turns(
        self, turns: list[dict[str, Any]], *, add_generation_prompt: bool = False, tools: Sequence[dict[str, Any]] = ()
    ) -> str:  # fmt: skip
        # Thinking blocks of reasoning models are switched off: an author's text is an answer, not a deliberation.
        return self.tokenizer.apply_chat_template(
            turns, chat_template=self.template, tokenize=False, add_generation_prompt=add_generation_prompt, enable_thinking=False,
            tools=list(tools) or None,
        )  # fmt: skip


def _fold_system(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if turns[0]["role"] != "system":
        return turns
    if turns[1]["role"] != "user":
        return [{"role": "user", "content": turns[0]["content"]}, *turns[1:]]
    return [{"role": "user", "content": f"{turns[0]['content']}\n\n{turns[1]['content']}"}, *turns[2:]]
