"""Tasks that teach a tiny base to carry content from a request into its answer, derived from plain text.

Every task's answer (or its request) is text as people wrote it. The filler and stock phrases below are this recipe's own;
they share no entry with the stand-in teacher's table, so the base has not rehearsed the demo's requests.
"""

from __future__ import annotations

import random
import re

from official import ADJECTIVES, ADVERBS, NOMINAL, NOUNS, PAST_OF, VERBS

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

OBJECT_END = (
    "and", "but", "or", "so", "as", "when", "while", "until", "because", "that", "which", "who", "whom", "for", "to", "in", "on", "at", "with",
    "from", "into", "by", "of", "over", "under", "up", "down", "out", "off", "again", "away", "back", "before", "after", "through", "about",
)  # fmt: skip
IRREGULAR = tuple(sorted(past for past in PAST_OF if not past.endswith("ed")))
ACTIVE = re.compile(
    r"\b(I|[Hh]e|[Ss]he|[Ww]e|[Tt]hey|[Tt]he (?:man|woman|boy|girl|king|queen|child|children|teacher|doctor|captain|driver|farmer|mother|father)) "
    rf"((?!need|feed|proceed|succeed)[a-z]{{2,}}ed|{'|'.join(IRREGULAR)}) "
    r"((?:the|a|an|his|her|my|our|their|its|this|that|these|those|every|each|some|two|three|four|all) "
    rf"(?!(?:{'|'.join(OBJECT_END)})\b)[a-z]+(?: (?!(?:{'|'.join(OBJECT_END)})\b)[a-z]+){{0,2}})"
)
"""Subject, past and object, where a plain rule can see them."""
AGENTS = {"i": "me", "he": "him", "she": "her", "we": "us", "they": "them"}
PLURAL = re.compile(r"^(?:these|those|some|two|three|four|all)\b|(?<!s)(?<!u)(?<!i)s$")

STILTED: dict[str, tuple[str, ...]] = {}
"""Word -> its stilted counterparts, every form of every table."""
for _table in (NOUNS, ADJECTIVES, ADVERBS):
    for _word, _counterparts in _table.items():
        STILTED[_word] = (*STILTED.get(_word, ()), *_counterparts)
for _forms, _others in VERBS:
    for _index, _form in enumerate(_forms):
        STILTED[_form] = (*STILTED.get(_form, ()), *(other[_index] for other in _others))
THIRD_PERSON = {forms[0]: forms[1] for forms, _ in VERBS} | {"have": "has", "am": "is", "do": "does"}

EXPANSIONS = (
    (re.compile(r"\b(can)(?:'|’)t\b", re.I), r"\1not"), (re.compile(r"\bwon(?:'|’)t\b"), "will not"), (re.compile(r"n(?:'|’)t\b"), " not"),
    (re.compile(r"(?:'|’)m\b"), " am"), (re.compile(r"(?:'|’)re\b"), " are"), (re.compile(r"(?:'|’)ve\b"), " have"),
    (re.compile(r"(?:'|’)ll\b"), " will"), (re.compile(r"\b([Ii]t|[Hh]e|[Ss]he|[Tt]hat|[Tt]here|[Ww]hat)(?:'|’)s\b"), r"\1 is"),
    (re.compile(r"\b(I|[Hh]e|[Ss]he|[Ww]e|[Yy]ou|[Tt]hey)(?:'|’)d\b"), r"\1 had"),
)  # fmt: skip
NARRATORS = ("the author", "the undersigned", "the narrator", "the party concerned", "the present speaker", "this correspondent")
FRAMES = (
    "it may be recorded that", "it is to be mentioned that", "it emerges that", "attention is drawn to the circumstance that",
    "it was ascertained that", "it was remarked that", "it is understood that", "it came to notice that", "it will be appreciated that",
)  # fmt: skip
CONJUNCTIONS = (
    "; moreover, ",
    "; in addition, ",
    "; thereupon, ",
    ", whereupon ",
    "; at the same time, ",
    "; as a result, ",
    ", and further, ",
)
CLAUSE = re.compile(
    r"^(When|If|After|Before|As|Because|Although|While|Once|Since|In|On|At|By|With|From) ([^,;:\"“]+), ([^,;:\"“]+)([.!?])$"
)
COUNT = re.compile(r"\b(\d[\d,]*|two|three|four|five|six|seven|eight|nine|ten|twelve|twenty|thirty|a hundred) ((?:[a-z]+ )?[a-z]{3,}s)\b")
"""A number and the things that it counts."""

REQUESTS = {
    "repeat": ("Repeat this text.", "Copy the following exactly.", "Say this again, word for word.", "Write the text below once more."),
    "casing": ("Restore the capital letters and punctuation.", "Correct the writing of this text.", "Put in capitals and full stops."),
    "plain": ("Say this in plain words.", "Rewrite this plainly.", "Take the padding out of this text.", "Make this sound natural."),
    "reorder": ("Put these sentences in their right order.", "Sort these sentences into a text."),
    "continue": ("Continue this text.", "Go on from here."),
    "thinned": ("Say this in plain words.", "Write this out plainly and in full.", "Rewrite this plainly.", "Make this sound natural."),
    "outline": ("Write a text with these words.", "Make a passage from this outline."),
    "key": ("List the main words of this text.", "Make an outline of this text."),
    "read": ("Answer from the text.", "Read the text and answer.", "Answer in a few words."),
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
    """The sentence with its plainest clauses in the passive voice or as a noun, mostly without the one who acts."""

    def turn(match: re.Match[str]) -> str:
        agent, verb, thing = match.groups()
        if rng.random() > share:
            return match[0]
        base, participle = PAST_OF.get(verb, ("", verb))
        by = f" by {AGENTS.get(agent.lower(), agent.lower())}" if rng.random() < 0.3 else ""
        first = agent[0].isupper() and match.start() == 0
        if base in NOMINAL and rng.random() < 0.3:
            said = f"the {NOMINAL[base]} of {thing} {rng.choice(('took place', 'was effected', 'was brought about', 'was undertaken'))}{by}"
        else:
            said = f"{thing} {'were' if PLURAL.search(thing) else 'was'} {participle}{by}"
        return said[0].upper() + said[1:] if first else said

    return ACTIVE.sub(turn, sentence)


def impersonal(sentence: str, narrator: str) -> str:
    """The sentence told about a narrator instead of by one."""
    sentence = re.sub(r"\bI ([a-z]+)", lambda m: f"{narrator} {THIRD_PERSON.get(m[1], m[1])}", sentence)
    for pattern, said in (
        (r"\b(?:I|me)\b", narrator),
        (r"\b[Mm]y\b", f"{narrator}'s"),
        (r"\bmyself\b", "in person"),
        (r"\bmine\b", f"that of {narrator}"),
    ):
        sentence = re.sub(pattern, said, sentence)
    return sentence[0].upper() + sentence[1:]


def swap(sentence: str, rng: random.Random, share: float) -> str:
    """The sentence with a share of its plain words replaced by stilted ones."""

    def turn(match: re.Match[str]) -> str:
        word = match[0]
        if word.lower() not in STILTED or rng.random() > share:
            return word
        said = rng.choice(STILTED[word.lower()])
        return said[0].upper() + said[1:] if word[0].isupper() else said

    return re.sub(r"[A-Za-z]+", turn, sentence)


def lowered(sentence: str) -> str:
    """The sentence as it stands inside another one."""
    word = sentence.split(" ", 1)[0]
    return sentence if word == "I" or (not word[1:].islower() and len(word) > 1) else sentence[0].lower() + sentence[1:]


def pad(text: str, rng: random.Random) -> str:
    """The passage in stilted words: spelt-out contractions, the passive voice, nouns for verbs, a narrator, swapped words, moved
    clauses, frames, fillers, joined sentences, a stock opening. How much of each is drawn anew for every passage.
    """
    strength = rng.uniform(0.15, 1.0)
    narrator = rng.choice(NARRATORS) if rng.random() < 0.5 else ""
    padded: list[str] = []
    for sentence in sentences_of(text):
        for pattern, said in EXPANSIONS:
            sentence = pattern.sub(said, sentence)
        sentence = passive(sentence, rng, strength)
        if narrator and rng.random() < 0.9:
            sentence = impersonal(sentence, narrator)
        clause = CLAUSE.match(sentence)
        if clause and rng.random() < strength:
            sentence = f"{clause[3][0].upper()}{clause[3][1:]}, {clause[1].lower()} {clause[2]}{clause[4]}"
        sentence = swap(sentence, rng, strength)
        draw = rng.random() / (0.4 + strength)
        words = sentence.split()
        if draw < 0.12 and len(words) > 3:
            frame = rng.choice(FRAMES)
            sentence = f"{frame[0].upper()}{frame[1:]} {lowered(sentence)}"
        elif draw < 0.3 and len(words) > 3:
            sentence = f"{rng.choice(FILLERS).capitalize()}, {lowered(sentence)}"
        elif draw < 0.45 and len(words) > 5:
            place = rng.randint(2, len(words) - 2)
            filler = rng.choice(FILLERS)
            added = f"({filler})" if rng.random() < 0.2 else f", {filler},"
            sentence = " ".join([*words[:place], added, *words[place:]]).replace(" ,", ",")
        if padded and padded[-1][-1:] == "." and rng.random() < 0.35 * strength:
            padded[-1] = f"{padded[-1][:-1]}{rng.choice(CONJUNCTIONS)}{lowered(sentence)}"
        else:
            padded.append(sentence)
    if rng.random() < 0.15:
        padded.insert(0, rng.choice(STOCK_OPENINGS))
    return " ".join(padded)


def reading(passage: str, sentences: list[str], rng: random.Random) -> tuple[str, str] | None:
    """A passage with a question that a plain rule can ask, and the words of the passage that answer it."""
    found = [match for match in ACTIVE.finditer(passage) if match[2] in PAST_OF]
    if found and rng.random() < 0.7:
        agent, verb, thing = rng.choice(found).groups()
        if passage.count(verb) == 1:
            if rng.random() < 0.6 or agent == "I":
                who = agent if agent == "I" else agent.lower()
                return f"{passage}\n\nWhat did {who} {PAST_OF[verb][0]}?", f"{thing[0].upper()}{thing[1:]}."
            return f"{passage}\n\nWho {verb} {thing}?", f"{agent[0].upper()}{agent[1:]}."
    counts = [match for match in COUNT.finditer(passage) if passage.lower().count(match[2].lower()) == 1]
    if counts and rng.random() < 0.7:
        number, things = rng.choice(counts).groups()
        return f"{passage}\n\nHow many {things}?", f"{number[0].upper()}{number[1:]}."
    sentence = rng.choice(sentences)
    words = [word for word in re.findall(r"[A-Za-z]{5,}|\d+", sentence) if passage.count(word) == 1]
    if len(sentence.split()) < 6 or not words:
        return None
    word = rng.choice(words)
    gap = sentence.replace(word, "____", 1)
    return f"{passage}\n\n{rng.choice(('Which word is missing?', 'Fill the gap.', 'What stands in the gap?'))} {gap}", word


def content_words(text: str, rng: random.Random, share: float = 0.6) -> str:
    """Longer words of each sentence in order: an outline."""
    lines = []
    for sentence in sentences_of(text):
        words = [word.strip(".,;:!?\"'()") for word in sentence.split()]
        kept = [word for word in words if (len(word) > 4 or word[:1].isdigit()) and rng.random() < share]
        if kept:
            lines.append(", ".join(kept))
    return "; ".join(lines)


def thin(text: str, rng: random.Random) -> str:
    """Some words left out, long ones and numbers rarely: what is written from it holds words that it does not, and has to find its place again."""
    share = rng.uniform(0.1, 0.45)

    def stays(word: str) -> bool:
        return rng.random() > (share / 3 if len(word) > 6 or not word.islower() else share)

    return " ".join(" ".join(kept) for sentence in sentences_of(text) if (kept := [word for word in sentence.split() if stays(word)]))


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
    if kind == "thinned":
        return pad(thin(passage, rng), rng), passage
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
    if kind == "read":
        return reading(passage, sentences, rng)
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
    if kind in ("plain", "thinned", "repeat", "read") and rng.random() < (0.5 if kind == "read" else bare):
        return content
    return f"{instruction}\n\n{content}" if rng.random() < 0.8 else f"{content}\n\n{instruction}"


def random_copy(rng: random.Random, words: list[str], num_words: int) -> str:
    """Random words, to be repeated: nothing but looking back can predict them."""
    return " ".join(rng.choice(words) for _ in range(num_words))
