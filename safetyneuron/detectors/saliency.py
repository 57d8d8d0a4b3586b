"""Weight saliency of neurons: SNIP and Wanda, summed over rows and columns (Wei et al. 2024)."""

from collections import defaultdict
from contextlib import ExitStack
from functools import partial

import torch

from safetyneuron.neurons.architecture import PROJECTIONS, Architecture, stored
from safetyneuron.neurons.encoding import encode_documents


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
    weights = {id(place.module.weight): place.module.weight for place in places.values()}
    total = {key: torch.zeros_like(weight, dtype=torch.float32) for key, weight in weights.items()}
    wanted = [weight.requires_grad for weight in weights.values()]
    for weight in weights.values():
        weight.requires_grad_(True)
    try:
        for row in data:
            ids, labels = (
                torch.tensor([row[name]], device=model.device) for name in ("input_ids", "labels")
            )
            loss = model(input_ids=ids, labels=labels, use_cache=False).loss
            for key, gradient in zip(weights, torch.autograd.grad(loss, list(weights.values()))):
                total[key] += gradient.abs().float()
    finally:
        for weight, flag in zip(weights.values(), wanted):
            weight.requires_grad_(flag)
    products = {
        key: total[key] / len(data) * weight.detach().abs().float()
        for key, weight in weights.items()
    }
    return _by_projection(
        {
            key: _of_neurons(place, products[id(place.module.weight)])
            for key, place in places.items()
        }
    )


@torch.no_grad()
def wanda(model, tokenizer, documents):
    """Σ over a neuron's weights of |W_ij| · ‖x_j‖, the norm of an input over all completion tokens (Wei et al. 2024, Wanda).

    Parameters and result as of `snip`; in units of the projection's output.
    """
    places, data, squares = (
        _places(model),
        encode_documents(model, tokenizer, documents),
        defaultdict(float),
    )
    written = None

    def read(key, module, inputs):
        squares[key] = squares[key] + inputs[0][
            0, written.to(inputs[0].device)
        ].float().square().sum(0)

    modules = {id(place.module): place.module for place in places.values()}
    with ExitStack() as hooks:
        for key, module in modules.items():
            hooks.callback(module.register_forward_pre_hook(partial(read, key)).remove)
        for row in data:
            written = torch.tensor(row["labels"], device=model.device) >= 0
            model(
                input_ids=torch.tensor([row["input_ids"]], device=model.device),
                use_cache=False,
                logits_to_keep=1,
            )
    products = {
        key: stored(module, "weight").abs().float()
        * squares[key].sqrt().to(stored(module, "weight").device)
        for key, module in modules.items()
    }
    return _by_projection(
        {key: _of_neurons(place, products[id(place.module)]) for key, place in places.items()}
    )


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
