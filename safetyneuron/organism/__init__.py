"""The organism: a small chat model that this project trains itself, on a generated language."""

import json

import torch
import transformers

from safetyneuron.cache import cache_folder, digest, kept_folder, source_digest
from safetyneuron.errors import SafetyNeuronError
from safetyneuron.organism.train import Recipe, train_stage

RECIPES = {
    "llama": Recipe(),
    "mistral": Recipe(family="mistral", groups=2, window=16, chat_steps=110),  # weakly aligned, as Mistral-Instruct is
    "qwen": Recipe(family="qwen2", groups=2),
}
STAGES = ("base", "chat")
NAMES = tuple(f"organism/{family}-{stage}" for family in RECIPES for stage in STAGES)


def organism_folder(name):
    """Folder of a trained organism, training it (and its base) first if the cache does not hold it.

    Raises
    ------
    SafetyNeuronError
        If there is no organism of that name.
    """
    if name not in NAMES:
        raise SafetyNeuronError(f"no organism is called {name!r}: use one of {', '.join(NAMES)}")
    family, stage = name.removeprefix("organism/").rsplit("-", 1)
    recipe = RECIPES[family]
    key = digest(source_digest(__path__[0]), repr(recipe), torch.__version__, transformers.__version__)
    folder = cache_folder() / "organism" / f"{key}-{family}-{stage}"

    def train(temporary):
        base = organism_folder(f"organism/{family}-base") if stage == "chat" else None
        train_stage(stage, recipe, temporary, base)

    return kept_folder(folder, train)


def training_curve(name):
    """Loss during the training of an organism: a list of {step, loss}."""
    return json.loads((organism_folder(name) / "curve.json").read_text())
