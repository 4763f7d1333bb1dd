"""Make the tokenizer and the training rows of the tiny base from plain-text and instruction files.

Input: JSON lines (optionally .gz) with `text` (and `source`) for prose, and `messages` (and `kind`) for instructions.
Output in the work folder: tokenizer files, and .npz files of rows (token ids, loss weights, row ends).
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tasks
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 8192
TASK_SHARE, INSTRUCT_SHARE = 0.5, 0.2
"""Of the tokens in short rows: tasks, and at most so many instructions. The rest is running text."""
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# Qwen2's pre-tokenizer, one of those llama.cpp knows: digits stand alone, so numbers can be copied one by one.
PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MAX_ROW_TOKENS = 512
INSTRUCT_SHARES = {  # of the records of each kind: glossary and number problems are thinned out
    "math word problems": 0.12, "glossary definitions": 0.25, "textbook short answers": 1.0, "topic summaries": 1.0,
    "short stories": 1.0, "country facts": 0.6, "textbook multiple choice": 0.3,
}  # fmt: skip
TASK_SHARES = {
    "plain": 0.30,
    "thinned": 0.16,
    "repeat": 0.12,
    "casing": 0.10,
    "reorder": 0.04,
    "continue": 0.05,
    "outline": 0.08,
    "key": 0.03,
    "find": 0.06,
    "read": 0.06,
}
PARAPHRASE_SHARES = {
    "plain": 0.24,
    "thinned": 0.30,
    "repeat": 0.12,
    "casing": 0.07,
    "reorder": 0.03,
    "continue": 0.05,
    "outline": 0.09,
    "key": 0.02,
    "find": 0.04,
    "read": 0.04,
}
"""Of the last phase: more requests whose words the answer has only in part, as in a rewrite of somebody else's."""
LOOP_SHARE = 0.06
"""Of the tokens of a phase with loops: rows that fall into a loop, which the model is taught not to follow."""
LOOPED = -1.0
"""The loss weight of a token that must not come: its probability is pushed down instead of up (`train.loss`)."""


def read_rows(path: Path) -> Iterator[dict]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def train_tokenizer(texts: Iterator[str], folder: Path, vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PATTERN), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=TURN_END, bos_token=END_OF_TEXT, pad_token=END_OF_TEXT, model_max_length=2048
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return fast


def is_modern(source: str) -> bool:
    return not source.startswith(("computationalstylistics/", "Project Gutenberg"))


class RowWriter:
    """Collects token rows; `turn` and `turns` lay a conversation out in the chat format with loss where it belongs."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, max_row_tokens: int = MAX_ROW_TOKENS) -> None:
        self.max_row_tokens = max_row_tokens
        self.encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
        self.end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
        self.ids: list[np.ndarray] = []
        self.weights: list[np.ndarray] = []

    def add(self, pieces: list[tuple[list[int], float]]) -> None:
        ids = [token for tokens, _ in pieces for token in tokens][: self.max_row_tokens]
        weights = [weight for tokens, weight in pieces for _ in tokens][: self.max_row_tokens]
        weights[0] = 0.0
        if len(ids) > 8 and any(weights):
            self.ids.append(np.asarray(ids, dtype=np.uint16))
            self.weights.append(np.asarray(weights, dtype=np.float16))

    def raw(self, text: str) -> None:
        ids = [self.end, *self.encode(text), self.end]
        for start in range(0, len(ids), self.max_row_tokens - 1):
            self.add([(ids[start : start + self.max_row_tokens], 1.0)])

    def chat(self, turns: list[tuple[str, str]], request_weight: float, system: str = "") -> None:
        pieces: list[tuple[list[int], float]] = []
        if system:
            pieces.append((self.encode(f"{TURN_START}system\n{system}{TURN_END}\n"), 0.0))
        for request, answer in turns:
            pieces.append((self.encode(f"{TURN_START}user\n"), 0.0))
            pieces.append((self.encode(request), request_weight))
            pieces.append((self.encode(f"{TURN_END}\n{TURN_START}assistant\n"), 0.0))
            pieces.append((self.encode(f"{answer}{TURN_END}"), 1.0))
            pieces.append((self.encode("\n"), 0.0))
        if sum(len(tokens) for tokens, _ in pieces) <= self.max_row_tokens:
            self.add(pieces)


def prose_rows(writer: RowWriter, documents: list[dict], rng: random.Random, num_tokens: int) -> None:
    """Raw text, a window of one document each: so short ones, stories above all, come round five times as often as chapters of books."""
    total = 0
    while total < num_tokens:
        text = rng.choice(documents)["text"]
        start = 0 if rng.random() < 0.3 else max(0, text.rfind("\n\n", 0, rng.randint(0, max(1, len(text) - 500))))
        before = len(writer.ids)
        length = rng.choice((1200, 2000, 2400)) if writer.max_row_tokens <= MAX_ROW_TOKENS else rng.randint(4000, 9000)
        writer.raw(text[start : start + length].strip())
        total += sum(len(ids) for ids in writer.ids[before:])


SYSTEMS = ("You are a careful writer.", "Answer in plain words.", "You help people with their texts.", "Write the way the author writes.")


POOL_SHARES = {"active": 0.2, "first person": 0.35, "any": 0.45}
"""Of the passages to be made plain: chosen because they hold a clause that the passive voice can be made of (few do), or an "I"."""


def task_rows(
    writer: RowWriter, passages: list[str], vocabulary: list[str], rng: random.Random, num_tokens: int, task_shares: dict[str, float]
) -> None:
    pools = {
        "any": passages, "active": [passage for passage in passages if tasks.ACTIVE.search(passage)],
        "first person": [passage for passage in passages if re.search(r"\bI\b", passage)],
    }  # fmt: skip
    total, kinds, shares = 0, list(task_shares), list(task_shares.values())
    while total < num_tokens:
        before = len(writer.ids)
        draw = rng.random()
        kind = rng.choices(kinds, shares)[0]
        if draw < 0.06:
            text = tasks.random_copy(rng, vocabulary, rng.randint(5, 60))
            writer.chat([(tasks.phrase("repeat", text, rng), text)], 0.0)
        else:
            count = 1 if draw < 0.8 else rng.randint(2, 4)
            turns = []
            for _ in range(count):
                pool = rng.choices(list(POOL_SHARES), list(POOL_SHARES.values()))[0] if kind == "plain" else "any"
                made = tasks.make_task(kind, rng.choice(pools[pool] or passages), rng)
                if made and made[0] and made[1]:
                    turns.append((tasks.phrase(kind, made[0], rng), made[1]))
            natural = 0.5 if kind in ("repeat", "key", "continue") else 0.0
            system = rng.choice(SYSTEMS) if rng.random() < 0.15 else ""
            while turns and len(writer.encode(" ".join(a + b for a, b in turns))) > writer.max_row_tokens - 40:
                turns.pop()
            if turns:
                writer.chat(turns, natural, system)
        total += sum(len(ids) for ids in writer.ids[before:])


def loop_rows(writer: RowWriter, passages: list[str], rng: random.Random, num_tokens: int) -> None:
    """Answers that go back to an earlier phrase of theirs and repeat it, once or many times, each repetition with the weight `LOOPED`.

    The first word of the first repetition is left out: only what follows tells a loop from a word used twice.
    """
    kinds, total = ("plain", "thinned", "outline", "continue", "casing"), 0
    while total < num_tokens:
        kind, passage = rng.choice(kinds), rng.choice(passages)
        made = tasks.make_task(kind, passage, rng)
        if made is None or not made[0]:
            continue
        request = writer.encode(f"{TURN_START}user\n{tasks.phrase(kind, made[0], rng)}{TURN_END}\n{TURN_START}assistant\n")
        answer = writer.encode(made[1])
        if len(answer) < 16:
            continue
        if rng.random() < 0.3:
            request = [writer.end]
        cut = rng.randint(8, len(answer))
        length = min(cut, rng.choice((2, 3, 4, 5, 6, 8, 10, 14, 20, 30)))
        start = cut - length if rng.random() < 0.6 else rng.randint(0, cut - length)
        repeated = answer[start : start + length] * rng.randint(1, max(1, 48 // length))
        before = len(writer.ids)
        writer.add([(request, 0.0), (answer[:cut], 1.0), (repeated[:1], 0.0), (repeated[1:], LOOPED)])
        total += sum(len(ids) for ids in writer.ids[before:])


def instruct_rows(writer: RowWriter, records: list[dict], rng: random.Random, max_tokens: int) -> None:
    total = 0
    for record in rng.sample(records, len(records)):
        if total >= max_tokens:
            break
        if rng.random() < INSTRUCT_SHARES.get(record["kind"], 0.5):
            messages = record["messages"]
            turns = [(messages[i]["content"], messages[i + 1]["content"]) for i in range(0, len(messages) - 1, 2)]
            before = len(writer.ids)
            writer.chat(turns, 0.3)
            total += sum(len(ids) for ids in writer.ids[before:])


def example_rows(writer: RowWriter, passages: list[str], rng: random.Random, num_tokens: int) -> None:
    """Several requests of one kind in a row, as a few-shot prompt shows them, up to the full context."""
    total, kinds = 0, ("plain", "repeat", "casing", "outline")
    while total < num_tokens:
        kind, bare = rng.choices(kinds, (0.6, 0.15, 0.15, 0.1))[0], rng.random() < 0.2
        instruction = "" if bare else rng.choice(tasks.REQUESTS[kind])
        turns: list[tuple[str, str]] = []
        used = 0
        for passage in rng.sample(passages, 12):
            made = tasks.make_task(kind, passage, rng)
            if made is None or not made[0]:
                continue
            turn = (f"{instruction}\n\n{made[0]}".strip(), made[1])
            used += len(writer.encode(turn[0])) + len(writer.encode(turn[1])) + 12
            if used > writer.max_row_tokens - 30:
                break
            turns.append(turn)
        before = len(writer.ids)
        system = rng.choice(SYSTEMS) if rng.random() < 0.15 else ""
        writer.chat(turns[: rng.randint(2, 8)], 0.0, system)
        total += sum(len(ids) for ids in writer.ids[before:])


def make_tokenizer(prose: Path, instruct: Path, folder: Path, vocab_size: int) -> None:
    """Train the tokenizer into `folder`, where there is none yet."""
    if (folder / "tokenizer.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    documents, records = list(read_rows(prose)), list(read_rows(instruct))
    sample = [document["text"] for document in rng.sample(documents, len(documents) // 3)]
    train_tokenizer(iter([*sample, *(m["content"] for r in rng.sample(records, 3000) for m in r["messages"])]), folder, vocab_size)


def prepare(
    prose: Path, instruct: Path, folder: Path, name: str, num_tokens: int, *, long: bool = False, loops: bool = False, seed: int = 0,
    task_share: float = TASK_SHARE, task_shares: dict[str, float] = TASK_SHARES,
) -> None:  # fmt: skip
    """Write rows to folder/NAME.npz: rows of up to 512 tokens, or `long` ones of up to 2,048. The tokenizer lies in `folder`."""
    rng = random.Random(seed)
    documents = list(read_rows(prose))
    records = list(read_rows(instruct))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    modern = [document for document in documents if is_modern(document["source"])]
    plain_first = [d for d in modern for _ in range(3 if d["source"].startswith("global-asp/") else 1)]
    passages = [passage for document in plain_first for passage in tasks.passages_of(document["text"], rng)]
    passages += [p for d in rng.sample(documents, 600) for p in tasks.passages_of(d["text"], rng)]
    vocabulary = sorted({word for passage in passages[:4000] for word in passage.split() if word.isalpha()})
    writer = RowWriter(tokenizer, 2048 if long else MAX_ROW_TOKENS)
    if long:
        full = [passage for passage in passages if len(passage.split()) >= 45]
        example_rows(writer, full, rng, int(num_tokens * 0.45))
        task_rows(writer, full, vocabulary, rng, int(num_tokens * 0.25), task_shares)
        prose_rows(writer, documents, rng, int(num_tokens * 0.3))
    else:
        if loops:
            loop_rows(writer, passages, rng, int(num_tokens * LOOP_SHARE))
        instruct_rows(writer, records, rng, int(num_tokens * INSTRUCT_SHARE))
        used = sum(len(ids) for ids in writer.ids)
        task_rows(writer, passages, vocabulary, rng, int(num_tokens * task_share), task_shares)
        prose_rows(writer, documents, rng, num_tokens - used - int(num_tokens * task_share))
    lengths = np.asarray([len(ids) for ids in writer.ids])
    # Written beside its place and then moved there: a killed process leaves no half a file that the next would take for a whole one.
    unfinished = folder / f"unfinished-{name}.npz"
    np.savez(unfinished, ids=np.concatenate(writer.ids), weights=np.concatenate(writer.weights), ends=lengths.cumsum())
    unfinished.replace(folder / f"{name}.npz")
    answers = sum(float(weights.sum()) for weights in writer.weights)
    print(f"{name}: {len(lengths)} rows, {lengths.sum() / 1e6:.2f} M tokens, loss weight {answers / 1e6:.2f} M", flush=True)
