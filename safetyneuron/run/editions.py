"""Editions of the book: which chapters, with which parameters; one may extend another."""

from __future__ import annotations

from pathlib import Path

import yaml

from safetyneuron.errors import SafetyNeuronError


def read_mapping(path: Path) -> dict:
    """A YAML file of names and values.

    Raises
    ------
    SafetyNeuronError
        If it cannot be read or holds something else.
    """
    try:
        mapping = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SafetyNeuronError(
            f"parameter file {path} cannot be read ({' '.join(str(error).split())}): write a YAML mapping"
        ) from None
    if not isinstance(mapping, dict):
        raise SafetyNeuronError(f"parameter file {path} holds no mapping: write lines NAME: VALUE")
    return mapping


def items_of(value) -> list:
    """The items of a parameter that is one value or a list of them."""
    return value if isinstance(value, list) else [value]


MODEL_PARAMETERS = ("models", "model_name", "families", "guard_model")


def models_in(parameters: dict) -> list[str]:
    """Names of the models that the parameters of a notebook give it."""
    named = [parameters[key] for key in MODEL_PARAMETERS if key in parameters]
    return [name for value in named for name in items_of(value)]


def read_edition(path: Path) -> dict:
    """An edition, with all that the edition it extends says and it does not.

    Raises
    ------
    SafetyNeuronError
        If a file cannot be read.
    """
    own = read_mapping(path)
    if "extends" not in own:
        return own
    base = read_edition(path.with_name(f"{own.pop('extends')}.yaml"))
    chapters = base["notebooks"]
    for name, given in own.pop("notebooks", {}).items():
        chapters[name] = chapters[name] | given
    return base | own
