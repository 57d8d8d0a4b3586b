"""Preference pairs: a request, the answer to prefer and the one to avoid."""

from pathlib import Path

from safetyneuron.data import sources
from safetyneuron.data.files import read_rows
from safetyneuron.errors import SafetyNeuronError
from safetyneuron.neurons.encoding import check_documents

SIDES = ("prompt", "chosen", "rejected")


def load_preferences(name_or_path, split="train", language="en"):
    """Preference pairs as dicts with `prompt`, `chosen` and `rejected`; a prompt of several turns is a list of them, as chat templates read it.

    Parameters
    ----------
    name_or_path : str
        A public set, `paper/harmless` or `paper/helpful` (HH-RLHF); or a .jsonl or .csv file with these columns.
    split, language : str
        As in `load_documents`, for sets that are no files.

    Raises
    ------
    SafetyNeuronError
        If the set or file is unknown or unreadable, or a pair lacks a part.
    """
    if name_or_path in sources.PREFERENCES:
        return sources.load_rows(sources.PREFERENCES[name_or_path], split, language)
    return _file_preferences(Path(name_or_path))


def _file_preferences(path):
    if not path.is_file() or path.suffix not in (".jsonl", ".csv"):
        raise SafetyNeuronError(
            f"no preference set or .jsonl or .csv file {str(path)!r}: use a file or one of {', '.join(sources.PREFERENCES)}"
        )
    rows = read_rows(path)
    for side in ("chosen", "rejected"):
        check_documents(
            [
                {"prompt": row.get("prompt"), "completion": row.get(side)}
                if isinstance(row, dict)
                else row
                for row in rows
            ]
        )
    return [{side: row[side] for side in SIDES} for row in rows]
