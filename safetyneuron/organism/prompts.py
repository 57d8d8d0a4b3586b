"""Prompt sets of the shipped organisms, by name."""

import random

from safetyneuron.errors import SafetyNeuronError
from safetyneuron.organism import language as lang

NAMES = tuple(f"organism/{name}" for name in (*lang.SETS, "general"))


def prompts_of(name, split="test", language="en"):
    """Requests of a set in a fixed order, the same in every language.

    Parameters
    ----------
    name : str
        `organism/harmful`, `unseen` (verbs kept out of alignment), `adversarial` (framings kept out of training),
        `multilingual` (combinations of its own), `lookalike` (harmful words used harmlessly), `benign`, or `general`
        (benign requests in a framing, and capability questions, for foundation neurons).
    split : str
        `train` or `test`; there is nothing of `unseen` and `adversarial` to train on.

    Returns
    -------
    list of str

    Raises
    ------
    SafetyNeuronError
        If the set, the split or the language is unknown, or the set has no such split.
    """
    kind = name.removeprefix("organism/")
    if name not in NAMES:
        raise SafetyNeuronError(f"no prompt set is called {name!r}: use one of {', '.join(NAMES)}")
    if language not in lang.LANGUAGES:
        raise SafetyNeuronError(
            f"unknown language {language!r}: use one of {', '.join(lang.LANGUAGES)}"
        )
    if split not in lang.LIMITS:
        raise SafetyNeuronError(f"unknown split {split!r}: use 'train' or 'test'")
    if split == "train" and kind in lang.ONLY_TEST:
        raise SafetyNeuronError(f"nothing of {name} is trained on: use split='test'")
    if kind != "general":
        return [request.text for request in lang.requests(kind, split, language)]
    asked = [request.text for request in lang.framed(split, language)]
    draw = random.Random(0)
    tasks = [
        [example.prompt for example in draw.sample(task(split), len(task(split)))]
        for task in lang.TASKS.values()
    ]
    return [prompt for together in zip(asked, *tasks) for prompt in together]
