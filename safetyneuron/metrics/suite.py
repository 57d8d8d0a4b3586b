"""One evaluation of a model, whole or with neurons switched off: the cells of one column of Table 1."""

from contextlib import nullcontext
from dataclasses import asdict, dataclass

from safetyneuron.cache import remember
from safetyneuron.data import load_prompts
from safetyneuron.deactivation import deactivate
from safetyneuron.metrics.capability import capability
from safetyneuron.metrics.rates import Rate
from safetyneuron.metrics.safety import ANSWER_TOKENS, compliance, over_refusal_rate
from safetyneuron.models import identity


@dataclass(frozen=True)
class Suite:
    """What to evaluate: prompt sets by name, lm-eval tasks, how many of each, and how many prompts to leave out before."""

    harmful: tuple[str, ...]
    benign: str | None = None
    tasks: tuple[str, ...] = ()
    prompts: int = 100
    questions: int = 200
    answer_tokens: int = ANSWER_TOKENS
    language: str = "en"
    skip: int = 0


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
        Keys are (measure, set): measure is `asr`, `coherent`, `over_refusal` or `accuracy`.
    """
    names = (*suite.harmful, suite.benign) if suite.benign else suite.harmful
    prompts = {name: load_prompts(name, language=suite.language)[suite.skip :][: suite.prompts] for name in names}
    key = [identity(model, tokenizer), asdict(suite), prompts, without.digest() if without else None]
    stored = remember("scores", key, lambda: _measure(model, tokenizer, suite, prompts, without))
    return {(measure, name): Rate(hits, trials) for measure, name, hits, trials in stored}


def _measure(model, tokenizer, suite, prompts, without):
    rows = []
    with deactivate(model, without) if without else nullcontext():
        for name in suite.harmful:
            scores = compliance(model, tokenizer, prompts[name], suite.answer_tokens)
            rows += [(measure, name, rate) for measure, rate in scores.items()]
        if suite.benign:
            refused = over_refusal_rate(model, tokenizer, prompts[suite.benign], suite.answer_tokens)
            rows.append(("over_refusal", suite.benign, refused))
        accuracies = capability(model, tokenizer, suite.tasks, limit=suite.questions) if suite.tasks else {}
        rows += [("accuracy", task, rate) for task, rate in accuracies.items()]
    return [(measure, name, rate.hits, rate.trials) for measure, name, rate in rows]
