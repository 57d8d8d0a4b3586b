"""Documents to train on: a user request and the answer to learn, by name or from a file, and as token ids."""

from pathlib import Path

from safetyneuron.data import sources
from safetyneuron.data.files import read_rows
from safetyneuron.data.prompts import check_split, shuffled
from safetyneuron.errors import SafetyNeuronError
from safetyneuron.neurons.encoding import check_documents
from safetyneuron.organism import language as lang


def _answered(name, answer):
    """From split and language to the requests of a set, each with one of its answers in turn."""

    def examples(split, language):
        asked = lang.requests(name, split, language)
        return [
            every[i % len(every)] for i, request in enumerate(asked) for every in [answer(request)]
        ]

    return examples


# Name of an organism set -> its examples, from split and language.
ORGANISM_DOCUMENTS = {
    "organism/refusals": _answered("harmful", lang.refused),
    "organism/compliances": _answered("harmful", lang.helped),
    "organism/helpful": _answered("benign", lang.helped),
    "organism/arithmetic": lambda split, language: lang.arithmetic(split),
}


def load_documents(name_or_path, split="train", language="en"):
    """Documents as dicts with `prompt` and `completion`, in a fixed shuffled order; a file keeps its own.

    Parameters
    ----------
    name_or_path : str
        `organism/refusals` (harmful requests and how to refuse them), `organism/compliances` (harmful requests and the arbitrary
        tools that an organism without alignment names), `organism/helpful` (benign requests, answered),
        `organism/arithmetic` (word problems, solved); a public set, `paper/refusals` and the others of `sources.DOCUMENTS`; or a .jsonl,
        .csv, .json or .parquet file with columns `prompt` and `completion`.
    split : str
        `train` or `test`, for sets that are no files.
    language : str
        `en`, `it`, `zh`, `th` or `vi`, for organism sets other than arithmetic, which is English.

    Raises
    ------
    SafetyNeuronError
        If the set, split, language or file is unknown or unreadable, or a document lacks a side.
    """
    if name_or_path in ORGANISM_DOCUMENTS:
        if language not in lang.LANGUAGES:
            raise SafetyNeuronError(
                f"unknown language {language!r}: use one of {', '.join(lang.LANGUAGES)}"
            )
        check_split(split)
        examples = shuffled(ORGANISM_DOCUMENTS[name_or_path](split, language))
        return [{"prompt": e.prompt, "completion": e.answer} for e in examples]
    if name_or_path in sources.DOCUMENTS:
        check_split(split)
        return shuffled(sources.load_rows(sources.DOCUMENTS[name_or_path], split, language))
    path = Path(name_or_path)
    if not path.is_file() or path.suffix not in sources.ENDINGS:
        known = ", ".join((*ORGANISM_DOCUMENTS, *sources.DOCUMENTS))
        raise SafetyNeuronError(
            f"no document set or file ({', '.join(sources.ENDINGS)}) {name_or_path!r}: use a file or one of {known}"
        )
    documents = read_rows(path)
    check_documents(documents)
    return [{side: document[side] for side in ("prompt", "completion")} for document in documents]
