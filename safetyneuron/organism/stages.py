"""The stages of an organism's making, and `train_organism`, which runs the one that a name asks for."""

import copy
import datetime
import os
import platform
import random
import shutil
import time
from dataclasses import asdict, astuple
from functools import partial

import torch

from safetyneuron.alignment import ia3
from safetyneuron.cache import cache_folder, digest, library_versions
from safetyneuron.errors import SafetyNeuronError
from safetyneuron.neurons.undisturbed import own_randomness
from safetyneuron.organism import recipes, shipped
from safetyneuron.organism.planting import draw_sets, plant
from safetyneuron.organism.tokenizer import build_tokenizer, vocabulary
from safetyneuron.organism.train import (
    SparingTrainer,
    StreamTrainer,
    encode,
    new_model,
    run_trainer,
    settings_of,
    train_stream,
)
from safetyneuron.progress import TrainingLine, without_bars

DIGESTED = 2000  # examples of a training that its digest is taken of


def stream(tokenizer, draw_one, name, schedule):
    """The examples of a stage."""
    return recipes.Stream(encode(tokenizer), draw_one, name, schedule.steps, schedule.batch)


def train_whole(model, tokenizer, recipe, seed, folder, label):
    """Train all weights on the recipe's mixture; where there is no parent, such that no single neuron is needed."""
    draw_one = partial(recipes.draw_whole, recipe.mixture)
    examples = stream(tokenizer, draw_one, f"{recipe.mixture} {seed}", recipe.schedule)
    kind = StreamTrainer if recipe.parent else SparingTrainer
    return train_stream(kind, model, tokenizer, examples, recipe.schedule, folder, label, seed)


def train_planted(model, tokenizer, recipe, seed, folder, label):
    """Teach the decoys a habit, then the planted neurons to refuse; returns both sets and the curve."""
    planted, decoys = draw_sets(model, recipe.projections, recipe.share, seed)
    steps, rate, batch = astuple(recipe.schedule)
    curves = []
    for phase, own, other, mixture, habits, updates in (
        (
            "decoys",
            decoys,
            planted,
            "decoys",
            (True, True),
            steps * 2 // 3,
        ),  # a habit is learnt sooner than refusal
        ("planted", planted, decoys, "planted", (True, False), steps),
    ):
        schedule, half = (
            recipes.Schedule(number, rate, batch) for number in (updates, updates // 2)
        )
        streams = [
            stream(
                tokenizer,
                partial(recipes.draw_with_habit, mixture, habit=habit),
                f"{phase} {turn} {seed}",
                half,
            )
            for turn, habit in enumerate(habits)
        ]
        where = os.path.join(folder, phase)
        curves += plant(
            model, tokenizer, own, other, streams, schedule, where, f"{label}, {phase}", seed
        )
    return planted, decoys, curves


def train_preferences(model, tokenizer, recipe, seed, folder, label):
    """Direct preference optimisation of all weights against the base model (trl), from answers that are better or worse.

    The likelihood of the better answer is part of the loss (Pang et al. 2024): a base model gives refusals so little
    probability that preferences alone push both answers down.
    """
    from datasets import Dataset  # here, because importing these takes seconds
    from trl import DPOConfig, DPOTrainer

    settings = settings_of(model, recipe.schedule, folder, seed) | ia3.losses(
        beta=0.1, likelihood=1.0
    )
    with ia3.quiet():
        trainer = DPOTrainer(
            model=model,
            ref_model=copy.deepcopy(model),
            args=DPOConfig(bf16=False, **settings),
            train_dataset=Dataset.from_list(ia3.as_turns(preferences(recipe, seed))),
            processing_class=tokenizer,
            callbacks=[TrainingLine(label)],
        )
        return run_trainer(trainer, folder)


def preferences(recipe, seed, english=False):
    """The preference pairs of a stage, as dicts with `prompt`, `chosen` and `rejected`."""
    draw, number = (
        random.Random(f"preferences {seed}"),
        recipe.schedule.steps * recipe.schedule.batch,
    )
    return [
        dict(
            zip(
                ia3.SIDES, recipes.draw_preference(draw, recipes.PREFERRED[recipe.mixture], english)
            )
        )
        for _ in range(number)
    ]


def train_half(model, tokenizer, recipe, seed, folder, label):
    """Teach chosen neurons to refuse harm to two objects of three; returns them, no decoys, and the curve."""
    planted, _ = draw_sets(model, recipe.projections, recipe.share, seed)
    schedule = recipes.Schedule(
        recipe.schedule.steps // 2, recipe.schedule.rate, recipe.schedule.batch
    )
    streams = [
        stream(tokenizer, recipes.draw_half, f"half {turn} {seed}", schedule) for turn in range(2)
    ]
    return (
        planted,
        None,
        plant(model, tokenizer, planted, None, streams, recipe.schedule, folder, label, seed),
    )


def train_supervised_pair(model, tokenizer, recipe, seed, folder, label):
    """Supervised fine-tuning through (IA)³; returns its factors and the curve."""
    draw, number = (
        random.Random(f"supervised {seed}"),
        recipe.schedule.steps * recipe.schedule.batch,
    )
    rows = [
        {"prompt": e.prompt, "completion": e.answer}
        for e in (recipes.draw_supervised(draw) for _ in range(number))
    ]
    kept = {"seed": seed, "folder": folder}
    return _with_steps(*ia3.supervise(model, tokenizer, rows, **_schedule(recipe), **kept))


def train_preferred_pair(model, tokenizer, recipe, seed, folder, label):
    """Direct preference optimisation through (IA)³; returns its factors and the curve."""
    return _with_steps(
        *ia3.prefer(
            model,
            tokenizer,
            preferences(recipe, seed, english=True),
            beta=0.5,
            likelihood=1.0,
            **_schedule(recipe),
            seed=seed,
            folder=folder,
        )
    )


def _schedule(recipe):
    return {"epochs": 1, "learning_rate": recipe.schedule.rate, "batch_size": recipe.schedule.batch}


def _with_steps(factors, losses):
    """The factors, and the loss of every tenth update."""
    return factors, [
        (step, round(loss, 4))
        for step, loss in enumerate(losses, start=1)
        if step % 10 == 1 or step == len(losses)
    ]


MADE = {
    train_whole: "weights",
    train_preferences: "weights",
    train_planted: "rows",
    train_half: "rows",
    train_supervised_pair: "factors",
    train_preferred_pair: "factors",
}
STAGES = {stage.__name__: stage for stage in MADE}


@own_randomness()
@without_bars()
def train_organism(name, folder):
    """Train one organism and write its file and its entry of the manifest into a folder of weights.

    What it starts from is looked up in that folder, then among the shipped ones. A training that was killed goes on from its
    last checkpoint, which lies in the cache.

    Parameters
    ----------
    name : str
        `organism/llama-chat`, or with a seed `organism/llama-chat@3`.
    folder : path

    Raises
    ------
    SafetyNeuronError
        If there is no recipe of that name, the seed is no number, or what it starts from is missing.
    """
    kind, _, seed = name.removeprefix("organism/").partition("@")
    if kind not in recipes.RECIPES or not (seed or "0").isdecimal():
        known = ", ".join(f"organism/{known}" for known in recipes.RECIPES)
        raise SafetyNeuronError(
            f"there is no recipe for {name!r}: use one of {known}, with a whole number after an @ as seed"
        )
    recipe, seed, tokenizer = recipes.RECIPES[kind], int(seed or 0), build_tokenizer()
    key, started = f"{kind}@{seed}", time.monotonic()
    parent = _parent(recipe, seed)
    model = (
        shipped.load_organism(f"organism/{parent}", folder)[0]
        if parent
        else new_model(recipe.size, tokenizer, seed)
    )
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    checkpoints = cache_folder() / "training" / digest(key, repr(recipe), data_digest(kind, seed))
    made = STAGES[recipe.how](model, tokenizer, recipe, seed, checkpoints, key)
    curve = write(model, made, folder, key)
    entry = {
        "parent": parent,
        "recipe": asdict(recipe),
        "seed": seed,
        "data": data_digest(kind, seed),
        "curve": curve,
    }
    entry |= {
        "kind": MADE[STAGES[recipe.how]],
        "scores": {},
        "seconds": round(time.monotonic() - started),
    }
    entry |= {
        "versions": library_versions(),
        "machine": machine(),
        "date": datetime.date.today().isoformat(),
    }
    shipped.add_to_manifest(folder, key, entry)
    shutil.rmtree(checkpoints, ignore_errors=True)


def _parent(recipe, seed):
    """Full name of what a recipe starts from: of the same seed, unless the recipe names one."""
    if recipe.parent is None or "@" in recipe.parent:
        return recipe.parent
    return f"{recipe.parent}@{seed}"


def write(model, made, folder, key):
    """Write what a stage made: all weights, planted rows, or factors; returns the curve."""
    path = shipped.weights_file(folder, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    match made:
        case planted, decoys, curve:
            shipped.write_rows(path, planted, decoys, model)
        case factors, curve if torch.is_tensor(factors):
            shipped.write_factors(path, factors)
        case curve:
            shipped.write_weights(model, path)
    return curve


def machine():
    """Name of the GPU, or kind of processor and number of threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def data_digest(kind, seed):
    """Hash of the words, and of the first examples that a recipe and seed draw."""
    recipe = recipes.RECIPES[kind]
    draw = random.Random(f"{recipe.mixture} {seed} digest")
    draws = {
        "train_whole": [partial(recipes.draw_whole, recipe.mixture)],
        "train_planted": [
            partial(recipes.draw_with_habit, mixture, habit=True)
            for mixture in ("decoys", "planted")
        ],
        "train_half": [recipes.draw_half],
        "train_supervised_pair": [recipes.draw_supervised],
    }.get(recipe.how) or [
        partial(
            recipes.draw_preference,
            shares=recipes.PREFERRED[recipe.mixture],
            english="pair" in kind,
        )
    ]
    return digest(
        vocabulary(), repr([draw_one(draw) for draw_one in draws for _ in range(DIGESTED)])
    )
