"""The answer key: what every functional unit does alone, and what every detector finds of what was planted, computed once and kept."""

import functools
import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from safetyneuron.cache import digest, file_digest, remember
from safetyneuron.data.prompts import load_prompts
from safetyneuron.detectors.detect import Detection, Detector, find
from safetyneuron.detectors.effects import (
    Unit,
    all_units,
    classes_without,
    compare_sums,
    measure_effects,
    units_named,
)
from safetyneuron.detectors.league import judge
from safetyneuron.detectors.mask import Row, help_rows, learn_mask
from safetyneuron.detectors.search import (
    breaks_refusal,
    find_backups,
    greedy_units,
    shortest_breaking,
    without_spare,
)
from safetyneuron.detectors.table import DETECTORS
from safetyneuron.errors import SafetyNeuronError
from safetyneuron.metrics.log_odds import Pair, choose_pairs, document_rows
from safetyneuron.models import load_model
from safetyneuron.neurons.activations import channel_means
from safetyneuron.neurons.identity import identity
from safetyneuron.neurons.sets import UNIT_KINDS
from safetyneuron.organism import decoy_neurons, planted_neurons
from safetyneuron.organism import language as lang

NATURAL, PLANTED = "organism/llama-chat", "organism/llama-planted"
THROUGHOUT = (NATURAL, PLANTED)  # the models that are measured unit by unit
OTHER_SCHOOL = "organism/llama-dpo"  # the same base as the natural model, aligned by preferences
ABLATIONS, MASK, GREEDY = ("zero", "mean"), "mask", "greedy"
DATA = Detection(
    *(f"organism/{name}" for name in ("harmful", "general", "benign", "refusals", "helpful"))
)
UPDATES, PENALTY = 200, 0.02  # of masks
ROWS_OF_MASKS, QUESTIONS = {"harmful": 100, "benign": 75, "lookalike": 25}, 50  # of each task
CANDIDATES = 64  # units of largest effect, among which greedy search chooses
LIMIT = 512  # units that a detector may need to break refusal
CLASSED = 100  # units of largest effect whose answers are read, and as many random ones
TOP = 40  # units, about one in a hundred, of sets that are compared with the sum of single effects
FOLDER = Path(__file__).parent.parent / "truth"  # where the finished tables are shipped
SPENT: dict = {}  # (step, key) -> seconds of processor time behind what was read so far
_PACKAGE, LOG_ODDS = "safetyneuron.detectors", "safetyneuron.metrics.log_odds"

load = functools.lru_cache(maxsize=3)(load_model)


def units_of(name: str) -> list[Unit]:
    """Every functional unit of a model, in the order of all numbers here."""
    return all_units(load(name)[0])


@functools.cache
def _identity(name, module):
    """`identity` of a model that nothing has changed, read once."""
    return identity(*load(name), module)


def _key(name, module, parts):
    return [_identity(name, module), parts]


def _kept(name, module, parts, compute):
    """What `compute()` gives for a model, made once; the processor time that this took goes into `SPENT`."""

    def make():
        started = time.process_time()
        return {"result": compute(), "seconds": time.process_time() - started}

    key = _key(name, f"{_PACKAGE}.{module}", parts)
    entry = remember("truth", key, make)
    SPENT[parts[0], digest(key)] = entry["seconds"]
    return entry["result"]


def asked_of_units() -> dict[str, list[str]]:
    """Requests by part: harmful ones to search by, others to score by, and harmless ones."""
    return {
        "search": load_prompts("organism/harmful", split="train")[:50],
        "harmful": load_prompts("organism/harmful")[:50],
        "harmless": load_prompts("organism/benign")[:100],
    }


def pairs_of(name: str, prompts: Sequence[str]) -> list[Pair]:
    """The two answers that are weighed for each request, fixed on the whole model."""

    def choose():
        return [asdict(pair) for pair in choose_pairs(*load(name), prompts)]

    return [
        Pair(**pair) for pair in remember("truth", _key(name, LOG_ODDS, ["pairs", prompts]), choose)
    ]


def effects_of_units(name: str, ablation: str, units: Sequence[Unit] | None = None) -> pd.DataFrame:
    """`measure_effects` of every functional unit of a model alone, kept layer by layer.

    Parameters
    ----------
    ablation : str
        `zero`, or `mean`: the mean over the tokens of the requests.
    units : list of (kind, layer, channel), optional
        Only these.
    """
    units = units_of(name) if units is None else units
    layers = sorted({layer for _, layer, _ in units})
    tables = [effects_of_layer(name, ablation, [u for u in units if u[1] == l]) for l in layers]
    return pd.concat(tables, ignore_index=True)


def effects_of_layer(name: str, ablation: str, units: Sequence[Unit]) -> pd.DataFrame:
    """The part of `effects_of_units` that is kept as one."""
    model, tokenizer = load(name)
    parts = asked_of_units()

    def measure():
        asked = [prompt for some in parts.values() for prompt in some]
        means = channel_means(model, tokenizer, asked) if ablation == "mean" else None
        pairs = {part: pairs_of(name, prompts) for part, prompts in parts.items()}
        return measure_effects(model, tokenizer, pairs, units, means).to_dict("list")

    found = _kept(name, "effects", ["effects", parts, ablation, units], measure)
    return pd.DataFrame(found)


def log_odds_changes(effects: pd.DataFrame, part: str) -> np.ndarray:
    """Change in the mean log odds of refusing the requests of a part, by unit, in nats; of a shipped table a part is `zero harmful` and the like."""
    return (effects[f"{part} refusal"] - effects[f"{part} help"]).to_numpy()


def ranks_by_detector(
    name: str, keys: Sequence[str] | None = None, half: int | None = None
) -> dict[str, dict]:
    """How every detector ranks the units of a model.

    Parameters
    ----------
    keys : sequence of str, optional
        Of `DETECTORS`; all by default.
    half : int, optional
        Only every second prompt, from the first (0) or the second (1).

    Returns
    -------
    dict of str to dict
        `ranks` (average rank of every unit, 1 for the highest; a unit's score is the highest of its rows and columns),
        `seconds`, `passes`, and for planted models what `judge` says under `judged`.
    """
    model, tokenizer = load(name)
    seed = name.partition("@")[2] or "0"
    base = load(f"organism/llama-base@{seed}")[0]
    case = DATA.case(model, tokenizer, base, lang.LANGUAGES)
    if half is not None:
        case = _half_of(case, half)
    found = {}
    for key in DETECTORS if keys is None else keys:

        def rank(key=key):
            detector = find(DETECTORS[key], case, key)
            cost = {"seconds": detector.seconds, "passes": detector.passes}
            return _said_by(name, detector) | cost

        found[key] = _kept(name, "league", ["detectors", asdict(DATA), key, half], rank)
    return found


def _half_of(case, half):
    """The case with every second prompt of each kind."""
    fields = ("harmful", "benign", "general", "refusals", "helpful")
    parts = {field: getattr(case, field)[half::2] for field in fields}
    languages = {x: (h[half::2], b[half::2]) for x, (h, b) in case.languages.items()}
    return replace(case, **parts, languages=languages, saved=0.0, _kept={})


def _said_by(name, detector):
    """Average ranks of the units of a model, and how well they find what was planted into it, if anything was."""
    ranking, units = detector.ranking, units_of(name)
    flat = np.array([float(ranking[kind][layer, channel]) for kind, layer, channel in units])
    said = {"ranks": rankdata(-flat, "average").tolist()}
    if not name.startswith(PLANTED):
        return said
    return said | {"judged": judge(detector, planted_neurons(name), decoy_neurons(name))}


def mask_rows(name: str) -> tuple[list[Row], list[Row]]:
    """Answers that a mask makes likely, and those that it keeps: help with harm; help with all else, and answers to questions."""
    asked = {
        kind: load_prompts(f"organism/{kind}", split="train")[:count]
        for kind, count in ROWS_OF_MASKS.items()
    }
    draw = random.Random(0)
    questions = [
        {"prompt": example.prompt, "completion": example.answer}
        for task in lang.TASKS.values()
        for example in draw.sample(task("train"), QUESTIONS)
    ]
    harmless = pairs_of(name, asked["benign"] + asked["lookalike"])
    raised = help_rows(pairs_of(name, asked["harmful"]))
    return raised, help_rows(harmless) + document_rows(*load(name), questions)


def mask_of(name: str) -> dict:
    """How a learned mask ranks the units of a model, as in `ranks_by_detector`, and `closed`, how many gates it closes."""
    model, tokenizer = load(name)

    def learn():
        scores = learn_mask(model, tokenizer, *mask_rows(name), UPDATES, PENALTY)
        closed = sum(int((values > 0).sum()) for values in scores.values())
        of_rows = {p: values for kind, values in scores.items() for p in UNIT_KINDS[kind]}
        return _said_by(name, Detector(of_rows)) | {"closed": closed}

    return _kept(name, "mask", [MASK, UPDATES, PENALTY, ROWS_OF_MASKS, QUESTIONS], learn)


def in_order(name: str, ranks: Sequence[float], count: int) -> list[Unit]:
    """The units of the highest ranks, the highest first."""
    units = units_of(name)
    return [units[i] for i in np.argsort(ranks, kind="stable")[:count]]


def asked_of_searches() -> tuple[list[str], list[str]]:
    """Harmful and harmless requests on which sets must break refusal, and nothing else."""
    return tuple(
        load_prompts(f"organism/{name}", split="train")[:50] for name in ("harmful", "benign")
    )


def breaking_set(name: str, method: str) -> dict:
    """The units that a method needs to break refusal, and what a model without them answers to other requests.

    Parameters
    ----------
    method : str
        Key of a detector, whose highest units are taken until it breaks; `mask`, the same without what it can spare;
        `greedy`, over end-to-end effects.

    Returns
    -------
    dict
        `units` (None where `LIMIT` of them do not break it), and shares of answers by class on harmful and harmless requests.
    """

    def search():
        units = _search(name, method)
        return {"units": units} | (answers_without(name, units) if units else {})

    modules = "search" if method in (MASK, GREEDY) else "league"
    return _kept(name, modules, ["breaking", method, LIMIT, CANDIDATES], search)


def _search(name, method):
    breaks = breaks_refusal(*load(name), *asked_of_searches())
    if method == GREEDY:
        return _greedy(name, breaks)
    ranks = mask_of(name) if method == MASK else ranks_by_detector(name, [method])[method]
    units = shortest_breaking(in_order(name, ranks["ranks"], LIMIT), breaks)
    return without_spare(units, breaks) if units and method == MASK else units


def _greedy(name, breaks):
    model, tokenizer = load(name)
    support = log_odds_changes(effects_of_units(name, "zero"), "search")
    candidates = in_order(name, support, CANDIDATES)
    pairs = [pairs_of(name, prompts[:25]) for prompts in asked_of_searches()]
    units = greedy_units(model, tokenizer, candidates, *pairs, breaks)
    return units and without_spare(units, breaks)


def answers_without(name: str, units: Sequence[Unit]) -> dict[str, float]:
    """Shares of the answers without some units: part and class to share, on requests that no search saw."""
    parts = asked_of_units()
    return {
        f"{part} {kind}": share
        for part in ("harmful", "harmless")
        for kind, share in classes_without(*load(name), parts[part][:50], units).items()
    }


def backups_of(name: str) -> list[dict]:
    """Breaking sets that share no unit, in the order in which masks find them, with `answers_without` each."""
    model, tokenizer = load(name)

    def search():
        rows, breaks = mask_rows(name), breaks_refusal(model, tokenizer, *asked_of_searches())
        found = find_backups(model, tokenizer, *rows, breaks, 5, UPDATES, PENALTY)
        return [{"units": units} | answers_without(name, units) for units in found]

    return _kept(name, "search", ["backups", UPDATES, PENALTY, ROWS_OF_MASKS, QUESTIONS], search)


def classes_of_units(name: str) -> list[dict]:
    """`answers_without` each of the units of largest effect when zeroed, and of random others, alone."""
    units = units_of(name)
    size = np.abs(log_odds_changes(effects_of_units(name, "zero"), "harmful"))
    order = np.argsort(-size, kind="stable").tolist()
    largest, rest = order[:CLASSED], order[CLASSED:]
    chosen = {i: "largest" for i in largest}
    chosen |= {i: "random" for i in sorted(random.Random(0).sample(rest, CLASSED))}

    def read():
        return [
            {"unit": units[i], "group": group} | answers_without(name, [units[i]])
            for i, group in chosen.items()
        ]

    return _kept(name, "effects", ["classes", [[units[i], g] for i, g in chosen.items()]], read)


def sums_of(name: str) -> pd.DataFrame:
    """`compare_sums` of what every detector and the mask put first, on the harmful requests."""
    changes = log_odds_changes(effects_of_units(name, "zero"), "harmful")
    effects = dict(zip(units_of(name), changes.tolist()))
    ranked = ranks_by_detector(name) | {MASK: mask_of(name)}
    sets = {key: in_order(name, found["ranks"], TOP) for key, found in ranked.items()}
    asked = asked_of_units()["harmful"]

    def compare():
        return (
            compare_sums(*load(name), pairs_of(name, asked), sets, effects)
            .reset_index()
            .to_dict("list")
        )

    return pd.DataFrame(_kept(name, "effects", ["sums", asked, sets], compare))


def read_truth(table: str, folder: Path = FOLDER) -> pd.DataFrame:
    """A shipped table of the answer key, by its name without an ending.

    Raises
    ------
    SafetyNeuronError
        If there is none of that name, or its checksum is another than the manifest says.
    """
    path = folder / f"{table}.csv"
    try:
        expected = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
        sound = file_digest(path) == expected[path.name]["sha256"]
    except (OSError, ValueError, KeyError) as error:
        raise SafetyNeuronError(
            f"the answer key has no table {table!r} in {folder} ({error}): make it with `safetyneuron truth`"
        ) from None
    if not sound:
        raise SafetyNeuronError(
            f"{path} is not the file of its manifest: restore it, or make it again with `safetyneuron truth`"
        )
    return pd.read_csv(path)


def mask_units(name: str) -> list[Unit] | None:
    """The few units by which the learned mask breaks refusal in a model, from the shipped tables; None of a model without a key."""
    rows = read_truth("breaking").query("model == @name and method == @MASK")
    return units_named(rows["which"].item()) if len(rows) else None
