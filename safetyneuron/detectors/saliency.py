"""Weight saliency of neurons: SNIP and Wanda, summed over rows and columns (Wei et al. 2024)."""

from collections import defaultdict
from contextlib import ExitStack

import torch

from safetyneuron.neurons.architecture import PROJECTIONS, Architecture
from safetyneuron.neurons.encoding import encode_documents
from safetyneuron.neurons.hooks import reading
from safetyneuron.neurons.weights import frozen


def snip(model, tokenizer, documents):
    """Σ over a neuron's weights of |W| · mean over documents of |∇_W L|, the loss being taken on the completion (Wei et al. 2024, SNIP).

    Parameters
    ----------
    documents : list of dict
        `prompt` and `completion`.

    Returns
    -------
    dict of str to torch.Tensor
        (layers, channels) per projection, in units of the loss.
    """
    places, data = _places(model), encode_documents(model, tokenizer, documents)
    scores, of_weight = defaultdict(float), defaultdict(list)
    for key, place in places.items():
        of_weight[place.module.weight].append(key)

    def collect(weight):  # a gradient is let go before the next layer's is there
        product = weight.grad.abs().float() * weight.detach().abs().float() / len(data)
        weight.grad = None
        for key in of_weight[weight]:
            scores[key] = scores[key] + _of_neurons(places[key], product)

    with frozen(model), ExitStack() as hooks:
        for weight in of_weight:
            weight.requires_grad_(True)
            hooks.callback(weight.register_post_accumulate_grad_hook(collect).remove)
        for row in data:
            ids, labels = (
                torch.tensor([row[name]], device=model.device) for name in ("input_ids", "labels")
            )
            model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
    return _by_projection(scores)


@torch.no_grad()
def wanda(model, tokenizer, documents):
    """Σ over a neuron's weights of |W_ij| · ‖x_j‖, the norm of an input over all completion tokens (Wei et al. 2024, Wanda).

    Parameters and result as of `snip`; in units of the projection's output.
    """
    places, data = _places(model), encode_documents(model, tokenizer, documents)
    inputs = {
        key: (key[0] if place.axis else f"into {key[0]}", key[1]) for key, place in places.items()
    }
    squares, written = defaultdict(float), None

    def square(values):
        return values[0, written.to(values.device)].float().square().sum(0)

    with reading(model, inputs.values(), square) as seen:
        for row in data:
            written = torch.tensor(row["labels"], device=model.device) >= 0
            model(
                input_ids=torch.tensor([row["input_ids"]], device=model.device),
                use_cache=False,
                logits_to_keep=1,
            )
            for key, what in inputs.items():
                squares[key] = squares[key] + seen[what]
    scores = {}
    for key, place in places.items():  # weights are (channels, other width)
        norms = squares[key].sqrt().to(place.weight.device)
        scores[key] = (
            (place.weight.abs() * (norms[:, None] if place.axis else norms)).sum(1).float().cpu()
        )
    return _by_projection(scores)


def _places(model):
    """(projection, layer) to `Place`."""
    architecture = Architecture(model)
    return {
        (p, layer): architecture.place(layer, p)
        for p in PROJECTIONS
        for layer in range(len(architecture.layers))
    }


def _of_neurons(place, product):
    """Sums over the rows or columns that belong to one projection: (channels,)."""
    return (
        product[place.channels].sum(1) if place.axis == 0 else product[:, place.channels].sum(0)
    ).cpu()


def _by_projection(scores):
    layers = 1 + max(layer for _, layer in scores)
    return {p: torch.stack([scores[p, layer] for layer in range(layers)]) for p in PROJECTIONS}
