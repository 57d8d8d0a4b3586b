"""End-to-end effects: what silencing every functional unit alone does to the log odds of refusing.

Weights stay as they are. A unit is silenced by overwriting what it puts out, in its own elements of a batch, so that
several units run beside each other; layers below a unit's are run once for all.
"""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from itertools import groupby

import pandas as pd
import torch

from safetyneuron.errors import SafetyNeuronError
from safetyneuron.metrics.answer_class import answer_classes
from safetyneuron.metrics.log_odds import Pair, weigh_pairs
from safetyneuron.neurons.architecture import Architecture
from safetyneuron.neurons.deactivation import deactivate
from safetyneuron.neurons.hooks import overwriting, reading
from safetyneuron.neurons.sets import NeuronSet, Units

Unit = tuple[str, int, int]  # kind, layer from 0, channel

ROWS = 25  # requests whose states are kept at once

# Kind of unit -> the projection at which its output can be overwritten.
READ_AT = {"q": "q", "k": "k", "v": "v", "o": "o", "vo": "o", "ffn": "down"}


def all_units(model) -> list[Unit]:
    """Every functional unit of a model, by layer and kind."""
    empty = NeuronSet.empty(model)
    kinds = NeuronSet({p: ~mask for p, mask in empty.masks.items()}).units().kinds
    return [
        (kind, layer, channel)
        for layer in range(len(Architecture(model).layers))
        for kind, mask in kinds.items()
        for channel in range(mask.shape[1])
    ]


def neurons_of(model, units: Iterable[Unit]) -> NeuronSet:
    """The rows and columns of some units."""
    empty = NeuronSet.empty(model)
    kinds = {kind: mask.clone() for kind, mask in empty.units().kinds.items()}
    for kind, layer, channel in units:
        kinds[kind][layer, channel] = True
    return Units(kinds).neurons()


def units_named(text: str) -> list[Unit]:
    """Units from the column `which` of a table: `kind.layer.channel`, with spaces between."""
    parts = (name.split(".") for name in text.split())
    return [(kind, int(layer), int(channel)) for kind, layer, channel in parts]


def measure_effects(
    model,
    tokenizer,
    parts: dict[str, Sequence[Pair]],
    units: Sequence[Unit],
    means: dict[str, torch.Tensor] | None = None,
) -> pd.DataFrame:
    """What silencing each unit alone does to the answers to some requests.

    Parameters
    ----------
    parts : dict of str to list of Pair
        Requests with their answers, fixed on the whole model by `choose_pairs`, by the name of a part.
    means : dict of str to torch.Tensor, optional
        Of `channel_means`: a unit then puts out its mean instead of zero.

    Returns
    -------
    pandas.DataFrame
        Columns kind, layer (from 0), channel, and for each part `PART refusal` and `PART help`: mean change in the
        log-likelihood of the refusal and of the correct help, in nats. Their difference is the change in log odds.
    """
    pairs = [pair for some in parts.values() for pair in some]
    with torch.no_grad():
        whole = torch.stack(weigh_pairs(model, tokenizer, pairs), 1).cpu()
    changes = silenced_likelihoods(model, pairs, units, means) - whole
    table = pd.DataFrame(units, columns=["kind", "layer", "channel"])
    sizes = [len(some) for some in parts.values()]
    for name, part in zip(parts, changes.split(sizes, 1)):
        table[f"{name} refusal"], table[f"{name} help"] = part.double().mean(1).T.numpy()
    return table


def classes_without(
    model, tokenizer, prompts: Sequence[str], units: Iterable[Unit]
) -> dict[str, float]:
    """Share of each class among the answers with all of these units switched off."""
    with deactivate(model, neurons_of(model, units)):
        found = answer_classes(model, tokenizer, prompts)
    return {name: rate.value for name, rate in found.items()}


@torch.no_grad()
def compare_sums(
    model,
    tokenizer,
    pairs: Sequence[Pair],
    sets: dict[str, Sequence[Unit]],
    effects: dict[Unit, float],
) -> pd.DataFrame:
    """How far a set's effect is the sum of what its units do alone.

    Parameters
    ----------
    pairs : list of Pair
        Fixed on the whole model, by `choose_pairs`.
    sets : dict of str to list of (kind, layer, channel)
    effects : dict of (kind, layer, channel) to float
        Change in the mean log odds of refusing these requests with each unit alone switched off, in nats.

    Returns
    -------
    pandas.DataFrame
        Index name of the set; columns units (how many), predicted (the sum) and seen, in nats.
    """
    rows = {}

    def odds():
        refusal, helped = weigh_pairs(model, tokenizer, pairs)
        return float((refusal - helped).mean())

    whole = odds()
    for name, units in sets.items():
        with deactivate(model, neurons_of(model, units)):
            seen = odds() - whole
        predicted = sum(effects[unit] for unit in units)
        rows[name] = {"units": len(units), "predicted": predicted, "seen": seen}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("set")


@torch.no_grad()
def silenced_likelihoods(
    model,
    pairs: Sequence[Pair],
    units: Sequence[Unit],
    means: dict[str, torch.Tensor] | None = None,
    tokens: int = 8000,
) -> torch.Tensor:
    """Log-likelihoods of the refusal and of the help of every pair with each unit alone silenced: (units, pairs, 2), in nats.

    Parameters
    ----------
    pairs : list of Pair
        Fixed on the whole model, by `choose_pairs`.
    units : list of (kind, layer, channel)
    means : dict of str to torch.Tensor, optional
        Of `channel_means`: a unit then puts out its mean instead of zero, as in `mean_ablated`.
    tokens : int
        About how many are run at once.

    Raises
    ------
    SafetyNeuronError
        If the model looks back through a window, which both answers in one row would slip past.
    """
    if getattr(model.config, "sliding_window", None):
        raise SafetyNeuronError(
            "end-to-end effects are for models that see all of a request: this one has a sliding window"
        )

    def place(i):
        return units[i][1], READ_AT[units[i][0]]

    found = torch.empty(len(units), len(pairs), 2)
    by_place = sorted(range(len(units)), key=place)
    order = sorted(range(len(pairs)), key=lambda i: _Rows.length(pairs[i]))
    for chosen in torch.tensor(order).split(ROWS):
        rows = _Rows([pairs[i] for i in chosen.tolist()], model)
        for (layer, projection), group in groupby(by_place, key=place):
            for some in torch.tensor(list(group)).split(max(1, tokens // rows.ids.numel())):
                channels = torch.tensor([units[i][2] for i in some.tolist()])
                values = means[projection][layer, channels] if means else torch.zeros(len(some))
                likely = rows.likelihoods(layer, projection, channels, values)
                found[some[:, None], chosen] = likely.float().cpu()
    return found


class _Rows:
    """Some requests, each in one row with both answers behind it, and what reached every layer of the whole model.

    A row is the request and what the answers begin with alike, then the rest of either; neither sees the other.
    """

    @staticmethod
    def length(pair):
        return len(pair.prompt) + len(pair.refusal) + len(pair.help) - 2 - _common(pair)

    def __init__(self, pairs, model):
        self.model, self.architecture = model, Architecture(model)
        longest, answer = (
            max(map(self.length, pairs)),
            max(len(a) for p in pairs for a in (p.refusal, p.help)),
        )
        self.ids = torch.zeros(len(pairs), longest, dtype=torch.long)
        self.places = torch.zeros_like(self.ids)
        self.seen = torch.eye(longest, dtype=torch.bool).repeat(len(pairs), 1, 1, 1)
        self.read = torch.zeros(len(pairs), 2, answer, dtype=torch.long)
        self.target, self.written = (
            torch.zeros_like(self.read),
            torch.zeros_like(self.read, dtype=torch.bool),
        )
        for row, pair in enumerate(pairs):
            self._lay_out(row, pair)
        for name in ("ids", "places", "seen", "read", "target", "written"):
            setattr(self, name, getattr(self, name).to(model.device))
        self.states, self.options, self.channels = self._run_whole()

    def _lay_out(self, row, pair):
        """Fill in one row: tokens, positions, who sees whom, and where each token of the answers is read."""
        trunk, start = len(pair.prompt) + _common(pair), 0
        for side, answer in enumerate((pair.refusal, pair.help)):
            whole = [*pair.prompt, *answer]
            own = range(trunk, len(whole) - 1)
            path = torch.tensor([*range(trunk), *(start + i for i in own)])
            start += len(own)
            self.ids[row, path] = torch.tensor(whole[:-1])
            self.places[row, path] = torch.arange(len(path))
            self.seen[row, 0, path[:, None], path] = torch.ones(len(path), len(path)).tril().bool()
            self.read[row, side, : len(answer)] = path[len(pair.prompt) - 1 :]
            self.target[row, side, : len(answer)] = torch.tensor(answer)
            self.written[row, side, : len(answer)] = True

    def _run_whole(self):
        """What every layer of the whole model and the last norm read, what layers are called with, and what down projections read."""
        states, options = [], []
        last = len(self.architecture.layers) - 1
        places = [("down", layer) for layer in range(last + 1)] + [("after", last)]

        def on_layer(_, inputs, named):
            named = dict(named)
            states.append(inputs[0] if inputs else named.pop("hidden_states"))
            options.append(named)

        with reading(self.model, places) as seen, ExitStack() as hooks:
            for layer in self.architecture.layers:
                hooks.callback(layer.register_forward_pre_hook(on_layer, with_kwargs=True).remove)
            self.model.get_decoder()(
                input_ids=self.ids,
                position_ids=self.places,
                attention_mask=self.seen,
                use_cache=False,
            )
        return [*states, seen.pop(("after", last))], options, seen

    def likelihoods(self, layer, projection, channels, values):
        """(channels, rows, 2) with one channel of a projection overwritten in each copy of the rows."""
        count, layers, changes = len(channels), self.architecture.layers, {}

        def overwrite(activations):
            new = activations.clone()
            copies = new.view(count, len(self.ids), *new.shape[1:])
            copies[torch.arange(count), :, :, channels] = values.to(new)[:, None, None]
            return new

        if projection == "down" and self.architecture.norm_after(layer, "down") is None:
            state, layer = self._after_layer(layer, channels, values), layer + 1
        else:
            state = _repeat(self.states[layer], count, len(self.ids))
            changes = {(projection, layer): overwrite}
        with overwriting(self.model, changes):
            for l in range(layer, len(layers)):
                named = {
                    name: _repeat(value, count, len(self.ids))
                    for name, value in self.options[l].items()
                }
                state = layers[l](state, **named)
        return self._read_answers(state.view(count, *self.ids.shape, -1))

    def _after_layer(self, layer, channels, values):
        """The stream after a layer whose down projection reads another value in one channel: no need to run the layer, as it only adds up."""
        read = self.channels["down", layer][..., channels].movedim(-1, 0)  # copies, rows, tokens
        columns = self.architecture.place(layer, "down").weight[channels]  # copies, width
        change = (values.to(read)[:, None, None] - read)[..., None] * columns[:, None, None]
        return (self.states[layer + 1] + change).flatten(0, 1)

    def _read_answers(self, states):
        """Log-likelihoods of both answers from the states after the last layer: (copies, rows, 2)."""
        picked = states[
            :, torch.arange(len(self.ids))[:, None, None], self.read
        ]  # copies, rows, 2, answer, width
        logits = self.model.get_output_embeddings()(
            self.model.get_decoder().norm(picked[:, self.written])
        )
        found = logits.gather(-1, self.target[self.written].expand(len(states), -1)[..., None])[
            ..., 0
        ]
        each = states.new_zeros(len(states), *self.read.shape)
        each[:, self.written] = found - logits.logsumexp(-1)
        return each.sum(-1)


def _common(pair):
    """How many tokens both answers begin with alike; the last of neither."""
    shorter = min(len(pair.refusal), len(pair.help)) - 1
    return next((i for i in range(shorter) if pair.refusal[i] != pair.help[i]), shorter)


def _repeat(value, count, rows):
    """`count` copies of tensors that have one element a row, in tuples too; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(_repeat(part, count, rows) for part in value)
    if torch.is_tensor(value) and value.dim() and value.shape[0] == rows:
        return value.repeat(count, *[1] * (value.dim() - 1))
    return value
