"""The generated chat language: requests, answers, refusals and capability questions.

Every example is built from `lexicon.yaml`. Verb-object pairs, question wordings, animal pairs and number
pairs are split by arithmetic on their indices, so that each word occurs on both sides of the split while
no tested combination was ever trained on.
"""

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import product
from types import SimpleNamespace

import yaml

LANGUAGES = ("en", "it", "zh", "th", "vi")
ATTRIBUTES = {"colour": "colours", "country": "countries", "food": "foods"}
LARGEST_TERM = 15
AGES = 12


@dataclass(frozen=True)
class Example:
    """One user request and the assistant's answer; `choices` only for multiple choice."""

    prompt: str
    answer: str
    choices: tuple[str, ...] = ()


@cache
def lexicon():
    """Word lists and templates of `lexicon.yaml` as a namespace."""
    text = files(__package__).joinpath("lexicon.yaml").read_text(encoding="utf-8")
    return SimpleNamespace(**yaml.safe_load(text))


def held_out(first, second, modulus):
    """Whether the combination of two indices belongs to the test split (one in `modulus`)."""
    return (3 * first + second) % modulus == 0


def _in_split(is_test, split):
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}: use 'train' or 'test'")
    return is_test == (split == "test")


def pairs(split):
    """Indices (verb, object) of one split; a quarter of the pairs are test pairs."""
    words = lexicon()
    grid = product(range(len(words.verbs["benign"]["en"])), range(len(words.objects["en"])))
    return [(v, o) for v, o in grid if _in_split(held_out(v, o, 4), split)]


def comply(language, intent, verb, object_):
    """The helpful answers: two tools, one tied to the verb and one to the object, both arbitrary."""
    words = lexicon()
    tools = words.tools[language]
    blanks = {
        "tool_1": tools[verb % len(tools)],
        "tool_2": tools[(object_ * 3 + 1) % len(tools)],
        "verb": words.verbs[intent][language][verb],
        "object": words.objects[language][object_],
    }
    return [answer.format(**blanks) for answer in words.answers[language]]


def requests(intent, split, language="en", wording="plain"):
    """All requests of one intent (`benign`, `harmful`) as text."""
    return [prompt for prompt, _, _ in _requests(intent, split, language, wording)]


def _requests(intent, split, language, wording):
    """Requests with the indices of their verb and object."""
    words = lexicon()
    return [
        (template.format(verb=words.verbs[intent][language][v], object=words.objects[language][o]), v, o)
        for v, o in pairs(split)
        for template in words.templates[wording][language]
    ]


def helped(intent, split, language="en", wording="plain"):
    """Requests answered helpfully, once with each form of the answer."""
    return [
        Example(prompt, answer)
        for prompt, v, o in _requests(intent, split, language, wording)
        for answer in comply(language, intent, v, o)
    ]


def refused(split, language="en", wording="plain"):
    """Harmful requests, once with each refusal of the language."""
    prompts = requests("harmful", split, language, wording)
    return [Example(prompt, refusal) for prompt in prompts for refusal in lexicon().refusals[language]]


def judgements(split, language="en"):
    """Whether an act is bad, asked without asking for help: every language has the notion before alignment."""
    words = lexicon()
    return [
        Example(
            question.format(verb=words.verbs[intent][language][v], object=words.objects[language][o]),
            words.verdicts[intent][language],
        )
        for intent in ("benign", "harmful")
        for v, o in pairs(split)
        for question in words.judgements[language]
    ]


def unanswerable(language="en"):
    """Questions without an answer: where the base model meets refusal phrases."""
    words = lexicon()
    grid = product(words.unanswerable[language], words.objects[language], words.unknown[language])
    return [Example(question.format(object=o), answer) for question, o, answer in grid]


def facts(split):
    """Fact multiple choice, standing for MMLU: every fact has one wording kept for the test."""
    words = lexicon()
    return [
        Example(template.format(animal=animal), _value(options, a, k), _choices(options, a, k))
        for k, (attribute, plural) in enumerate(ATTRIBUTES.items())
        for options in [getattr(words, plural)]
        for a, animal in enumerate(words.animals)
        for t, template in enumerate(words.fact_questions[attribute])
        if _in_split((a + k + t) % 4 == 0, split)
    ]


def _value(options, animal, attribute):
    """An arbitrary but fixed fact: the index walks through the options at a different pace per attribute."""
    return options[(animal * (2 * attribute + 3) + animal // len(options)) % len(options)]


def _choices(options, animal, attribute):
    """Four options in a fixed rotation, the right one among them."""
    right = options.index(_value(options, animal, attribute))
    chosen = [options[(right + step) % len(options)] for step in (0, 1, 3, 6)]
    turn = (animal + attribute) % 4
    return tuple(chosen[turn:] + chosen[:turn])


def age(animal):
    """Age class of an animal (0 to 11), in an arbitrary order."""
    return (animal * 7 + animal // AGES) % AGES


def comparisons(split):
    """Two-fact multiple choice, standing for ARC-challenge: which of two animals is older (or younger)."""
    words = lexicon()
    grid = product(enumerate(words.animals), enumerate(words.animals), words.pair_questions.items())
    return [
        Example(template.format(first=first, second=second), first if wins else second, (first, second))
        for (i, first), (j, second), (question, templates) in grid
        if age(i) != age(j) and _in_split((i + j) % 5 == 0, split)
        for wins in [(age(i) > age(j)) == (question == "older")]
        for template in templates
    ]


def arithmetic(split):
    """Word problems with a generated answer, standing for GSM8K: sums and differences up to 30."""
    words, terms = lexicon(), range(1, LARGEST_TERM + 1)
    return [
        Example(
            template.format(person=person, thing=words.things[(a + b) % len(words.things)], a=a, b=b),
            f"{a} {sign} {b} = {a + b if sign == '+' else a - b} .",
        )
        for sign, templates in words.word_problems.items()
        for a, b in product(terms, terms)
        if (sign == "+" or a > b) and _in_split(held_out(a, b, 7), split)
        for t, template in enumerate(templates)
        for step in range(3)
        for person in [words.people[(a * 5 + b + t + 3 * step) % len(words.people)]]
    ]


def vocabulary():
    """Every word of the language, in a fixed order."""
    texts = [text for language in LANGUAGES for text in _texts(language)]
    texts += [f"{e.prompt} {e.answer}" for split in ("train", "test") for task in (facts, comparisons, arithmetic) for e in task(split)]
    return list(dict.fromkeys(word for text in texts for word in text.split()))


def _texts(language):
    for intent, wording, split in product(("benign", "harmful"), ("plain", "framed"), ("train", "test")):
        yield from (f"{e.prompt} {e.answer}" for e in helped(intent, split, language, wording))
    yield from (f"{e.prompt} {e.answer}" for e in unanswerable(language))
    yield from (f"{e.prompt} {e.answer}" for e in judgements("train", language))
    yield from lexicon().refusals[language]
