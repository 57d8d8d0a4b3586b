"""The answer key as files: `safetyneuron truth` makes every table, in steps that are kept, so that a killed run goes on."""

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from safetyneuron.cache import file_digest, library_versions, new_file
from safetyneuron.code import code_digest
from safetyneuron.errors import SafetyNeuronError
from safetyneuron.kept import truth
from safetyneuron.kept.truth import (
    GREEDY,
    MASK,
    NATURAL,
    OTHER_SCHOOL,
    PLANTED,
    THROUGHOUT,
    read_truth,
)
from safetyneuron.metrics.answer_key import compare_with_effects
from safetyneuron.organism import decoy_neurons, planted_neurons

KINDS = ("llama-planted", "llama-planted-attention", "llama-planted-mlp")
SEEDS = range(5)
DECIMALS = 4
PARTS = ("search", "harmful", "harmless")
# What `check_truth` computes again: cheap detectors, and how far they may differ on another machine.
CHECKED = ("control/norm", "control/benign", "exact/eq3", "cna")
TOLERANCE = {"units": 0.01, "precision": 0.02, "auc": 0.02}

Step = tuple[Callable, tuple]


def planted_names() -> list[str]:
    """Every planted organism, by kind and training."""
    return [f"organism/{kind}@{seed}" for kind in KINDS for seed in SEEDS]


def make_truth(folder: Path, cores: int = 2) -> None:
    """Compute whatever is not kept yet, several steps at once, and write all tables and their manifest.

    Parameters
    ----------
    folder : Path
        Gets a CSV and a Parquet file of every table, and `manifest.json`.
    cores : int
        Processes of one thread; with 1 the steps run in this one.
    """
    for steps in (_first_steps(), _second_steps()):
        _run(list(steps), cores)
    truth.SPENT.clear()
    folder = Path(folder)
    files = {}
    for name, make in _tables().items():
        files |= _write(folder, name, make())
    manifest = {
        "code": code_digest("safetyneuron.kept.truth", "safetyneuron.run.truth"),
        "versions": library_versions(),
        "processor minutes": _minutes(),
        "files": files,
    }
    with new_file(folder / "manifest.json") as temporary:
        temporary.write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _minutes():
    """Minutes of processor time behind everything that was read, by kind of step."""
    spent = Counter()
    for (step, _), seconds in truth.SPENT.items():
        spent[step] += seconds / 60
    return {step: round(minutes, 1) for step, minutes in spent.items()}


def _first_steps() -> Iterator[Step]:
    """What depends on nothing else: detectors first, since most tables need them, and units last, which take longest."""
    for name in dict.fromkeys([*THROUGHOUT, *planted_names(), OTHER_SCHOOL]):
        yield truth.ranks_by_detector, (name,)
    for name in dict.fromkeys([*THROUGHOUT, *planted_names()]):
        yield truth.mask_of, (name,)
    for name in THROUGHOUT:
        for half in (0, 1):
            yield truth.ranks_by_detector, (name, None, half)
    for ablation in truth.ABLATIONS:
        for name in THROUGHOUT:
            for layer in sorted({layer for _, layer, _ in truth.units_of(name)}):
                units = [unit for unit in truth.units_of(name) if unit[1] == layer]
                yield truth.effects_of_layer, (name, ablation, units)


def _second_steps() -> Iterator[Step]:
    """What needs effects, ranks and masks."""
    for name in THROUGHOUT:
        yield truth.backups_of, (name,)
        yield truth.classes_of_units, (name,)
        for method in (GREEDY, MASK, *truth.DETECTORS):
            yield truth.breaking_set, (name, method)
        yield truth.sums_of, (name,)


def _run(steps: Sequence[Step], cores: int) -> None:
    """Do all steps, and say after each how many are done."""
    started = time.monotonic()

    def say(number, step):
        name = " ".join(str(part) for part in step[1] if isinstance(part, (str, int)))
        minutes = (time.monotonic() - started) / 60
        print(
            f"{number} of {len(steps)}: {step[0].__name__} {name}, {minutes:.1f} minutes",
            flush=True,
        )

    if cores == 1:
        for number, step in enumerate(steps, 1):
            step[0](*step[1])
            say(number, step)
        return
    with ProcessPoolExecutor(cores, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        waiting = {pool.submit(step[0], *step[1]): step for step in steps}
        for number, done in enumerate(as_completed(waiting), 1):
            done.result()
            say(number, waiting[done])


def check_truth(
    folder: Path = truth.FOLDER,
    kind: str = KINDS[0],
    training: int = 0,
    detectors: Sequence[str] = CHECKED,
    count: int = 50,
) -> dict[str, float]:
    """Compute a part of the tables again: some detectors on one planted model, and some units of the natural one.

    Returns
    -------
    dict of str to float
        Largest difference from the tables by what was computed: `units`, in nats, and precision and AUC of the detectors.

    Raises
    ------
    SafetyNeuronError
        If a table is damaged, or one differs by more than `TOLERANCE`.
    """
    table = read_truth(f"units-{_short(NATURAL)}", folder)
    chosen = table.loc[sorted(random.Random(training).sample(range(len(table)), count))]
    units = list(chosen[["kind", "layer", "channel"]].itertuples(index=False, name=None))
    found = {"units": 0.0}
    for ablation in truth.ABLATIONS:
        again = truth.effects_of_units(NATURAL, ablation, units).set_index(
            ["kind", "layer", "channel"]
        )
        columns = [f"{ablation} {column}" for column in again.columns]
        found["units"] = max(
            found["units"],
            float(np.abs(again.loc[units].to_numpy() - chosen[columns].to_numpy()).max()),
        )
    rows = planted_rows(f"organism/{kind}@{training}", detectors)
    kept = read_truth("planted", folder)
    kept = kept[(kept["kind"] == kind) & (kept["training"] == training)].set_index("detector")
    for measure in ("precision", "auc"):
        found[measure] = max(abs(row[measure] - kept.loc[row["detector"], measure]) for row in rows)
    if wrong := {key: value for key, value in found.items() if value > TOLERANCE[key]}:
        raise SafetyNeuronError(
            f"the answer key in {folder} differs from what the code computes, by {wrong}: make it again with `safetyneuron truth`"
        )
    return found


def _write(folder, name, table):
    """CSV and Parquet of a table, and what the manifest says of them."""
    folder.mkdir(parents=True, exist_ok=True)
    table, said = table.round(DECIMALS), {}
    for ending, write in (
        ("csv", lambda path: table.to_csv(path, index=False)),
        ("parquet", lambda path: table.to_parquet(path, index=False)),
    ):
        path = folder / f"{name}.{ending}"
        with new_file(path) as temporary:
            write(temporary)
        said[path.name] = {"sha256": file_digest(path), "rows": len(table)}
    return said


def _flags(name):
    """Which units of a planted model are planted, and which are decoys: two boolean arrays."""
    return tuple(
        np.array(
            [bool(kinds[kind][layer, channel]) for kind, layer, channel in truth.units_of(name)]
        )
        for kinds in (planted_neurons(name).units().kinds, decoy_neurons(name).units().kinds)
    )


def _ranked(name):
    """Every detector's ranks of the units of a model, and the mask's."""
    return truth.ranks_by_detector(name) | {MASK: truth.mask_of(name)}


def planted_table() -> pd.DataFrame:
    """Every detector on every planted model: how well it ranks what was planted."""
    return pd.DataFrame([row for name in planted_names() for row in planted_rows(name)])


def planted_rows(name: str, detectors: Sequence[str] | None = None) -> list[dict]:
    """The rows of one planted model; of all detectors and the mask, or of some detectors."""
    kind, _, training = _short(name).partition("@")
    ranked = _ranked(name) if detectors is None else truth.ranks_by_detector(name, detectors)
    return [
        {"kind": kind, "training": int(training), "detector": detector}
        | found["judged"]
        | {key: found.get(key) for key in ("seconds", "passes")}
        for detector, found in ranked.items()
    ]


def units_table(name: str) -> pd.DataFrame:
    """What every unit of a model does alone, and what it is in a planted one."""
    table = pd.DataFrame(truth.units_of(name), columns=["kind", "layer", "channel"])
    if name == PLANTED:
        planted, decoys = _flags(name)
        table["group"] = np.select([planted, decoys], ["planted", "decoy"], "other")
    for ablation in truth.ABLATIONS:
        effects = truth.effects_of_units(name, ablation)
        for part in PARTS:
            for side in ("refusal", "help"):
                table[f"{ablation} {part} {side}"] = effects[f"{part} {side}"]
    return table


def ranks_table(name: str) -> pd.DataFrame:
    """Every detector's rank of every unit of a model."""
    table = pd.DataFrame(truth.units_of(name), columns=["kind", "layer", "channel"])
    ranks = {key: found["ranks"] for key, found in _ranked(name).items()}
    return pd.concat([table, pd.DataFrame(ranks)], axis=1)


def agreement_table() -> pd.DataFrame:
    """How every detector's ranks agree with what units do end to end, and how one ablation agrees with itself and the other."""
    rows = []
    for name in THROUGHOUT:
        ranked = {key: -np.array(found["ranks"]) for key, found in _ranked(name).items()}
        effects = {a: truth.effects_of_units(name, a) for a in truth.ABLATIONS}
        ranked |= {
            f"{a} on other requests": -truth.log_odds_changes(effects[a], "search") for a in effects
        }
        for ablation, table in effects.items():
            support = -truth.log_odds_changes(table, "harmful")
            for detector, scores in ranked.items():
                row = {"model": name, "ablation": ablation, "detector": detector}
                rows.append(row | compare_with_effects(scores, support))
    return pd.DataFrame(rows)


def classes_table() -> pd.DataFrame:
    """What models answer without one unit."""
    rows = []
    for name in THROUGHOUT:
        for row in truth.classes_of_units(name):
            unit = dict(zip(("kind", "layer", "channel"), row.pop("unit")))
            rows.append({"model": name} | unit | row)
    return pd.DataFrame(rows)


def _described(name, found):
    """A set of units for a table: how many, which, and how many of them are planted or decoys."""
    units = found["units"]
    row = {"units": None if units is None else len(units)}
    if units and name == PLANTED:
        places = {tuple(unit): i for i, unit in enumerate(truth.units_of(name))}
        inside = [places[tuple(unit)] for unit in units]
        row |= {g: int(f[inside].sum()) for g, f in zip(("planted", "decoys"), _flags(name))}
    listed = " ".join(f"{kind}.{layer}.{channel}" for kind, layer, channel in units or ())
    shares = {key: value for key, value in found.items() if key != "units"}
    return row | shares | {"which": listed}


def breaking_table() -> pd.DataFrame:
    """The units that every method needs to break refusal."""
    return pd.DataFrame(
        {"model": name, "method": method} | _described(name, truth.breaking_set(name, method))
        for name in THROUGHOUT
        for method in (GREEDY, MASK, *truth.DETECTORS)
    )


def backups_table() -> pd.DataFrame:
    """Breaking sets that share no unit, in the order in which they were found."""
    return pd.DataFrame(
        {"model": name, "round": number} | _described(name, found)
        for name in THROUGHOUT
        for number, found in enumerate(truth.backups_of(name), 1)
    )


def sums_table() -> pd.DataFrame:
    """Effects of sets against the sum of what their units do alone."""
    return pd.concat([truth.sums_of(name).assign(model=name) for name in THROUGHOUT])


def stability_table() -> pd.DataFrame:
    """How far a detector finds the same units again: with the other half of the prompts, and after another alignment of the same base."""
    rows = []
    twice = {
        (name, "halves of the prompts"): [truth.ranks_by_detector(name, None, h) for h in (0, 1)]
        for name in THROUGHOUT
    }
    twice[NATURAL, "schools of alignment"] = [
        truth.ranks_by_detector(name) for name in (NATURAL, OTHER_SCHOOL)
    ]
    for (name, over), (first, second) in twice.items():
        for key in truth.DETECTORS:
            scores = [-np.array(found[key]["ranks"]) for found in (first, second)]
            found = compare_with_effects(*scores)
            row = {"model": name, "over": over, "detector": key}
            rows.append(row | {"spearman": found["spearman"], "shared": found["recall"]})
    return pd.DataFrame(rows)


def _short(name):
    return name.removeprefix("organism/")


def _tables() -> dict[str, Callable[[], pd.DataFrame]]:
    """Name of each table, and what makes it."""
    return (
        {"planted": planted_table}
        | {f"units-{_short(name)}": partial(units_table, name) for name in THROUGHOUT}
        | {f"ranks-{_short(name)}": partial(ranks_table, name) for name in THROUGHOUT}
        | {
            "agreement": agreement_table,
            "classes": classes_table,
            "breaking": breaking_table,
            "backups": backups_table,
            "sums": sums_table,
            "stability": stability_table,
        }
    )
