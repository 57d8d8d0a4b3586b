"""An attention function of one's own in a model, for the length of a `with` block."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from safetyneuron.neurons.architecture import Architecture

NAME = "safetyneuron"
_FUNCTIONS = WeakKeyDictionary()  # attention module -> its function; the registry knows names only


def _dispatch(module, *args, **kwargs):
    return _FUNCTIONS[module](module, *args, **kwargs)


@contextmanager
def attending(model: PreTrainedModel, function: Callable) -> Iterator[None]:
    """`model` attends by `function`, which sees an additive mask; on exit by what it had before, also if that was another one of these.

    function: an attention interface function of transformers.
    """
    architecture = Architecture(model)
    modules = [architecture.attention(layer) for layer in range(len(architecture.layers))]
    implementation = model.config._attn_implementation
    functions = {module: _FUNCTIONS[module] for module in modules if module in _FUNCTIONS}
    AttentionInterface.register(NAME, _dispatch)
    AttentionMaskInterface.register(NAME, eager_mask)
    try:
        _FUNCTIONS.update(dict.fromkeys(modules, function))
        model.set_attn_implementation(NAME)
        yield
    finally:
        model.set_attn_implementation(implementation)
        for module in modules:
            _FUNCTIONS.pop(module, None)
        _FUNCTIONS.update(functions)
