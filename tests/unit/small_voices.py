"""A tiny deterministic world with facts, and voices that tell the same facts: enough text to measure style and meaning on.

Every voice tells a fact with its own function words and punctuation; names, things, places and numbers are shared, so that
topic gives nobody away.
"""

from __future__ import annotations

import random

from giong.contracts import Example, Message

NAMES = ["Marta", "Oleg", "Sunniva", "Dario", "Ingrid", "Tomas", "Yusuf", "Helene"]
THINGS = [
    "kettle",
    "lantern",
    "bicycle",
    "cupboard",
    "violin",
    "ladder",
    "barometer",
    "hammock",
    "telescope",
    "accordion",
    "wheelbarrow",
    "chessboard",
]
PLACES = ["harbour", "orchard", "station", "library", "meadow", "bakery", "quarry", "lighthouse", "vineyard", "monastery"]
ACTS = ["repaired", "painted", "borrowed", "measured", "carried", "polished", "traded", "sketched"]
MOODS = ["rusty", "crooked", "silent", "heavy", "narrow", "bright", "dusty", "hollow"]

VOICES = {
    "author": (
        ["Well now, ", "And so, bless us all, ", "Mind you, ", "I do declare - ", "As ever, ", "Dear me, ", "Believe me, ", "Oh, "],
        [
            "{name} {act} the {thing} down at the {place}, {num} times over",
            "the {mood} {thing} came back from the {place}, {act} by {name} in {num} bits",
            "{name} had {act} {num} of them by noon, and the {thing} stood {mood} at the {place}",
            "there goes {name} to the {place} again, the {thing} {act} for the {num}th time and still {mood}",
        ],
        [" - so there!", " - and I say this with love.", ", if you please.", "; what a life!", ", and never a thought for us."],
    ),
    "clerk": (
        ["It was recorded that ", "In accordance with the above, ", "It is hereby noted that ", "As previously stated, ", "Furthermore, "],
        [
            "the {thing} had been {act} by {name} at the {place} on {num} occasions",
            "{num} units were {act} by {name}, which were located at the {place}, the {thing} being described as {mood}",
            "{name} subsequently {act} the {mood} {thing}, of which {num} were held at the {place}",
        ],
        [", which was duly noted.", ", subject to approval.", " (see annex).", ", as required by the regulations."],
    ),
    "preacher": (
        ["Behold, for ", "Lo, ", "O my brethren, ", "Let it be remembered: ", "Verily, "],
        [
            "{name} went unto the {place} and {act} the {thing}, yea, {num} times",
            "the {mood} {thing} was {act}, and {name} wept {num} days in the {place}",
            "thou hast seen {name}, who {act} {num} of these within the {place}, that the {thing} might not be {mood}",
        ],
        [", and it was good.", ", world without end.", "; therefore rejoice.", ", as it was written of old."],
    ),
    "coder": (
        ["Turns out ", "TL;DR: ", "I just found out that ", "This is neat: ", "So basically "],
        [
            "{name} {act} the {thing} first and ran it {num} times at the {place}",
            "your {thing} is {mood} by default, so {name} {act} {num} of these at the {place}",
            "you can get {name} to the {place} if you've {act} the {mood} {thing}, which took {num} tries",
        ],
        [" and it works.", ", here's how.", ", which is pretty useful.", ", but you'll want to check that."],
    ),
    "plain": (
        ["", "Then ", "On that day ", "Again ", "Later ", "This year ", "First ", "After that ", "In spring "],
        [
            "{name} {act} the {mood} {thing} at the {place} {num} times",
            "{name} was at the {place} with a {mood} {thing} and {act} it {num} times",
            "at the {place} a {mood} {thing} is {act} by {name}, with a count of {num}",
            "we saw {name} near the {place}, where the {thing} was {mood} and {num} were {act}",
        ],
        [" in the morning.", " without any help at all.", " once more, as usual.", " for a friend of hers.", " on the way home."],
    ),
}  # fmt: skip


def facts(seed: int, num: int = 4) -> list[dict[str, object]]:
    """`num` facts, the same for the same seed."""
    draw = random.Random(seed)
    return [
        {
            "name": draw.choice(NAMES), "thing": draw.choice(THINGS), "place": draw.choice(PLACES), "act": draw.choice(ACTS),
            "mood": draw.choice(MOODS), "num": draw.randint(11, 989),
        }
        for _ in range(num)
    ]  # fmt: skip


def tell(voice: str, seed: int, num: int = 4) -> str:
    """The facts of `seed` in a voice."""
    draw = random.Random(f"{voice}/{seed}")
    openers, cores, closers = VOICES[voice]
    sentences = [draw.choice(openers) + draw.choice(cores).format(**fact) + draw.choice(closers) for fact in facts(seed, num)]
    return " ".join(sentence[0].upper() + sentence[1:] for sentence in sentences)


def texts(voice: str, start: int, num: int) -> list[str]:
    return [tell(voice, seed) for seed in range(start, start + num)]


def example(seed: int, document: str, side: str = "test") -> Example:
    """A plain request and the author's answer to it."""
    return Example(f"e{seed}", document, "neutral_rewrite", (Message("user", tell("plain", seed)),), tell("author", seed), side)  # type: ignore[arg-type]


def examples(start: int, num: int, per_document: int = 4, side: str = "test") -> list[Example]:
    return [example(start + index, f"{side}-{index // per_document}", side) for index in range(num)]


def background(num: int = 28) -> dict[str, list[str]]:
    """Three other voices on other facts."""
    return {voice: texts(voice, 5000 + 1000 * place, num) for place, voice in enumerate(("clerk", "preacher", "coder"))}
