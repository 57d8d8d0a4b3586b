"""One evaluation of a model, whole or with neurons switched off: the cells of one column of Table 1."""

from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import chain, islice

import pandas as pd

from safetyneuron.cache import remember
from safetyneuron.data.prompts import load_prompts
from safetyneuron.metrics.answer_class import name_classes
from safetyneuron.metrics.capability import correct_answers
from safetyneuron.metrics.judge import KEYWORD, find_harm, judge_digest
from safetyneuron.metrics.outcomes import COLUMNS, Scores
from safetyneuron.metrics.safety import answers
from safetyneuron.neurons.deactivation import deactivate
from safetyneuron.neurons.identity import identity
from safetyneuron.organism.reading import topic_of


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
    judge: str = KEYWORD  # of answers to harmful requests, as for `find_harm`

    @property
    def prompt_sets(self):
        """Names of the sets it asks."""
        return (*self.harmful, self.benign) if self.benign else self.harmful


def evaluate(model, tokenizer, suite, without=None):
    """What becomes of every request and question of the suite, computed once and then read from the cache.

    Inside `deactivate`, `patched_generation` and their like it is asked of, and kept for, the model as they change it.

    Parameters
    ----------
    model, tokenizer
        As returned by `load_model`.
    suite : Suite
    without : NeuronSet, optional
        Neurons to switch off meanwhile.

    Returns
    -------
    Scores
        Its keys are (measure, set): measure is `asr`, `coherent`, `over_refusal`, `helpful` or `accuracy`.

    Raises
    ------
    SafetyNeuronError
        If the model has hooks of somebody else, or the neurons are another model's.
    """
    prompts = {
        name: load_prompts(name, language=suite.language)[suite.skip :][: suite.prompts]
        for name in suite.prompt_sets
    }
    with deactivate(model, without) if without else nullcontext():
        key = [identity(model, tokenizer, __name__), asdict(suite), prompts]
        key += judge_digest(suite.judge)
        return remember_scores("scores", key, lambda: _measure(model, tokenizer, suite, prompts))


def remember_scores(kind, key, compute):
    """The `Scores` that `compute()` gives rows for, made once for this key."""
    rows = remember(kind, key, compute)
    return Scores(pd.DataFrame(rows, columns=COLUMNS))


def _measure(model, tokenizer, suite, prompts):
    """Rows of `COLUMNS`."""
    rows, every = [], list(chain.from_iterable(prompts.values()))  # in batches over all sets
    given = iter(answers(model, tokenizer, every, suite.answer_tokens))
    for name, asked in prompts.items():
        texts = list(islice(given, len(asked)))
        kind = "benign" if name == suite.benign else "harmful"
        judged = kind == "harmful" and suite.judge != KEYWORD
        harm = find_harm(suite.judge, model, asked, texts) if judged else None
        rows += _rows(kind, name, asked, name_classes(asked, texts, harm))
    if suite.tasks:
        found = correct_answers(model, tokenizer, suite.tasks, limit=suite.questions)
        for task, answered in found.items():
            questions, right = zip(*answered)
            rows += _rows("task", task, questions, ["right" if r else "false" for r in right])
    return rows


def _rows(kind, name, texts, outcomes):
    """One row an item; what shares nothing with others is a cluster of its own."""
    return [
        (kind, name, i, topic_of(text) or f"{name} {i}", outcome)
        for i, (text, outcome) in enumerate(zip(texts, outcomes))
    ]
