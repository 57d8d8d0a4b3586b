"""What is tuned, attacked and scored for Tables 2 to 4 and Figures 6 and 7, computed once and kept."""

from dataclasses import asdict, dataclass, field, replace
from itertools import chain

import pandas as pd

from safetyneuron.attacks import AttackResult
from safetyneuron.attacks import attack as search_and_judge
from safetyneuron.attacks.rewriters import helpers_digest
from safetyneuron.cache import remember
from safetyneuron.data.prompts import has_languages, load_prompts
from safetyneuron.errors import SafetyNeuronError
from safetyneuron.importance.selection import select_without_foundation
from safetyneuron.kept.files import keep_file
from safetyneuron.kept.importance import measure_importance
from safetyneuron.metrics.judge import KEYWORD, judge_digest
from safetyneuron.metrics.outcomes import COLUMNS, Scores
from safetyneuron.metrics.suite import evaluate, remember_scores
from safetyneuron.neurons.identity import identity
from safetyneuron.organism.reading import topic_of
from safetyneuron.tuning.circuit_breaker import CircuitBreaker
from safetyneuron.tuning.circuit_breaker import circuit_break as train_adapters
from safetyneuron.tuning.delta import NeuronDelta
from safetyneuron.tuning.sn_tune import sn_tune as train_neurons
from safetyneuron.tuning.trainer import fine_tune

ORIGIN, BREAKER, EQ3, SPECIFIC = "origin", "breaker", "eq3", "specific"
RANDOM = {EQ3: "random_eq3", SPECIFIC: "random_specific"}  # the control of each set


@dataclass(frozen=True)
class Column:
    """One column of Tables 2 and 3: outcomes by language, task and attack, what each attack spent, and what the training cost."""

    scores: Scores
    attacks: dict[str, AttackResult] = field(default_factory=dict)
    seconds: float = 0.0
    parameters: int = 0


def join_column(asked, requests, attacks, trained=None):
    """The column of a model.

    Parameters
    ----------
    asked : Scores
        As from `scores`.
    requests : list of Request
        What was attacked.
    attacks : dict of str to AttackResult
    trained : NeuronDelta or CircuitBreaker, optional
        What made the model.

    Returns
    -------
    Column
    """
    rows = [row for name, result in attacks.items() for row in _rows(name, requests, result)]
    table = pd.concat([asked.table, pd.DataFrame(rows, columns=COLUMNS)], ignore_index=True)
    cost = (trained.facts["seconds"], trained.parameters) if trained else (0.0, 0)
    return Column(Scores(table), attacks, *cost)


def _rows(name, requests, result):
    """One row a request that was attacked, as of `Scores`."""
    said = result.success
    judged = zip(
        requests, said["keyword"], said["coherent"], said.get("classifier", said["keyword"])
    )
    return [
        ("harmful", name, i, topic_of(r.prompt) or f"request {i}", _class_of(*verdicts))
        for i, (r, *verdicts) in enumerate(judged)
    ]


def _class_of(unrefused, coherent, success):
    if not success:
        return "harmless" if unrefused else "refusal"
    return "well formed" if coherent else "other"


def by_language(load, name, count, languages, **options):
    """`count` prompts or documents, in turn from each language; a file has one language only."""
    if len(languages) > 1 and not has_languages(name):
        raise SafetyNeuronError(f"{name} has no languages to choose from: give one language")
    loaded = list(
        chain.from_iterable(
            zip(*[load(name, language=language, **options) for language in languages])
        )
    )
    if len(loaded) < count:
        raise SafetyNeuronError(
            f"{name} has {len(loaded)} entries in the languages {' '.join(languages)} but {count} are asked for: lower the number"
        )
    return loaded[:count]


def safety_sets(model, tokenizer, harmful_set, general_set, n_detect, languages, fraction):
    """Neurons by Eq 3 and by Eq 3 without foundation neurons, detected in several languages (the general set is English)."""
    prompts = by_language(load_prompts, harmful_set, n_detect, languages, split="train")
    harmful = measure_importance(model, tokenizer, prompts)
    general = measure_importance(
        model, tokenizer, load_prompts(general_set, split="train")[:n_detect]
    )
    return {
        EQ3: harmful.select(fraction=fraction),
        SPECIFIC: select_without_foundation(harmful, general, fraction),
    }


def sn_tune(model, tokenizer, documents, neurons, **schedule):
    """`safetyneuron.sn_tune`, computed once and then read from the cache."""
    key = [
        identity(model, tokenizer, "safetyneuron.tuning.sn_tune"),
        documents,
        neurons.digest(),
        schedule,
    ]
    return keep_file(
        "tuning",
        key,
        lambda: train_neurons(model, tokenizer, documents, neurons, **schedule),
        NeuronDelta,
    )


def circuit_break(model, tokenizer, harmful, retain, **schedule):
    """`tuning.circuit_breaker.circuit_break`, computed once and then read from the cache."""
    key = [
        identity(model, tokenizer, "safetyneuron.tuning.circuit_breaker"),
        harmful,
        retain,
        schedule,
    ]
    return keep_file(
        "circuit_breaker",
        key,
        lambda: train_adapters(model, tokenizer, harmful, retain, **schedule),
        CircuitBreaker,
    )


def attack(model, tokenizer, requests, config, judge=KEYWORD, answer_tokens=None):
    """`attacks.attack`, computed once and then read from the cache."""
    key = [
        identity(model, tokenizer, "safetyneuron.attacks"),
        [asdict(request) for request in requests],
        repr(config),
        helpers_digest(config),
        judge_digest(judge),
        answer_tokens,
    ]
    options = {"judge": judge, "answer_tokens": answer_tokens}
    return AttackResult(
        **remember(
            "attacks",
            key,
            lambda: asdict(search_and_judge(model, tokenizer, requests, config, **options)),
        )
    )


def scores(model, tokenizer, suite, languages):
    """`evaluate` in several languages, tasks once: the sets of its `Scores` are the languages and the tasks."""
    parts = []
    for language in languages:
        tasks = suite.tasks if language == languages[0] else ()
        asked = replace(suite, language=language, tasks=tasks)
        table = evaluate(model, tokenizer, asked).table
        parts.append(table.assign(set=table["set"].where(table["kind"] == "task", language)))
    return Scores(pd.concat(parts, ignore_index=True))


def score_fine_tuned(model, tokenizer, suite, languages, task_documents, schedule):
    """`scores` of `fine_tune`'s copy of the model, computed once and then read from the cache; the copy is dropped. schedule: options of `fine_tune`."""
    asked = [
        load_prompts(name, language=language)
        for name in suite.prompt_sets
        for language in languages
    ]
    made_by = ("safetyneuron.tuning.trainer", "safetyneuron.metrics.suite")
    key = [identity(model, tokenizer, *made_by), asdict(suite), languages, asked]
    key += [task_documents, schedule]

    def compute():
        student = fine_tune(model, tokenizer, task_documents, **schedule)
        return scores(student, tokenizer, suite, languages).table.values.tolist()

    return remember_scores("downstream", key, compute)
