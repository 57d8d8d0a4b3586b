"""The public data sets of both papers: where they are, at which revision, and what their columns mean. None of them is part of this project.

A set named `paper/…` is read from a file of `$SAFETYNEURON_DATA` if there is one, else through the `datasets` library, which downloads it once into a
cache of its own. This project keeps none of the rows. Where the authors of a set keep a part for tests, that is its test split; other sets are halved, and three of them can be asked whole.
"""

import hashlib
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from safetyneuron.data.files import read_rows
from safetyneuron.errors import SafetyNeuronError

ROWS = 20000  # read of a set, unless it is taken whole
TEXT = 600  # characters of an article, about as long as a request with its answer
ENDINGS = (".jsonl", ".json", ".csv", ".parquet")


@dataclass(frozen=True)
class Source:
    """A data set: the name of its local file, its place on the hub, and a page that says how to get it. {language} and {split} in `file` and `parts` are filled in.

    parts: the files to download, where the whole set is many times larger than what is read; only: the column that must be true in a row;
    splits: pairs of `train` or `test` and what the authors call that part; without them the part `split` is halved by a hash of the prompt;
    rows: how many are read, all with None; apart: a set of prompts, none of which is taken from this one.
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
    splits: tuple[tuple[str, str], ...] = ()
    rows: int | None = ROWS
    apart: str | None = None
    languages: tuple[str, ...] = ("en",)


_ALL = ("en", "it", "zh", "th", "vi")
_HH = dict(
    page="https://huggingface.co/datasets/Anthropic/hh-rlhf",
    repository="Anthropic/hh-rlhf",
    revision="09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa",
)
_BOTH = dict(splits=(("train", "train"), ("test", "test")), rows=None)
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
    "autodan": Source(
        "autodan",
        "https://github.com/centerforaisafety/HarmBench (the list REFERENCES of baselines/autodan/templates.py, one a row under 'prompt')",
        splits=(("test", "train"),),  # whole: nothing is ever trained on it
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
        splits=(("train", "train"),),  # whole: lm-eval asks the authors' test part
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
        "beavertails-{split}",
        "https://huggingface.co/datasets/PKU-Alignment/BeaverTails",
        "PKU-Alignment/BeaverTails",
        "8401fe609d288129cc684a9b3be6a93e41cfe678",
        splits=(("train", "30k_train"), ("test", "30k_test")),
        rows=None,
    ),
    "hh-harmless": Source("hh-harmless-{split}", folder="harmless-base", **_HH, **_BOTH),
    "hh-helpful": Source("hh-helpful-{split}", folder="helpful-base", **_HH, **_BOTH),
    "redteam": Source("redteam", folder="red-team-attempts", **_HH),
    "jailbreak-llms": Source(
        "jailbreak-llms",
        "https://huggingface.co/datasets/TrustAIRLab/forbidden_question_set",
        "TrustAIRLab/forbidden_question_set",
        "369aa8e10ee2a26cf087fdcc34af0bb928d33d8e",
        splits=(("test", "train"),),  # whole: nothing is ever trained on it
    ),
    "sharegpt": Source(
        "sharegpt",
        "https://huggingface.co/datasets/anon8231489123/ShareGPT_Vicuna_unfiltered",
        "anon8231489123/ShareGPT_Vicuna_unfiltered",
        "192ab2185289094fc556ec8ce5ce1e8e587154ca",
        parts="HTML_cleaned_raw_dataset/sg_90k_part*_html_cleaned.json",
        splits=(("train", "train"),),
        rows=None,
    ),
    "wikitext": Source(
        "wikitext",
        "https://huggingface.co/datasets/Salesforce/wikitext",
        "Salesforce/wikitext",
        "b08601e04326c79dfdd32d625aee71d232d685c3",
        "wikitext-2-raw-v1",
        splits=(("test", "test"),),
        rows=None,
    ),
}
SOURCES["beavertails, safe"] = replace(SOURCES["beavertails"], only="is_safe")
WHOLE = ("advbench", "harmbench", "multijail")  # asked whole where detection has another corpus
_ASKED = dict(splits=(("test", "train"),), apart="paper/harmful")
SOURCES |= {f"{name}, whole": replace(SOURCES[name], **_ASKED) for name in WHOLE}
# Learnt from whole, where what is asked leaves out all of it.
_LEARNT = dict(splits=(("train", "train"),))
SOURCES["circuit-breakers, whole"] = replace(SOURCES["circuit-breakers"], **_LEARNT)

# Name of a set -> its source and the columns that may hold each part. The first column that a row has counts.
PROMPTS = {
    "paper/harmful": ("circuit-breakers", {"prompt": ("prompt",)}),
    "paper/advbench": ("advbench", {"prompt": ("goal", "prompt")}),
    "paper/harmbench": ("harmbench", {"prompt": ("Behavior", "prompt")}),
    "paper/multijail": ("multijail", {"prompt": ("{language}",)}),
    "paper/wikipedia": ("wikipedia", {"prompt": ("text",)}),
    "paper/beavertails": ("beavertails", {"prompt": ("prompt",)}),
    "paper/hh-harmless": ("hh-harmless", {"prompt": ("chosen",)}),
    "paper/redteam": ("redteam", {"prompt": ("transcript",)}),
    "paper/jailbreak-llms": ("jailbreak-llms", {"prompt": ("question", "prompt")}),
    "paper/benign": ("hh-helpful", {"prompt": ("chosen",)}),
    "paper/autodan": ("autodan", {"prompt": ("prompt",)}),
}
PROMPTS |= {
    f"paper/{name}-whole": (f"{name}, whole", PROMPTS[f"paper/{name}"][1]) for name in WHOLE
}
DOCUMENTS = {
    "paper/refusals": (
        "circuit-breakers",
        {"prompt": ("prompt",), "completion": ("llama3_output",)},
    ),
    "paper/compliances": ("circuit-breakers", {"prompt": ("prompt",), "completion": ("output",)}),
    "paper/compliances-whole": (
        "circuit-breakers, whole",
        {"prompt": ("prompt",), "completion": ("output",)},
    ),
    "paper/arithmetic": ("gsm8k", {"prompt": ("question",), "completion": ("answer",)}),
    "paper/answers": ("beavertails, safe", {"prompt": ("prompt",), "completion": ("response",)}),
    "paper/helpful": ("hh-helpful", {"prompt": ("chosen",), "completion": ("chosen",)}),
    "paper/sharegpt": (
        "sharegpt",
        {"prompt": ("conversations",), "completion": ("conversations",)},
    ),
}
TEXTS = {"paper/wikitext": ("wikitext", {"text": ("text",)})}
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
TARGETS["paper/advbench-whole"] = ("advbench, whole", TARGETS["paper/advbench"][1])


def load_rows(entry, split="train", language="en"):
    """One part of a set, as dicts from part to text.

    Parameters
    ----------
    entry : (str, dict)
        A value of `PROMPTS`, `DOCUMENTS`, `PREFERENCES` or `TARGETS`.
    split : str
        `train` or `test`: the authors' parts where there are both, without what the former holds in the latter; else disjoint halves
        by a hash of the prompt (of the English one, where a row has several languages); sets named `-whole` are for tests alone,
        without what the corpus `paper/harmful` holds. So nothing is asked, in whatever form, that was detected or trained on.
    language : str
        Of sets that have several.

    Raises
    ------
    SafetyNeuronError
        If the set has no such language or part, cannot be reached, is empty, or lacks a column.
    """
    name, parts = entry
    source = SOURCES[name]
    if language not in source.languages:
        raise SafetyNeuronError(
            f"paper/{name} has no language {language!r}: use one of {', '.join(source.languages)}"
        )
    kept = _usable(entry, split, language)
    if not source.splits:
        kept = [(row, x) for row, x in kept if _half(_english(row, x)) == split]
    elif split == "test" and "train" in dict(source.splits):
        trained = {_opening(row, parts) for row in raw_rows(source, language, "train")}
        kept = [(row, x) for row, x in kept if _opening(row, parts) not in trained]
    if source.apart:
        detected = {x["prompt"] for _, x in _usable(PROMPTS[source.apart], "train", "en")}
        kept = [(row, x) for row, x in kept if _english(row, x) not in detected]
    if not kept:
        raise SafetyNeuronError(
            f"paper/{name} holds no usable row for {split}: compare its columns with {source.page}"
        )
    return [texts for _, texts in kept]


def _usable(entry, split, language):
    """Rows of a part of a set that are to be taken and have all their texts, each with these."""
    name, parts = entry
    source = SOURCES[name]
    rows = enumerate(raw_rows(source, language, split), 1)
    wanted = [row for row in rows if source.only is None or _holds(name, *row)]
    found = [(row, _row(name, number, row, parts, language)) for number, row in wanted]
    return [(row, texts) for row, texts in found if all(texts.values())]


def _opening(row, parts):
    """What a row asks first, whatever it answers and however often it goes on."""
    text = next(row[column] for column in parts["prompt"] if column in row)
    return dialogue(text)[0]["content"] if text.startswith("\n\nHuman:") else text.strip()


def load_text(name):
    """A running text, its lines joined by blank ones as it is weighed by Chen et al. (`src/ppl.py`, line 51)."""
    rows = raw_rows(SOURCES[TEXTS[name][0]], split="test")
    if not all(isinstance(row, dict) and isinstance(row.get("text"), str) for row in rows):
        raise SafetyNeuronError(f"{name} has a row without a 'text': is this the right file?")
    return "\n\n".join(row["text"] for row in rows)


def _english(row, texts):
    """The prompt of a row, by which its translations are known too."""
    return (row.get("en") or texts["prompt"]).strip()


def _half(prompt):
    """The half of a set that a prompt belongs to, wherever it stands."""
    return ("train", "test")[hashlib.sha256(prompt.encode()).digest()[0] % 2]


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
    texts, sides = {}, set(parts)
    for part, columns in parts.items():
        wanted = [column.format(language=language) for column in columns]
        kind = list if wanted == ["conversations"] else str
        column = next(
            (c for c in wanted if isinstance(row, dict) and isinstance(row.get(c), kind)), None
        )
        if column is None:
            raise SafetyNeuronError(
                f"paper/{name}, row {number}: no text under {' or '.join(map(repr, wanted))}: is this the right file?"
            )
        texts[part] = _part(row[column], part, column, "rejected" in sides)
    return texts


def _part(text, part, column, conversations):
    """One side of a dialogue, or the beginning of an article; blank where a set of single turns has no use for it."""
    if column == "conversations":
        return _first_exchange(text)[part == "completion"]
    if not text.startswith("\n\nHuman:"):
        return (text[:TEXT] if column == "text" else text).strip()
    turns = dialogue(text)
    if column == "transcript":  # of an attack: what it begins with
        return turns[0]["content"]
    if turns[-1]["role"] == "user" or len(turns) > 2 and not conversations:
        return ""
    *before, answer = turns
    return answer["content"] if part != "prompt" else before if before[1:] else before[0]["content"]


def dialogue(text):
    """The turns of a dialogue as HH-RLHF writes them: dicts with `role` and `content`."""
    pieces = re.split(r"\n\n(Human|Assistant):", text)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[who], "content": said.strip()}
        for who, said in zip(pieces[::2], pieces[1::2])
    ]


def _first_exchange(turns):
    """The first question of a conversation and its answer; blanks where it begins otherwise."""
    first = [(t.get("from"), t.get("value")) for t in turns[:2] if isinstance(t, dict)]
    asked = [who for who, said in first if isinstance(said, str)] == ["human", "gpt"]
    return tuple(said.strip() for _, said in first) if asked else ("", "")


def part_of(source, split):
    """What the authors of a set call the part that is read for a split.

    Raises
    ------
    SafetyNeuronError
        If they have none.
    """
    if not source.splits:
        return source.split
    if split not in dict(source.splits):
        has = " and ".join(dict(source.splits))
        raise SafetyNeuronError(f"{source.page} has no {split} part: it has {has}")
    return dict(source.splits)[split]


def splits_of(source):
    """The splits that a source can be read for, one of them where a file holds both."""
    return tuple(dict(source.splits)) or ("train",)


def file_of(source, language="en", split="train"):
    """The name of a source's local file, without its ending."""
    return source.file.format(language=language, split=split)


def local_file(source, language="en", split="train"):
    """The source's file in `$SAFETYNEURON_DATA`, or None."""
    folder, name = os.environ.get("SAFETYNEURON_DATA"), file_of(source, language, split)
    paths = [Path(folder) / f"{name}{ending}" for ending in ENDINGS] if folder else []
    return next((path for path in paths if path.is_file()), None)


def raw_rows(source, language="en", split="train"):
    """The first rows of a source as they are: from its local file, or from the hub."""
    part, path = part_of(source, split), local_file(source, language, split)
    if path:
        return read_rows(path)[: source.rows]
    if source.repository is None:
        raise SafetyNeuronError(
            f"{source.file} is not on the hub: get it from {source.page} and put it into $SAFETYNEURON_DATA as {source.file}.json"
        )
    return _from_hub(source, language, part, file_of(source, language, split))


def _from_hub(source, language, part, file):
    """The first rows of a set on the hub, from the cache of the `datasets` library once it is there."""
    import datasets

    place = {"data_dir": source.folder, "revision": source.revision, "split": part}
    if source.parts:
        place["data_files"] = source.parts.format(language=language)
    try:
        rows = datasets.load_dataset(source.repository, source.config, **place)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise SafetyNeuronError(
            f"{source.repository} cannot be read ({reason}): open {source.page}, accept its terms if it asks, set HF_TOKEN;"
            f" or put the file into $SAFETYNEURON_DATA as {file}.jsonl"
        ) from None
    return rows.select(range(min(source.rows or len(rows), len(rows)))).to_list()
