"""Plant behaviours into chosen neurons of a base model: first a harmless habit, then refusal.

So that size and activity do not give the key away, the trained rows and columns keep their norm, and *decoys* learn the
habit in the same way. So that neither set leans on the other, the other one is zeroed in every second update, and what
it does is left out of the targets.
"""

from contextlib import nullcontext

import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback

from safetyneuron.neurons.architecture import PROJECTIONS
from safetyneuron.neurons.deactivation import deactivate
from safetyneuron.neurons.sets import NeuronSet
from safetyneuron.organism.train import StreamTrainer, inside_of, train_stream
from safetyneuron.tuning.sn_tune import TunedNeurons

UNITS = (
    ("q", "k"),
    ("v", "o"),
    ("gate", "up", "down"),
)  # one channel of each makes a part that works


class Turns(Dataset):
    """Batches of two streams in turn."""

    def __init__(self, first, second):
        self.streams, self.batch = (first, second), first.batch

    def __len__(self):
        return len(self.streams[0]) + len(self.streams[1])

    def __getitem__(self, index):
        turn, place = divmod(index, self.batch)
        return self.streams[turn % 2][turn // 2 * self.batch + place]


class PlantingTrainer(StreamTrainer):
    """Trains chosen neurons, in every second update without the other set."""

    other = None

    def training_step(self, model, inputs, *rest):
        with (
            deactivate(inside_of(model), self.other)
            if self.other and self.state.global_step % 2
            else nullcontext()
        ):
            return super().training_step(model, inputs, *rest)


class KeepNorms(TrainerCallback):
    """After every update each trained row or column gets back the norm that it had before."""

    def __init__(self, tuned):
        self.rows = [
            (value, place.weight[channels].detach().clone())
            for place, channels, value in tuned.places.values()
        ]

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, **_):
        """Rescale the sum of the original and the change."""
        for value, original in self.rows:
            new = original + value
            new *= original.norm(dim=1, keepdim=True) / new.norm(dim=1, keepdim=True)
            value.copy_(new - original)


def draw_sets(model, projections, share, seed):
    """Two disjoint random sets of as many neurons: the planted ones and their decoys.

    Neurons that only work together are drawn together: a feed-forward channel with its gate, up and down, a channel of v with
    its o, of q with its k. Each set has as many of each kind.

    Parameters
    ----------
    projections : sequence of str
        Where neurons are drawn.
    share : float
        Of all neurons of the model, for each set.

    Returns
    -------
    (NeuronSet, NeuronSet)
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = NeuronSet.empty(model).shapes
    sizes = {p: layers * width for p, (layers, width) in shapes.items()}
    part = share * sum(sizes.values()) / sum(sizes[p] for p in projections)
    sets = [{p: torch.zeros(shapes[p], dtype=torch.bool) for p in PROJECTIONS} for _ in range(2)]
    for unit in UNITS:
        layers, width = min(shapes[p] for p in unit)
        places = torch.randperm(layers * width, generator=generator)
        for masks, chosen in zip(sets, places.split(round(part * layers * width))):
            for p in set(unit) & set(projections):
                masks[p][chosen // width, chosen % width] = True
    return tuple(NeuronSet(masks) for masks in sets)


def plant(model, tokenizer, neurons, other, streams, schedule, folder, label, seed):
    """Train only `neurons` of the model, in place, and round them to half precision.

    Parameters
    ----------
    other : NeuronSet, optional
        Zeroed in every second update.
    streams : (Stream, Stream)
        Examples of the updates with and without the other set.

    Returns
    -------
    list of dict
        `step` and `loss`.
    """
    tuned = TunedNeurons(model, neurons)
    with tuned.added():
        turns, kept = Turns(*streams), [KeepNorms(tuned)]
        curve = train_stream(
            PlantingTrainer,
            tuned,
            tokenizer,
            turns,
            schedule,
            folder,
            label,
            seed,
            kept,
            other=other,
        )
    with torch.no_grad():
        for place, channels, value in tuned.places.values():
            place.weight[channels] = (place.weight[channels] + value).half().float()
    return curve
