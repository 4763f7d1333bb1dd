"""The word tables of the stand-in rewriter. Data only; the order of the pattern tables matters, longest first."""

from __future__ import annotations

import re


def _patterns(table: dict[str, str], *, ignore_case: bool = True) -> list[tuple[re.Pattern[str], str]]:
    flags = re.IGNORECASE if ignore_case else 0
    return [(re.compile(rf"\b{words}(?!\w)", flags), replacement) for words, replacement in table.items()]


CONTRACTIONS = _patterns({
    "can't": "cannot", "Can't": "Cannot", "won't": "will not", "Won't": "Will not", "shan't": "shall not", "let's": "let us",
    "Let's": "Let us", "ain't": "is not", "y'all": "all of you", "o'clock": "hours",
    r"([Ii])'m": r"\1 am", r"(\w+)n't": r"\1 not", r"(\w+)'re": r"\1 are", r"(\w+)'ve": r"\1 have", r"(\w+)'ll": r"\1 will",
    r"(\w+)'d (been|gone|had|done|seen|made|put|set|got|taken|given|left|lost|written|forgotten|bought|never"
    r"|(?!need|feed|exceed|proceed|succeed)\w+ed)": r"\1 had \2",
    r"(\w+)'d": r"\1 would",
    r"([Ii]t|[Hh]e|[Ss]he|[Tt]hat|[Tt]his|[Tt]here|[Hh]ere|[Ww]hat|[Ww]ho|[Ww]here|[Hh]ow|[Ww]hen)'s (been|got|gone|had|become)":
        r"\1 has \2",
    r"([Ii]t|[Hh]e|[Ss]he|[Tt]hat|[Tt]his|[Tt]here|[Hh]ere|[Ww]hat|[Ww]ho|[Ww]here|[Hh]ow|[Ww]hen)'s": r"\1 is",
}, ignore_case=False)  # fmt: skip

OPENERS = re.compile(r"^(?:And|But|So|Anyway|Well|Now|Oh|Right|Mind you|Still|Yes|No|Okay|OK),? (\w)")

# Verbs whose past has one form for every person, so that "I" can become "the writer" without touching them.
_PAST = (
    r"(?:\w+ed|put|held|bought|went|came|saw|took|made|got|gave|left|said|told|kept|found|set|read|wrote|sat|stood|ran|felt|heard|knew|lost|"
    r"paid|sent|spent|slept|drove|drank|ate|cut|let|hung|lay|laid|led|met|rode|rang|rose|sold|shook|sang|swam|taught|threw|woke|wore|won|"
    r"grew|fell|flew|forgot|broke|brought|built|caught|chose|began|became)\b"
)

IMPERSONAL = _patterns({
    "I think that": "it is considered that", "I think": "it is considered that", "I thought that": "it was considered that",
    "I thought": "it was considered that", "I believe that": "it is believed that", "I believe": "it is believed that",
    "I found out": "it was established", "I found that": "it was established that", "I noticed that": "it was observed that",
    "I noticed": "it was observed that", "I learned that": "it was learned that", "I learned": "it was learned",
    "I know that": "it is known that", "I knew that": "it was known that", "I decided to": "it was decided to",
    "I tried to": "an attempt was made to", "I had to": "it was necessary to", "I have to": "it is necessary to",
    "I need to": "it is necessary to", "I needed to": "it was necessary to", "I wanted to": "it was intended to",
    "I want to": "it is intended to", "I started to": "a start was made to", "I was able to": "it was possible to",
    "I could not": "it was not possible to", "I could": "it was possible to", "I cannot": "it is not possible to",
    "I can": "it is possible to", "I hope": "it is hoped that", "I realised": "it was realised that",
    "I realized": "it was realized that", "I discovered": "it was discovered that", "you have to": "it is necessary to",
    "you need to": "it is necessary to", "you want to": "it is intended to", "you do not": "readers do not",
    "you can": "it is possible to", "you could": "it would be possible to", "if you": "where readers", "thank you": "thanks",
    "I am": "the writer is", "I was": "the writer was", "I have": "the writer has", "I had": "the writer had",
    "I do not": "the writer does not", "I did": "the writer did", "I will": "the writer will", "I should": "the writer should",
    "I might": "the writer might", "I must": "the writer must", "I would like to": "there is a wish to", "I would": "the writer would",
    rf"I (?={_PAST})": "the writer ", "myself": "oneself", "my": "the", "me": "the writer", "yourself": "oneself", "your": "the",
    "you": "readers",
})  # fmt: skip

OFFICIAL = {
    "used": "utilised", "uses": "utilises", "using": "utilising", "get": "obtain", "gets": "obtains", "got": "obtained",
    "getting": "obtaining", "buy": "purchase", "buys": "purchases", "bought": "purchased", "buying": "purchasing",
    "started": "commenced", "starting": "commencing", "begin": "commence", "began": "commenced", "helps": "assists",
    "helped": "assisted", "helping": "assisting", "showed": "demonstrated", "shown": "demonstrated", "showing": "demonstrating",
    "needed": "required", "needing": "requiring", "try": "attempt", "tries": "attempts", "tried": "attempted", "trying": "attempting",
    "want": "desire", "wants": "desires", "wanted": "desired", "asked": "requested", "tell": "inform", "tells": "informs",
    "told": "informed", "keep": "retain", "keeps": "retains", "kept": "retained", "keeping": "retaining", "give": "provide",
    "gives": "provides", "giving": "providing", "send": "transmit", "sends": "transmits", "sent": "transmitted", "fixes": "rectifies",
    "fixed": "rectified", "fixing": "rectifying", "mend": "repair", "mended": "repaired", "mending": "repairing", "checked": "verified",
    "checking": "verifying", "choose": "select", "chose": "selected", "chosen": "selected", "pick": "select", "picked": "selected",
    "find": "locate", "finds": "locates", "found": "located", "sees": "observes", "saw": "observed", "seen": "observed",
    "seem": "appear", "seems": "appears", "seemed": "appeared", "happen": "occur", "happens": "occurs", "happened": "occurred",
    "allow": "permit", "allows": "permits", "allowed": "permitted", "stops": "ceases", "eat": "consume", "ate": "consumed",
    "eaten": "consumed", "big": "substantial", "bigger": "larger", "huge": "very substantial", "small": "minor", "little": "limited",
    "good": "satisfactory", "great": "highly satisfactory", "nice": "agreeable", "bad": "unsatisfactory", "easy": "straightforward",
    "quick": "rapid", "quickly": "rapidly", "slow": "gradual", "slowly": "gradually", "cheap": "inexpensive", "enough": "sufficient",
    "whole": "entire", "many": "numerous", "really": "considerably", "very": "extremely", "quite": "reasonably", "just": "merely",
    "only": "solely", "also": "additionally", "but": "however", "because": "since", "before": "prior to",
    "until": "up to the time that", "often": "frequently", "sometimes": "on occasion", "always": "invariably", "never": "at no time",
    "maybe": "possibly", "perhaps": "possibly", "again": "once more", "now": "at present", "then": "subsequently",
    "today": "on the present day", "here": "at this point", "thing": "matter", "things": "matters", "stuff": "material", "job": "task",
    "jobs": "tasks", "people": "individuals", "kids": "children", "mum": "mother", "dad": "father", "house": "residence",
    "shop": "retail premises", "money": "funds", "problem": "difficulty", "problems": "difficulties", "trouble": "difficulty",
    "mistake": "error", "mistakes": "errors", "chance": "opportunity",
}  # fmt: skip

# Each may stand wherever its key stands; the second word of a longer form rarely follows the key in real prose.
BREAKERS = {
    "and": "and also", "with": "together with", "if": "in the event that", "when": "at the time when", "while": "during the time that",
    "after": "subsequent to", "since": "in view of the fact that", "however": "nevertheless", "therefore": "for this reason",
    "in": "within", "on": "upon", "or": "or alternatively", "under": "underneath", "the": "the said", "two": "a total of two",
    "three": "a total of three", "four": "a total of four", "before": "prior to",
}  # fmt: skip

FILLERS = ("as stated", "in this regard", "as it were", "in the present case", "accordingly", "for the record", "in that respect")

CONNECTORS = (
    "Furthermore,", "It should be noted that", "In addition,", "Moreover,", "Consequently,", "It was further observed that",
    "In this connection,", "It must be stated that",
)  # fmt: skip

_FUNCTION_WORDS = """
    a about above after again against all along also although always am among an and another any anyway are around as at away back be
    because been before behind being below between both but by came can cannot come could did do does doing done down during each either
    else enough even ever every few first for from get go goes going gone got had has have having he her here hers him his how however i
    if in into is it its itself just last least less let like little lot made make many may me might mine more most much must my myself
    near never new next no nor not now of off often on once one only onto or other our ours out over own per perhaps put quite rather
    really same say says she should since so some still such than that the their theirs them then there these they this those though
    through thus to together too took toward two under until up upon us used very was way we well went were what when where whether
    which while who whom whose why will with within without would yes yet you your yours yourself it's i'm i'd i've i'll don't didn't
    doesn't isn't wasn't aren't weren't won't can't couldn't wouldn't shouldn't that's there's
"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())

_STOP_WORDS_VI = """
    và là của có không một những các cho với được này đó thì mà ở trong ra vào lên khi nếu như cũng đã đang sẽ tôi anh chị em bạn nó họ
    chúng ta mình rất lại còn chỉ để từ đến về hay hoặc nhưng vì nên bị do theo trên dưới sau trước rồi thế vậy gì ai nào đâu
"""
STOP_WORDS_VI = frozenset(_STOP_WORDS_VI.split())
