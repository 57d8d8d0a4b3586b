"""(IA)³ factors: one number a feed-forward channel, by which what the down projection reads is multiplied.

In the rows of the up projection they are the same function. But weights of 16 bits lose factors near one: their neighbours lie
0.4 to 0.8 % apart in bfloat16. There the factors stay beside the weights, in single precision.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from safetyneuron.neurons.architecture import Architecture, multiply_factors


@torch.no_grad()
def apply_factors(model: PreTrainedModel, factors: torch.Tensor) -> PreTrainedModel:
    """Multiply (IA)³ factors (layers, channels) into a model, in place: into weights of 32 bits or more, beside those of fewer."""
    if next(model.parameters()).element_size() >= 4:
        return multiply_factors(model, factors)
    architecture = Architecture(model)
    for layer, factor in enumerate(factors):
        module = architecture.place(layer, "down").module
        if "factors" in dict(module.named_parameters(recurse=False)):
            module.factors.mul_(factor.to(module.factors))
        else:
            place = "cpu" if module.weight.is_meta else module.weight.device
            own = nn.Parameter(factor.to(place, torch.float32, copy=True), requires_grad=False)
            module.register_parameter("factors", own)
            module.register_forward_pre_hook(_scale)
    return model


def _scale(module, inputs):
    """Hook before the down projection; the product is in single precision."""
    values = inputs[0]
    return ((values * module.factors.to(values.device)).to(values.dtype), *inputs[1:])
