"""The public data sets of both papers: where they are, at which revision, and what their columns mean. None of them is part of this project.

A set named `paper/…` is read from a file of `$SAFETYNEURON_DATA` if there is one, else through the `datasets` library, which downloads it once into a
cache of its own. This project keeps none of the rows.
"""

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

from safetyneuron.data.files import read_rows
from safetyneuron.errors import SafetyNeuronError

ROWS = 20000  # read of every set
TEXT = 600  # characters of an article, about as long as a request with its answer
ENDINGS = (".jsonl", ".json", ".csv", ".parquet")


@dataclass(frozen=True)
class Source:
    """A data set: the name of its local file, its place on the hub, and a page that says how to get it. {language} in `file` and `parts` is filled in.

    parts: the files to download, where the whole set is many times larger than what is read; only: the column that must be true in a row.
    """

    file: str
    page: str
    repository: str | None = None
    revision: str | None = (
        None  # None: not pinned, because the commit could not be looked up when this was written
    )
    config: str | None = None
    folder: str | None = None
    parts: str | None = None
    only: str | None = None
    split: str = "train"
    languages: tuple[str, ...] = ("en",)


_ALL = ("en", "it", "zh", "th", "vi")
_HH = dict(
    page="https://huggingface.co/datasets/Anthropic/hh-rlhf",
    repository="Anthropic/hh-rlhf",
    revision="09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa",
)
SOURCES = {
    "advbench": Source(
        "advbench",
        "https://huggingface.co/datasets/walledai/AdvBench",
        "walledai/AdvBench",
        "9d4730540082fa4017450b65ca1c0e1d8d30446e",
    ),
    "harmbench": Source(
        "harmbench",
        "https://huggingface.co/datasets/walledai/HarmBench",
        "walledai/HarmBench",
        config="standard",
    ),
    "multijail": Source(
        "multijail",
        "https://huggingface.co/datasets/DAMO-NLP-SG/MultiJail",
        "DAMO-NLP-SG/MultiJail",
        languages=_ALL,
    ),
    "circuit-breakers": Source(
        "circuit-breakers",
        "https://github.com/GraySwanAI/circuit-breakers (data/circuit_breakers_train.json)",
    ),
    "gsm8k": Source(
        "gsm8k",
        "https://huggingface.co/datasets/openai/gsm8k",
        "openai/gsm8k",
        "e53f048856ff4f594e959d75785d2c2d37b678ee",
        "main",
    ),
    "wikipedia": Source(
        "wikipedia-{language}",
        "https://huggingface.co/datasets/wikimedia/wikipedia",
        "wikimedia/wikipedia",
        "b04c8d1ceb2f5cd4588862100d08de323dccfbaa",
        parts="20231101.{language}/train-00000-of-*.parquet",
        languages=_ALL,
    ),
    "beavertails": Source(
        "beavertails",
        "https://huggingface.co/datasets/PKU-Alignment/BeaverTails",
        "PKU-Alignment/BeaverTails",
        "8401fe609d288129cc684a9b3be6a93e41cfe678",
        split="30k_train",
    ),
    "hh-harmless": Source("hh-harmless", folder="harmless-base", **_HH),
    "hh-helpful": Source("hh-helpful", folder="helpful-base", **_HH),
}
SOURCES["beavertails, safe"] = replace(SOURCES["beavertails"], only="is_safe")

# Name of a set -> its source and the columns that may hold each part. The first column that a row has counts.
PROMPTS = {
    "paper/harmful": ("circuit-breakers", {"prompt": ("prompt",)}),
    "paper/advbench": ("advbench", {"prompt": ("goal", "prompt")}),
    "paper/harmbench": ("harmbench", {"prompt": ("Behavior", "prompt")}),
    "paper/multijail": ("multijail", {"prompt": ("{language}",)}),
    "paper/wikipedia": ("wikipedia", {"prompt": ("text",)}),
    "paper/beavertails": ("beavertails", {"prompt": ("prompt",)}),
    "paper/benign": ("hh-helpful", {"prompt": ("chosen",)}),
}
DOCUMENTS = {
    "paper/refusals": (
        "circuit-breakers",
        {"prompt": ("prompt",), "completion": ("llama3_output",)},
    ),
    "paper/compliances": ("circuit-breakers", {"prompt": ("prompt",), "completion": ("output",)}),
    "paper/arithmetic": ("gsm8k", {"prompt": ("question",), "completion": ("answer",)}),
    "paper/answers": ("beavertails, safe", {"prompt": ("prompt",), "completion": ("response",)}),
    "paper/helpful": ("hh-helpful", {"prompt": ("chosen",), "completion": ("chosen",)}),
}
PREFERENCES = {
    "paper/harmless": (
        "hh-harmless",
        {"prompt": ("chosen",), "chosen": ("chosen",), "rejected": ("rejected",)},
    ),
    "paper/helpful": (
        "hh-helpful",
        {"prompt": ("chosen",), "chosen": ("chosen",), "rejected": ("rejected",)},
    ),
}
TARGETS = {"paper/advbench": ("advbench", {"prompt": ("goal", "prompt"), "target": ("target",)})}


def load_rows(entry, split="train", language="en"):
    """One half of a set, as dicts from part to text.

    Parameters
    ----------
    entry : (str, dict)
        A value of `PROMPTS`, `DOCUMENTS`, `PREFERENCES` or `TARGETS`.
    split : str
        `train` or `test`: disjoint halves by a hash of the prompt (of the English one, where a row has several languages), so that
        nothing is asked, in whatever form, that was detected or trained on.
    language : str
        Of sets that have several.

    Raises
    ------
    SafetyNeuronError
        If the set has no such language, cannot be reached, is empty, or lacks a column.
    """
    name, parts = entry
    source = SOURCES[name]
    if language not in source.languages:
        raise SafetyNeuronError(
            f"paper/{name} has no language {language!r}: use one of {', '.join(source.languages)}"
        )
    raw = raw_rows(source, language)
    wanted = [row for row in enumerate(raw, 1) if source.only is None or _holds(name, *row)]
    found = [(row, _row(name, number, row, parts, language)) for number, row in wanted]
    usable = [
        (row, texts) for row, texts in found if all(texts.values())
    ]  # conversations of several turns and blank cells have no place here
    kept = [texts for row, texts in usable if _half(row.get("en") or texts["prompt"]) == split]
    if not kept:
        raise SafetyNeuronError(
            f"paper/{name} holds no usable row for {split}: compare its columns with {source.page}"
        )
    return kept


def _half(prompt):
    """The half of a set that a prompt belongs to, wherever it stands."""
    return ("train", "test")[hashlib.sha256(prompt.strip().encode()).digest()[0] % 2]


def _holds(name, number, row):
    """Whether a row is marked as one to take; a mark that is missing or unreadable is refused, not guessed."""
    column = SOURCES[name].only
    mark = str(row.get(column) if isinstance(row, dict) else None).lower()
    if mark not in ("true", "false"):
        raise SafetyNeuronError(
            f"paper/{name}, row {number}: {column!r} is neither true nor false: is this the right file?"
        )
    return mark == "true"


def _row(name, number, row, parts, language):
    texts = {}
    for part, columns in parts.items():
        wanted = [column.format(language=language) for column in columns]
        column = next(
            (c for c in wanted if isinstance(row, dict) and isinstance(row.get(c), str)), None
        )
        if column is None:
            raise SafetyNeuronError(
                f"paper/{name}, row {number}: no text under {' or '.join(map(repr, wanted))}: is this the right file?"
            )
        texts[part] = _part(row[column], part, column).strip()
    return texts


def _part(text, part, column):
    """One side of a dialogue of a single turn (as HH-RLHF writes them), or the beginning of an article."""
    if text.startswith("\n\nHuman:"):
        human, _, answer = text.removeprefix("\n\nHuman:").partition("\n\nAssistant:")
        single = "\n\nHuman:" not in answer
        return (human if part == "prompt" else answer) if single else ""
    return text[:TEXT] if column == "text" else text


def local_file(source, language="en"):
    """The source's file in `$SAFETYNEURON_DATA`, or None."""
    folder = os.environ.get("SAFETYNEURON_DATA")
    paths = (
        [Path(folder) / f"{source.file.format(language=language)}{ending}" for ending in ENDINGS]
        if folder
        else []
    )
    return next((path for path in paths if path.is_file()), None)


def raw_rows(source, language="en"):
    """The first rows of a source as they are: from its local file, or from the hub."""
    path = local_file(source, language)
    if path:
        return read_rows(path)[:ROWS]
    if source.repository is None:
        raise SafetyNeuronError(
            f"{source.file} is not on the hub: get it from {source.page} and put it into $SAFETYNEURON_DATA as {source.file}.json"
        )
    return _from_hub(source, language)


def _from_hub(source, language):
    """The first rows of a set on the hub, from the cache of the `datasets` library once it is there."""
    import datasets

    place = {"data_dir": source.folder, "revision": source.revision, "split": source.split}
    if source.parts:
        place["data_files"] = source.parts.format(language=language)
    try:
        rows = datasets.load_dataset(source.repository, source.config, **place)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise SafetyNeuronError(
            f"{source.repository} cannot be read ({reason}): open {source.page}, accept its terms if it asks, set HF_TOKEN;"
            f" or put the file into $SAFETYNEURON_DATA as {source.file.format(language=language)}.jsonl"
        ) from None
    return rows.select(range(min(ROWS, len(rows)))).to_list()
