"""RelP: gradients through a model made linear by the rules of layer-wise relevance propagation (after Rezaei Jafari et al. 2025)."""

from contextlib import ExitStack, contextmanager

import torch

from safetyneuron.detectors.gradients import contributions
from safetyneuron.neurons.architecture import Architecture


def _held(module, inputs, output):
    """Hook: the output as the input times a factor that has no gradient (LN-rule of norms, identity rule of activations)."""
    x = inputs[0]
    factor = torch.where(x == 0, torch.zeros_like(x), output / x).detach()
    return x * factor


def _halved(module, inputs):
    """Hook: the product of gate and up passes half of its gradient to each (half-rule)."""
    return (0.5 * inputs[0] + (0.5 * inputs[0]).detach(), *inputs[1:])


@contextmanager
def linear(model):
    """Norms, activation functions and gates propagate linearly backwards, for the length of a `with` block; no output changes."""
    architecture, decoder = Architecture(model), model.get_decoder()
    with ExitStack() as hooks:
        for name, module in decoder.named_modules():
            if name.endswith("norm"):
                hooks.callback(module.register_forward_hook(_held).remove)
        for number, layer in enumerate(architecture.layers):
            for module in layer.mlp.children():
                if not list(module.parameters()):
                    hooks.callback(module.register_forward_hook(_held).remove)
            down = architecture.place(number, "down").module
            hooks.callback(down.register_forward_pre_hook(_halved).remove)
        yield model


def relevance(case):
    """RelP: activation (less its mean on harmless requests) times the propagated coefficient, summed over tokens."""
    with linear(case.model):
        pairs = case.pairs("harmful")
        return contributions(case.model, case.tokenizer, pairs, case.means()).mean
