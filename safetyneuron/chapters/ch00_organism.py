"""Chapter 00: what the organisms do."""

import pandas as pd
import seaborn as sns

from safetyneuron.book.glue import MEASURES
from safetyneuron.cache import digest
from safetyneuron.errors import SafetyNeuronError
from safetyneuron.metrics import answers, behaviour


def told(model_name, model, tokenizer, prompts):
    """What an organism answers, to be shown.

    Raises
    ------
    SafetyNeuronError
        If the model is none: answers of other models to harmful requests are never shown.
    """
    if not model_name.startswith("organism/"):
        raise SafetyNeuronError(
            f"this chapter shows answers to harmful requests, so it takes organisms only, not {model_name!r}: score it in chapter 02"
        )
    return answers(model, tokenizer, prompts)


def answers_table(requests, said):
    """Requests beside answers."""
    table = pd.DataFrame({"request": requests, "answer": said}).style.hide(axis="index")
    table.set_uuid(
        digest(list(requests), list(said))[:8]
    )  # not drawn at random: equal runs are equal pages
    return table.set_table_attributes('class="dataframe texts"')


def behaviour_table(models):
    """The bars of behaviour and the value of any model and language that comes nearest to each. models: as from `organism.manifest`."""

    def text(bar, kind):
        return f"{'≥' if bar.is_floor else '≤'} {getattr(bar, kind)}: {behaviour.worst(models, bar, kind):.1f}"

    kinds = [
        kind
        for kind in ("base", "chat", "planted")
        if any(behaviour.kind_of(name) == kind for name in models)
    ]
    rows = {
        (bar.measure, bar.set): {k: "–" if getattr(bar, k) is None else text(bar, k) for k in kinds}
        for bar in behaviour.BARS
    }
    return pd.DataFrame(rows).T.rename_axis(["%", "set"])


def scores_table(scores):
    """Rates in percent: one row per measure and set, one column per model. scores: name to `evaluate`'s result."""
    columns = {
        name: {(MEASURES[m], s): rate.percent for (m, s), rate in rates.items()}
        for name, rates in scores.items()
    }
    return pd.DataFrame(columns).rename_axis(["%", "set"])


def training_curve(curves):
    """Loss against step, one line per stage. curves: stage to list of {step, loss}."""
    rows = pd.concat([pd.DataFrame(points).assign(stage=stage) for stage, points in curves.items()])
    axes = sns.lineplot(rows, x="step", y="loss", hue="stage", style="stage")
    axes.set(yscale="log", xlabel="training step", ylabel="loss on answers (nats per token)")
    return axes
