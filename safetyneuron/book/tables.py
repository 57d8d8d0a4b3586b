"""Tables that several chapters show: paper and measurement side by side."""

import pandas as pd
import torch

from safetyneuron.neurons.architecture import ATTENTION
from safetyneuron.neurons.sets import NeuronSet


def sizes_table(sets, model):
    """Size of neuron sets: neurons, share of neurons, share of parameters. sets: name to `NeuronSet`."""
    rows = {
        name: {
            "neurons": len(s),
            "share of neurons": f"{s.share:.2%}",
            "share of parameters": f"{s.parameter_share(model):.2%}",
        }
        for name, s in sets.items()
    }
    return pd.DataFrame(rows).T.rename_axis("set")


def attention_share(neurons):
    """Share of a set that lies in attention, of its neurons and of its functional units, as text."""
    rows, units = (neurons.share_in(ATTENTION, units=each) for each in (False, True))
    return f"{rows:.0%} of the neurons ({units:.0%} of the functional units)"


def attention_share_by_chance(neurons):
    """The same of all neurons of the model that a set belongs to."""
    return attention_share(NeuronSet({p: torch.ones_like(m) for p, m in neurons.masks.items()}))
