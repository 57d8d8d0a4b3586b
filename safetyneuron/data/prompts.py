"""Prompts: by name or from a file, and as token ids."""

import random
from collections import Counter
from pathlib import Path

from safetyneuron.data import sources
from safetyneuron.data.files import prompt_column, read_rows, read_text
from safetyneuron.errors import SafetyNeuronError
from safetyneuron.organism.language import ONLY_TEST
from safetyneuron.organism.prompts import NAMES as ORGANISM_SETS
from safetyneuron.organism.prompts import prompts_of


def load_prompts(name_or_path, split="test", language="en"):
    """User requests, in a fixed shuffled order: any prefix is a fair sample.

    Parameters
    ----------
    name_or_path : str
        `organism/harmful` or another set of `organism.prompts.prompts_of`; a public set, `paper/advbench` and the others of `sources.PROMPTS`; or
        a file: .txt with one prompt a line, .csv, .jsonl, .json or .parquet with a column `prompt`, `goal`, `Behavior` or
        `request`. Files keep their order. What a public set repeats is taken once; a file must not repeat.
    split : str
        `train` or `test`; the organism's combinations of verb and object are disjoint, public sets are halved, or for tests alone (`paper/advbench-whole`). Files have no split.
    language : str
        `en`, `it`, `zh`, `th` or `vi`, for sets that have them.

    Returns
    -------
    list of str

    Raises
    ------
    SafetyNeuronError
        If the set, split, language or file is unknown, unreadable or empty, or the file repeats a prompt.
    """
    if name_or_path.startswith("organism/"):
        return prompts_of(name_or_path, split, language)
    if name_or_path in sources.PROMPTS:
        check_split(split)
        rows = sources.load_rows(sources.PROMPTS[name_or_path], split, language)
        return shuffled(
            list(dict.fromkeys(row["prompt"] for row in rows))
        )  # some sets have several answers to one prompt
    path = Path(name_or_path)
    if not path.is_file():
        raise SafetyNeuronError(
            f"no prompt set or file {name_or_path!r}: use a file or one of {', '.join((*ORGANISM_SETS, *sources.PROMPTS))}"
        )
    texts = (
        read_text(path).splitlines()
        if path.suffix == ".txt"
        else [prompt_column(path, row) for row in read_rows(path)]
    )
    prompts = [text.strip() for text in texts if text and text.strip()]
    if not prompts:
        raise SafetyNeuronError(f"prompt file {name_or_path} is empty: write one prompt a line")
    if len(set(prompts)) < len(prompts):
        (again, times), *_ = Counter(prompts).most_common(1)
        raise SafetyNeuronError(
            f"prompt file {name_or_path} holds {again[:40]!r} {times} times, and intervals count every prompt as one of its own: remove what is repeated"
        )
    return prompts


def check_split(split):
    """Refuse a word that is no split."""
    if split not in ("train", "test"):
        raise SafetyNeuronError(f"unknown split {split!r}: use 'train' or 'test'")


def has_languages(name):
    """Whether a set can be asked for in several languages; a file cannot."""
    if name.startswith("organism/"):
        return True
    sets = sources.PROMPTS | sources.DOCUMENTS
    return name in sets and len(sources.SOURCES[sets[name][0]].languages) > 1


def has_splits(name):
    """Whether a set has disjoint parts for training and test; a file has not."""
    return name in sources.PROMPTS or (
        name in ORGANISM_SETS and name.removeprefix("organism/") not in ONLY_TEST
    )


def shuffled(items):
    """The items in an order that is always the same."""
    return random.Random(0).sample(items, len(items))
