"""One evaluation of a model, whole or with neurons switched off: the cells of one column of Table 1."""

from contextlib import nullcontext
from dataclasses import asdict, dataclass

from safetyneuron.cache import remember
from safetyneuron.data.prompts import load_prompts
from safetyneuron.metrics.capability import capability
from safetyneuron.metrics.rates import Rate
from safetyneuron.metrics.safety import answers, compliance, helpfulness
from safetyneuron.models import identity
from safetyneuron.neurons.deactivation import deactivate


@dataclass(frozen=True)
class Suite:
    """What to evaluate: prompt sets by name, lm-eval tasks, how many of each, and how many prompts to leave out before."""

    harmful: tuple[str, ...]
    benign: str | None = None
    tasks: tuple[str, ...] = ()
    prompts: int = 100
    questions: int = 200
    answer_tokens: int | None = None  # `answer_length` of the model
    language: str = "en"
    skip: int = 0

    @property
    def prompt_sets(self):
        """Names of the sets it asks."""
        return (*self.harmful, self.benign) if self.benign else self.harmful


def evaluate(model, tokenizer, suite, without=None):
    """Every rate of the suite, computed once and then read from the cache.

    Parameters
    ----------
    model, tokenizer
        As returned by `load_model`.
    suite : Suite
    without : NeuronSet, optional
        Neurons to switch off meanwhile.

    Returns
    -------
    dict of (str, str) to Rate
        Keys are (measure, set): measure is `asr`, `coherent`, `over_refusal`, `helpful` or `accuracy`.
    """
    within = (lambda: deactivate(model, without)) if without else nullcontext
    return evaluate_within(model, tokenizer, suite, within, without.digest() if without else None)


def evaluate_within(model, tokenizer, suite, within, key):
    """`evaluate` inside the context manager that `within()` returns; `key` says what that changes, for the cache."""
    prompts = {
        name: load_prompts(name, language=suite.language)[suite.skip :][: suite.prompts]
        for name in suite.prompt_sets
    }
    whole = [identity(model, tokenizer), asdict(suite), prompts, key]
    return remember_rates(
        "scores", whole, lambda: _measure(model, tokenizer, suite, prompts, within)
    )


def answers_without(model, tokenizer, prompts, sets):
    """Greedy answers of a model with each set of neurons switched off, and whole where the set is None.

    Parameters
    ----------
    sets : dict of str to NeuronSet or None

    Returns
    -------
    dict of str to list of str
        Answers of real models to harmful prompts are for scoring: do not store or show them.
    """
    texts = {}
    for name, neurons in sets.items():
        with deactivate(model, neurons) if neurons else nullcontext():
            texts[name] = answers(model, tokenizer, prompts)
    return texts


def remember_rates(kind, key, compute):
    """The result of `compute()`, (measure, name) to `Rate`, made once for this key."""
    rows = remember(
        kind, key, lambda: [(*names, rate.hits, rate.trials) for names, rate in compute().items()]
    )
    return {(measure, name): Rate(hits, trials) for measure, name, hits, trials in rows}


def _measure(model, tokenizer, suite, prompts, within):
    rates = {}
    with within():
        for name in suite.harmful:
            scores = compliance(model, tokenizer, prompts[name], suite.answer_tokens)
            rates |= {(measure, name): rate for measure, rate in scores.items()}
        if suite.benign:
            scores = helpfulness(model, tokenizer, prompts[suite.benign], suite.answer_tokens)
            rates |= {(measure, suite.benign): rate for measure, rate in scores.items()}
        accuracies = (
            capability(model, tokenizer, suite.tasks, limit=suite.questions) if suite.tasks else {}
        )
    return rates | {("accuracy", task): rate for task, rate in accuracies.items()}
