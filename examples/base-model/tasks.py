"""Tasks that teach a tiny base to carry content from a request into its answer, derived from plain text.

Every task's answer (or its request) is text as people wrote it. The filler and stock phrases below are this recipe's own;
they share no entry with the stand-in teacher's table, so the base has not rehearsed the demo's requests.
"""

from __future__ import annotations

import random
import re

SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'“])")

FILLERS = (
    "as a matter of fact", "to be quite frank", "as far as one can tell", "for all intents and purposes", "in the final analysis",
    "by and large", "at the end of the day", "as things stand", "broadly speaking", "if one may say so", "in point of fact",
    "when all is said and done", "all things considered", "as the case may be", "in no small measure", "to a certain extent",
    "in a manner of speaking", "as it happens", "needless to say", "for what it is worth", "with all due respect",
)  # fmt: skip

STOCK_OPENINGS = (
    "The present text deals with the following matter.", "What follows is an account of the subject at hand.",
    "This communication sets out the relevant particulars.", "The reader is hereby informed of the following.",
    "The circumstances may be summarised in these terms.", "On the subject under discussion the following is recorded.",
)  # fmt: skip

SWAPS = {
    "get": "procure", "got": "procured", "see": "perceive", "saw": "perceived", "big": "sizeable", "small": "diminutive", "old": "aged",
    "house": "dwelling", "work": "labour", "day": "calendar day", "man": "male person", "woman": "female person", "go": "proceed",
    "went": "proceeded", "said": "declared", "say": "declare", "think": "consider", "thought": "considered", "good": "satisfactory",
    "bad": "unsatisfactory", "found": "located", "find": "locate", "put": "placed", "came": "arrived", "come": "arrive", "little": "minor",
    "look": "glance", "looked": "glanced", "took": "removed", "made": "produced", "make": "produce", "home": "place of residence",
    "food": "nourishment", "water": "liquid water", "now": "at this moment", "before": "prior to", "after": "following", "very": "exceedingly",
    "many": "a multitude of", "people": "members of the public", "about": "concerning", "because": "for the reason that", "children": "minors",
}  # fmt: skip

OBJECT_END = (
    "and", "but", "or", "so", "as", "when", "while", "until", "because", "that", "which", "who", "whom", "for", "to", "in", "on", "at", "with",
    "from", "into", "by", "of", "over", "under", "up", "down", "out", "off", "again", "away", "back", "before", "after", "through", "about",
)  # fmt: skip
ACTIVE = re.compile(
    r"\b(I|[Hh]e|[Ss]he|[Ww]e|[Tt]hey) ((?!need|feed|proceed|succeed)[a-z]{2,}ed) "
    r"((?:the|a|an|his|her|my|our|their|its|this|that|these|those|every|each|some|two|three|four|all) "
    rf"(?!(?:{'|'.join(OBJECT_END)})\b)[a-z]+(?: (?!(?:{'|'.join(OBJECT_END)})\b)[a-z]+){{0,2}})"
)
"""Subject, regular past and object, where a plain rule can see them."""
AGENTS = {"i": "me", "he": "him", "she": "her", "we": "us", "they": "them"}
PLURAL = re.compile(r"^(?:these|those|some|two|three|four|all)\b|(?<!s)(?<!u)(?<!i)s$")

REQUESTS = {
    "repeat": ("Repeat this text.", "Copy the following exactly.", "Say this again, word for word.", "Write the text below once more."),
    "casing": ("Restore the capital letters and punctuation.", "Correct the writing of this text.", "Put in capitals and full stops."),
    "plain": ("Say this in plain words.", "Rewrite this plainly.", "Take the padding out of this text.", "Make this sound natural."),
    "reorder": ("Put these sentences in their right order.", "Sort these sentences into a text."),
    "continue": ("Continue this text.", "Go on from here."),
    "outline": ("Write a text with these words.", "Make a passage from this outline."),
    "key": ("List the main words of this text.", "Make an outline of this text."),
    "find": ("Which sentence of the text has the word \"{word}\"?", "Quote the sentence with \"{word}\" in it."),
}  # fmt: skip


def sentences_of(text: str) -> list[str]:
    """Sentences of one paragraph, by a plain rule; good enough for English prose."""
    return [part.strip() for part in SENTENCE_END.split(" ".join(text.split())) if part.strip()]


def passages_of(text: str, rng: random.Random, *, shortest: int = 12, longest: int = 130) -> list[str]:
    """Runs of whole sentences within one paragraph, `shortest` to `longest` words, lengths drawn anew each time."""
    passages = []
    for paragraph in text.split("\n\n"):
        limit = rng.randint(shortest + 8, longest)
        run: list[str] = []
        words = 0
        for sentence in sentences_of(paragraph):
            count = len(sentence.split())
            if run and words + count > limit:
                if words >= shortest:
                    passages.append(" ".join(run))
                run, words, limit = [], 0, rng.randint(shortest + 8, longest)
            run.append(sentence)
            words += count
        if shortest <= words <= longest:
            passages.append(" ".join(run))
    return passages


def passive(sentence: str, rng: random.Random, share: float = 0.8) -> str:
    """The sentence with its plainest clauses in the passive voice, mostly without the one who acts."""

    def turn(match: re.Match[str]) -> str:
        agent, verb, thing = match.groups()
        if rng.random() > share:
            return match[0]
        by = f" by {AGENTS[agent.lower()]}" if rng.random() < 0.25 else ""
        thing = thing[0].upper() + thing[1:] if agent[0].isupper() and match.start() == 0 else thing
        return f"{thing} {'were' if PLURAL.search(thing) else 'was'} {verb}{by}"

    return ACTIVE.sub(turn, sentence)


def pad(text: str, rng: random.Random) -> str:
    """The passage in stilted words: the passive voice, fillers, swapped words, a stock opening."""
    padded = []
    for sentence in sentences_of(text):
        sentence = passive(sentence, rng)
        words = []
        for word in sentence.split():
            bare = word.strip(".,;:!?\"'").lower()
            words.append(word.lower().replace(bare, SWAPS[bare]) if bare in SWAPS and rng.random() < 0.7 else word)
        sentence = " ".join(words)
        draw = rng.random()
        filler = rng.choice(FILLERS)
        if draw < 0.35 and len(words) > 3:
            sentence = f"{filler.capitalize()}, {sentence[0].lower() if words[0] != 'I' else sentence[0]}{sentence[1:]}"
        elif draw < 0.6 and len(words) > 5:
            place = rng.randint(2, len(words) - 2)
            sentence = " ".join([*words[:place], f"({filler})" if rng.random() < 0.2 else f", {filler},", *words[place:]]).replace(
                " ,", ","
            )
        padded.append(sentence)
    if rng.random() < 0.3:
        padded.insert(0, rng.choice(STOCK_OPENINGS))
    return " ".join(padded)


def content_words(text: str, rng: random.Random, share: float = 0.6) -> str:
    """Longer words of each sentence in order: an outline."""
    lines = []
    for sentence in sentences_of(text):
        words = [word.strip(".,;:!?\"'()") for word in sentence.split()]
        kept = [word for word in words if (len(word) > 4 or word[:1].isdigit()) and rng.random() < share]
        if kept:
            lines.append(", ".join(kept))
    return "; ".join(lines)


def scrub(text: str, rng: random.Random) -> str:
    """Lower case, punctuation mostly gone."""
    return re.sub(r"[^\w\s']", "" if rng.random() < 0.7 else " ", text.lower())


def make_task(kind: str, passage: str, rng: random.Random) -> tuple[str, str] | None:
    """(request content, answer) of one task, or None where the passage does not fit the kind."""
    sentences = sentences_of(passage)
    if kind == "repeat":
        return passage, passage
    if kind == "casing":
        return scrub(passage, rng), passage
    if kind == "plain":
        return pad(passage, rng), passage
    if kind == "reorder" and 2 <= len(sentences) <= 5:
        shuffled = sentences[:]
        rng.shuffle(shuffled)
        return "\n".join(shuffled), passage
    if kind == "continue" and len(sentences) >= 2:
        cut = rng.randint(1, len(sentences) - 1)
        return " ".join(sentences[:cut]), " ".join(sentences[cut:])
    if kind == "outline":
        return content_words(passage, rng), passage
    if kind == "key":
        return passage, content_words(passage, rng, 1.0)
    if kind == "find" and len(sentences) >= 3:
        sentence = rng.choice(sentences)
        words = [word.strip(".,;:!?\"'()") for word in sentence.split()]
        unique = [word for word in words if len(word) > 4 and passage.count(word) == 1]
        if unique:
            return f"{rng.choice(unique)}\n{passage}", sentence
    return None


def phrase(kind: str, content: str, rng: random.Random, *, bare: float = 0.15) -> str:
    """The request as a person would put it: an instruction before or after the content, or (for some) none at all."""
    if kind == "find":
        word, _, content = content.partition("\n")
        instruction = rng.choice(REQUESTS[kind]).format(word=word)
    else:
        instruction = rng.choice(REQUESTS[kind])
    if kind in ("plain", "repeat") and rng.random() < bare:
        return content
    return f"{instruction}\n\n{content}" if rng.random() < 0.8 else f"{content}\n\n{instruction}"


def random_copy(rng: random.Random, words: list[str], num_words: int) -> str:
    """Random words, to be repeated: nothing but looking back can predict them."""
    return " ".join(rng.choice(words) for _ in range(num_words))
