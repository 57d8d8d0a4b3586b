"""Tables that several chapters show: paper and measurement side by side."""

import pandas as pd
import torch

from safetyneuron.metrics.answer_class import kinds_among
from safetyneuron.metrics.rates import Rate
from safetyneuron.neurons.architecture import ATTENTION
from safetyneuron.neurons.sets import NeuronSet


def sizes_table(sets, model):
    """Size of neuron sets: neurons, share of neurons, share of parameters. sets: name to `NeuronSet`."""
    rows = {
        name: {
            "neurons": len(s),
            "share of neurons": f"{100 * s.share:.2f} %",
            "share of parameters": f"{100 * s.parameter_share(model):.2f} %",
        }
        for name, s in sets.items()
    }
    return pd.DataFrame(rows).T.rename_axis("set")


def attention_share(neurons):
    """Share of a set that lies in attention, of its neurons and of its functional units, as text."""
    rows, units = (neurons.share_in(ATTENTION, units=each) for each in (False, True))
    return f"{100 * rows:.0f} % of the neurons ({100 * units:.0f} % of the functional units)"


def attention_share_by_chance(neurons):
    """The same of all neurons of the model that a set belongs to."""
    return attention_share(NeuronSet({p: torch.ones_like(m) for p, m in neurons.masks.items()}))


def count_classes(conditions, name):
    """Classes of the answers to a set of harmful requests, over all trainings and draws: label of a condition to class to `Rate`, as `class_bars` draws it.

    Parameters
    ----------
    conditions : dict of str to Runs
    name : str or dict
        The set in the `Scores`; or of each condition its own.
    """
    found = {}
    for label, runs in conditions.items():
        asked = name if isinstance(name, str) else name[label]
        rows = pd.concat([scores.table for draws in runs for scores in draws])
        wanted = (rows["kind"] == "harmful") & (rows["set"] == asked)
        found[label] = rows.loc[wanted, "outcome"].tolist()
    kinds = kinds_among(set().union(*found.values()))
    return {
        label: {kind: Rate(told.count(kind), len(told)) for kind in kinds}
        for label, told in found.items()
    }


def shares_table(shares, row):
    """One row of shares in percent, a column a training. shares: name of a training to its share."""
    columns = {
        name.removeprefix("organism/"): f"{100 * share:.0f} %" for name, share in shares.items()
    }
    return pd.DataFrame([columns], index=[row])
