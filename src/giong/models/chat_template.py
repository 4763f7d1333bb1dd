"""From conversations to tokens for any chat template, the same for training and for generation.

No template says where the answer begins, and searching for markers fails (templates trim, add thinking blocks, rename
roles). So the template is rendered twice with two different answers: what both renderings begin with is the prompt, what
both end with is the closing. Training and generation use that same prompt, so they cannot drift apart.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jinja2
import numpy as np

from giong.contracts import Message
from giong.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_TEMPLATE = (
    "{% for message in messages %}### {{ message['role'] | capitalize }}\n{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n\n{% endfor %}"
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
        self.end_token_ids = self._find_end_tokens(model)

    def render(self, messages: Sequence[Message]) -> tuple[str, str]:
        """(prompt, closing): the text before an answer to `messages`, and the text after it up to its end-of-turn token."""
        first, second = self._apply(messages, FIRST_PROBE), self._apply(messages, SECOND_PROBE)
        prompt = os.path.commonprefix([first, second])
        closing = os.path.commonprefix([first[::-1], second[::-1]])[::-1]
        return prompt, closing

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of everything before the answer: what generation starts from."""
        return self._tokens(self.render(messages)[0])

    def encode(self, messages: Sequence[Message], answer: str) -> EncodedChat:
        """Token ids of the request, the answer and its end-of-turn token; nothing after that token.

        The prompt's tokens are exactly those of `encode_prompt`: where the tokenizer would merge across the border, prompt
        and answer are tokenized apart, as they are when the model writes.
        """
        prompt, closing = self.render(messages)
        prompt_ids = self._tokens(prompt)
        whole = self._tokens(prompt + answer + closing)
        if whole[: len(prompt_ids)] != prompt_ids:
            whole = prompt_ids + self._tokens(answer + closing)
        answer_ids = self._cut_after_end(whole[len(prompt_ids) :], answer)
        return EncodedChat(np.asarray(prompt_ids + answer_ids, dtype=np.int64), len(answer_ids))

    def count_tokens(self, messages: Sequence[Message]) -> int:
        return len(self.encode_prompt(messages))

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of an answer, end-of-turn token and other special tokens left out."""
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _cut_after_end(self, ids: list[int], answer: str) -> list[int]:
        # The author's own text may spell a special token; only an end token of the closing counts, hence from the back.
        closing_length = min(len(ids), 32)
        for position in range(len(ids) - closing_length, len(ids)):
            if ids[position] == self.end_token_ids[0] and self.decode(ids[:position]).strip() == answer.strip():
                return ids[: position + 1]
        body = ids
        while body and self.decode(body[:-1]).strip() == answer.strip() and answer.strip():
            body = body[:-1]
        return [*body, self.end_token_ids[0]]

    def _find_end_tokens(self, model: PreTrainedModel | None) -> tuple[int, ...]:
        _, closing = self.render([Message("user", "Hello")])
        special = set(self.tokenizer.all_special_ids)
        ends = [token for token in self._tokens(closing) if token in special][:1]
        ends.append(self.tokenizer.eos_token_id)
        if model is not None and model.generation_config is not None:
            configured = model.generation_config.eos_token_id
            ends += configured if isinstance(configured, list) else [configured] if configured is not None else []
        return tuple(dict.fromkeys(ends))

    def _tokens(self, text: str) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return list(ids)

    def _apply(self, messages: Sequence[Message], answer: str) -> str:
        turns = [message.to_dict() for message in (*messages, Message("assistant", answer))]
        if self._takes_system is False:
            turns = _fold_system(turns)
        try:
            return self._render_turns(turns)
        except (jinja2.exceptions.TemplateError, ValueError, TypeError) as error:
            if turns[0]["role"] == "system" and self._takes_system is None:
                # Gemma and others refuse the system role: its text then opens the first user turn.
                text = self._render_turns(_fold_system(turns))
                self._takes_system = False
                return text
            raise ModelError(f"The chat template refuses this conversation: {error}", remedy="Set model.chat_template to a template that takes it.") from error

    def _render_turns(self, turns: list[dict[str, str]]) -> str:
        # Thinking blocks of reasoning models are switched off: an author's text is an answer, not a deliberation.
        return self.tokenizer.apply_chat_template(turns, chat_template=self.template, tokenize=False, add_generation_prompt=False, enable_thinking=False)


def _fold_system(turns: list[dict[str, str]]) -> list[dict[str, str]]:
    if turns[0]["role"] != "system":
        return turns
    return [{"role": turns[1]["role"], "content": f"{turns[0]['content']}\n\n{turns[1]['content']}"}, *turns[2:]]
