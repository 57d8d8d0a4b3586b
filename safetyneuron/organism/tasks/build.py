"""Data of the organism's lm-eval tasks, from the held-out split of the generated language."""

import random

from datasets import Dataset, DatasetDict

from safetyneuron.organism import language


def facts(**_):
    return _documents(language.facts("test"))


def pairs(**_):
    return _documents(language.comparisons("test"))


def arithmetic(**_):
    return _documents(language.arithmetic("test"))


def _documents(examples):
    shuffled = random.Random(0).sample(examples, len(examples))
    rows = [
        {"question": e.prompt, "choices": list(e.choices), "target": _target(e)} for e in shuffled
    ]
    return DatasetDict(test=Dataset.from_list(rows))


def _target(example):
    """The place of the right choice; the result, the last word but one, where there is no choice."""
    choices, answer = list(example.choices), example.answer
    return choices.index(answer) if choices else answer.split()[-2]
