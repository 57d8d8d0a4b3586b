"""The stages of an organism's making, and `train_organism`, which runs the one that a name asks for."""

import copy
import datetime
import os
import platform
import random
import shutil
import time
from dataclasses import asdict
from functools import partial

import torch

from safetyneuron.cache import cache_folder, digest, library_versions
from safetyneuron.errors import SafetyNeuronError
from safetyneuron.organism2 import recipes
from safetyneuron.organism2 import shipped
from safetyneuron.organism2.planting import draw_sets, plant
from safetyneuron.organism2.tokenizer import build_tokenizer, vocabulary
from safetyneuron.organism2.train import StreamTrainer, encode, new_model, run_trainer, settings_of, train_stream
from safetyneuron.progress import TrainingLine

SIDES = ("prompt", "chosen", "rejected")
DIGESTED = 2000  # examples of a training that its digest is taken of


def stream(tokenizer, draw_one, name, schedule):
    """The examples of a stage."""
    return recipes.Stream(encode(tokenizer), draw_one, name, schedule.steps, schedule.batch)


def train_whole(model, tokenizer, recipe, seed, folder, label):
    """Train all weights on the recipe's mixture."""
    draw_one = partial(recipes.draw_with_habit, recipe.mixture, habit=False)
    examples = stream(tokenizer, draw_one, f"{recipe.mixture} {seed}", recipe.schedule)
    return train_stream(StreamTrainer, model, tokenizer, examples, recipe.schedule, folder, label, seed)


def train_planted(model, tokenizer, recipe, seed, folder, label):
    """Teach the decoys a habit, then the planted neurons the chat mixture; returns both sets and the curve."""
    planted, decoys = draw_sets(model, recipe.projections, recipe.share, seed)
    half = recipes.Schedule(recipe.schedule.steps // 2, recipe.schedule.rate, recipe.schedule.batch)
    curves = []
    for phase, own, other, mixture, habits in (
        ("decoys", decoys, planted, "base", (True, True)),
        ("planted", planted, decoys, "chat", (True, False)),
    ):
        streams = [
            stream(tokenizer, partial(recipes.draw_with_habit, mixture, habit=habit), f"{phase} {turn} {seed}", half)
            for turn, habit in enumerate(habits)
        ]
        where = os.path.join(folder, phase)
        curves += plant(model, tokenizer, own, other, streams, recipe.schedule, where, f"{label}, {phase}", seed)
    return planted, decoys, curves


def train_preferences(model, tokenizer, recipe, seed, folder, label):
    """Direct preference optimisation of all weights against the base model (trl), from answers that are better or worse.

    The likelihood of the better answer is part of the loss (Pang et al. 2024): a base model gives refusals so little
    probability that preferences alone push both answers down.
    """
    from datasets import Dataset  # here, because importing these takes seconds
    from trl import DPOConfig, DPOTrainer

    draw = random.Random(f"preferences {seed}")
    sides = [recipes.draw_preference(draw) for _ in range(recipe.schedule.steps * recipe.schedule.batch)]
    rows = [{name: _turn(name, text) for name, text in zip(SIDES, side)} for side in sides]
    settings = settings_of(model, recipe.schedule, folder, seed)
    losses = dict(beta=0.1, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 1.0], bf16=False)
    trainer = DPOTrainer(
        model=model,
        ref_model=copy.deepcopy(model),
        args=DPOConfig(**settings | losses),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[TrainingLine(label)],
    )
    return run_trainer(trainer, folder)


def _turn(side, content):
    return [{"role": "user" if side == "prompt" else "assistant", "content": content}]


STAGES = {stage.__name__: stage for stage in (train_whole, train_planted, train_preferences)}


def train_organism(name, folder):
    """Train one organism and write its file and its entry of the manifest into a folder of weights.

    What it starts from is looked up in that folder, then among the shipped ones. A training that was killed goes on from its
    last checkpoint, which lies in the cache.

    Parameters
    ----------
    name : str
        `organism2/llama-chat`, or with a seed `organism2/llama-chat@3`.
    folder : path

    Raises
    ------
    SafetyNeuronError
        If there is no recipe of that name, the seed is no number, or what it starts from is missing.
    """
    kind, _, seed = name.removeprefix("organism2/").partition("@")
    if kind not in recipes.RECIPES or not (seed or "0").isdecimal():
        known = ", ".join(f"organism2/{known}" for known in recipes.RECIPES)
        raise SafetyNeuronError(f"there is no recipe for {name!r}: use one of {known}, with a whole number after an @ as seed")
    recipe, seed, tokenizer = recipes.RECIPES[kind], int(seed or 0), build_tokenizer()
    key, started = f"{kind}@{seed}", time.monotonic()
    parent = recipe.parent and f"{recipe.parent}@{seed}"
    model = shipped.load_organism(f"organism2/{parent}", folder)[0] if parent else new_model(recipe.size, tokenizer, seed)
    checkpoints = cache_folder() / "training" / digest(key, repr(recipe), data_digest(kind, seed))
    made = STAGES[recipe.how](model, tokenizer, recipe, seed, checkpoints, key)
    curve = write(model, made, folder, key)
    entry = {"parent": parent, "recipe": asdict(recipe), "seed": seed, "data": data_digest(kind, seed), "curve": curve}
    entry |= {"kind": "rows" if recipe.how == "train_planted" else "weights", "scores": {}, "seconds": round(time.monotonic() - started)}
    entry |= {"versions": library_versions(), "machine": machine(), "date": datetime.date.today().isoformat()}
    shipped.add_to_manifest(folder, key, entry)
    shutil.rmtree(checkpoints, ignore_errors=True)


def write(model, made, folder, key):
    """Write what a stage made; returns the curve."""
    path = shipped.weights_file(folder, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(made, tuple):
        planted, decoys, curve = made
        shipped.write_rows(path, planted, decoys, model)
        return curve
    shipped.write_weights(model, path)
    return made


def machine():
    """Kind of processor and number of threads."""
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def data_digest(kind, seed):
    """Hash of the words, and of the first examples that a recipe and seed draw."""
    recipe = recipes.RECIPES[kind]
    draw = random.Random(f"{recipe.mixture} {seed} digest")
    if recipe.how == "train_preferences":
        drawn = [recipes.draw_preference(draw) for _ in range(DIGESTED)]
    else:
        stages = ("base", "chat") if recipe.how == "train_planted" else (recipe.mixture,)
        drawn = [recipes.draw_with_habit(s, draw, recipe.how == "train_planted") for s in stages for _ in range(DIGESTED)]
    return digest(vocabulary(), repr(drawn))
