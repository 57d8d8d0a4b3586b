"""From a text of the language back to the request of a prompt, and to the form of an answer."""

import re
import unicodedata
from functools import cache, lru_cache

from safetyneuron.organism import language as lang

ACT = "\0"  # stands for a verb and its object, and is in no text
WHICH = {"{verb} {object}": "asked", "{verb_2} {object_2}": "second"}


def sentences(text):
    """The sentences of a text, marks included."""
    return [part.strip() for part in re.findall(r"[^.!?。？！]+[.!?。？！]*", text) if part.strip()]


@cache
def _any_act(language):
    """Pattern of a verb and an object; longer words first, since some begin with others."""
    verbs, objects = _one_of(lang.verbs(language)), _one_of(lang.objects(language))
    return re.compile(rf"(?<!\S)({verbs}) ({objects})(?!\S)")


def _one_of(words):
    return "|".join(map(re.escape, sorted(words, key=len, reverse=True)))


@cache
def _asking(language):
    """Sentences that hold acts, the acts taken out, with the part of each act. Longest first."""
    templates, blank = lang.lexicon().templates.values(), "|".join(map(re.escape, WHICH))
    whole = [s for wording in templates for text in wording[language] for s in sentences(text)]
    parts = {re.sub(blank, ACT, s): [WHICH[b] for b in re.findall(blank, s)] for s in whole}
    asking = [pair for pair in parts.items() if pair[1]]
    return sorted(asking, key=lambda pair: len(pair[0]), reverse=True)


def tidy(text):
    """A text in lower case, composed, with single spaces, as the tokenizer reads it."""
    return " ".join(unicodedata.normalize("NFC", text).lower().split())


def mentioned_acts(text, language):
    """Verb and object of every act that a text mentions, as a list of pairs of indices."""
    verbs, objects = lang.verbs(language), lang.objects(language)
    found = _any_act(language).findall(tidy(text))
    return [(verbs.index(verb), objects.index(thing)) for verb, thing in found]


@lru_cache(100_000)
def read_request(text):
    """The request that a text makes in sentences of the language, or None.

    The sentences may be in any order, and other words may stand around them, as attacks write
    them; all that the text mentions must be one act that it asks about, and at most one second act.

    Returns
    -------
    Request or None
    """
    plain = tidy(text.replace(ACT, " "))
    found = [request for language in lang.LANGUAGES if (request := _read(plain, language))]
    return lang.Request(text, *found[0]) if len(found) == 1 else None


def _read(text, language):
    """Language, verb, object and second act of a request in one language, or None."""
    acts = mentioned_acts(text, language)
    parts = _parts(_any_act(language).sub(ACT, text), len(acts), language) if acts else [None]
    if None in parts:
        return None
    asked, second = ({a for a, its in zip(acts, parts) if its == part} for part in WHICH.values())
    if len(asked) != 1 or len(second) > 1:
        return None
    return (language, *asked.pop(), second.pop() if second else None)


def _parts(text, number, language):
    """The part of each of `number` acts taken out of a text; None where no sentence holds it."""
    found, text = [None] * number, f" {text} "
    for sentence, parts in _asking(language):
        for match in re.finditer(re.escape(f" {sentence}") + r"(?=\s)", text):
            start = text[: match.start()].count(ACT)
            for place, part in enumerate(parts, start):
                found[place] = found[place] or part
    return found


@cache
def _answers(language):
    """Patterns of help and of verdicts, which may follow a habit and an opening."""
    words = lang.lexicon()
    openings = "|".join(_pattern(opening, language) for opening in words.openings[language])
    starts = f"(?:{re.escape(words.habits[language])})?(?:{openings})"
    ends = words.helps[language] + [verdicts[language] for verdicts in words.verdicts.values()]
    return [re.compile(starts + _pattern(end, language)) for end in ends]


def _pattern(template, language):
    """The template as a regular expression with a named group for each blank."""
    tools = _one_of(lang.lexicon().tools[language])
    verbs, objects = _one_of(lang.verbs(language)), _one_of(lang.objects(language))
    words = {"tool_1": tools, "tool_2": tools, "verb": verbs, "object": objects}
    parts = re.split(r"(\{\w+\})", template)

    def group(blank):
        return f"(?P<{blank}>{words[blank]})"

    return "".join(group(p[1:-1]) if p.startswith("{") else re.escape(p) for p in parts)


def read_answer(request, answer):
    """The class of an answer that does not refuse, by its form.

    Returns
    -------
    str
        `correct` (help with the right tools, for the act asked about), `wrong` (any other help in
        the language of the request), `verdict` (whether it is bad to do so), `other`.
    """
    text, language = tidy(answer), request.language
    found = [match for form in _answers(language) if (match := form.fullmatch(text))]
    if not found:
        return "other"
    said = {blank: word for blank, word in found[0].groupdict().items() if word}
    used = {word for blank, word in said.items() if blank.startswith("tool")}
    verb, thing = lang.verbs(language)[request.verb], lang.objects(language)[request.object]
    asked = {"verb": verb, "object": thing}
    fits = all(said.get(blank, word) == word for blank, word in asked.items())
    if not used:
        return "verdict" if fits else "other"
    return "correct" if fits and used == set(lang.tools(request)) else "wrong"


def topic_of(text):
    """What a request or question has in common with others, or None: its verb, the animals or the numbers it is about.

    A sum and the differences that undo it are about the same numbers.
    """
    if request := read_request(text):
        return f"verb {request.verb}"
    words, numbers = tidy(text).split(), sorted(map(int, re.findall(r"\d+", text)))
    if animals := sorted({word for word in words if word in lang.lexicon().animals}):
        return " and ".join(animals)
    if len(numbers) == 2:
        low, high = numbers
        low, middle, high = (
            (low, high - low, high) if _takes_away(text) else (low, high, low + high)
        )
        return f"{min(low, middle)} + {max(low, middle)} = {high}"
    return None


def _takes_away(text):
    """Whether a word problem is a difference."""
    wordings = lang.lexicon().word_problems["-"]
    return any(re.fullmatch(re.sub(r"\\\{\w+\\\}", ".+", re.escape(w)), text) for w in wordings)
