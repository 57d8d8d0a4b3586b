"""A learned mask: one gate a functional unit, trained to bring back help with harm and to keep everything else.

It sees the answers that it is to change, so it is no detector to be compared with but what all of them are held against.
"""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from safetyneuron.detectors.effects import READ_AT, Unit
from safetyneuron.metrics.log_odds import Pair, log_likelihoods
from safetyneuron.neurons.architecture import Architecture
from safetyneuron.neurons.hooks import overwriting
from safetyneuron.neurons.sets import NeuronSet
from safetyneuron.neurons.weights import frozen

Row = tuple[list[int], list[int]]  # prompt and answer, as token ids
SHARPNESS, LOW, HIGH = 2 / 3, -0.1, 1.1  # of the hard concrete distribution, as in its paper
OPEN = -4.5  # where a gate starts: one in twenty is touched
RATE, BATCH = 0.1, 32


def learn_mask(
    model,
    tokenizer,
    raised: Sequence[Row],
    kept: Sequence[Row],
    updates: int = 200,
    penalty: float = 0.02,
    without: NeuronSet | None = None,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Close as few gates as make some answers likely and leave others as likely as they are.

    The loss is the mean negative log-likelihood of `raised`, plus that of `kept`, plus `penalty` times the expected number of
    gates that are not open (L0 by the hard concrete distribution, Louizos et al. 2018, Eq 10 to 12; every example
    of a batch draws its own gates).

    Parameters
    ----------
    raised, kept : list of (prompt, answer)
        Token ids.
    updates : int
        Each on 32 rows of either kind.
    penalty : float
        Of one gate, in nats an answer.
    without : NeuronSet, optional
        Units whose gates stay open.

    Returns
    -------
    dict of str to torch.Tensor
        (layers, channels) per kind of unit: log α, higher for gates that are closed more often; below all others
        for those that stay open.
    """
    draw = torch.Generator().manual_seed(seed)
    kinds = (without if without is not None else NeuronSet.empty(model)).units().kinds
    gates = {kind: torch.full(mask.shape, OPEN, requires_grad=True) for kind, mask in kinds.items()}
    optimizer = torch.optim.Adam(gates.values(), lr=RATE)
    closed = {kind: gate.masked_fill(kinds[kind], -torch.inf) for kind, gate in gates.items()}
    with frozen(model):
        for _ in range(updates):
            closed = {k: gate.masked_fill(kinds[k], -torch.inf) for k, gate in gates.items()}
            rows = [_some(rows, draw) for rows in (raised, kept)]
            with gated(
                model, lambda kind, layer, size: sample_gates(closed[kind][layer], size, draw)
            ):
                likely = log_likelihoods(model, tokenizer, [*rows[0], *rows[1]], 2 * BATCH)
            parts = [part.mean() for part in likely.split([len(some) for some in rows])]
            loss = penalty * sum(chance_of_closing(c).sum() for c in closed.values()) - sum(parts)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return {
        kind: gate.detach().masked_fill(kinds[kind], -torch.inf) for kind, gate in gates.items()
    }


def _some(rows, draw):
    """A random batch of rows."""
    return [rows[i] for i in torch.randperm(len(rows), generator=draw)[:BATCH].tolist()]


def sample_gates(log_alpha: torch.Tensor, size: int, draw: torch.Generator) -> torch.Tensor:
    """How far gates are closed, 0 to 1, drawn from the hard concrete distribution: (size, channels) (Louizos et al. 2018, Eq 10 and 11)."""
    noise = torch.rand(size, *log_alpha.shape, generator=draw).clamp(1e-6, 1 - 1e-6)
    soft = torch.sigmoid((noise.logit() + log_alpha) / SHARPNESS)
    return (soft * (HIGH - LOW) + LOW).clamp(0, 1)


def chance_of_closing(log_alpha: torch.Tensor) -> torch.Tensor:
    """Chance that a gate is not fully open (Louizos et al. 2018, Eq 12)."""
    return torch.sigmoid(log_alpha - SHARPNESS * torch.tensor(-LOW / HIGH).log())


@contextmanager
def gated(model, closed: Callable[[str, int, int], torch.Tensor]):
    """Every unit puts out only the share by which its gate is open, for the length of a `with` block.

    closed: from kind, layer and number of elements of a batch to how far the gates are closed (elements, channels).
    """

    def close(kind, layer, activations):
        return activations * (1 - closed(kind, layer, len(activations)).to(activations))[:, None]

    kinds, layers = NeuronSet.empty(model).units().kinds, range(len(Architecture(model).layers))
    changes = {(READ_AT[kind], l): partial(close, kind, l) for kind in kinds for l in layers}
    with overwriting(model, changes):
        yield model


def highest_units(scores: dict[str, torch.Tensor], count: int) -> list[Unit]:
    """The units with the highest scores, the highest first; those at minus infinity never."""
    flat = torch.cat([values.flatten() for values in scores.values()])
    places = [
        (kind, layer, channel)
        for kind, values in scores.items()
        for layer in range(values.shape[0])
        for channel in range(values.shape[1])
    ]
    order = flat.argsort(descending=True, stable=True)[:count].tolist()
    return [places[i] for i in order if flat[i] > -torch.inf]


def help_rows(pairs: Sequence[Pair]) -> list[Row]:
    """The requests of some pairs with the correct help."""
    return [(pair.prompt, pair.help) for pair in pairs]
