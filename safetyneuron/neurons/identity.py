"""What a result depends on beside its own parameters, as parts of a cache key: the model as it stands, its tokenizer, code and libraries."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safetyneuron.cache import digest, library_versions
from safetyneuron.code import code_digest
from safetyneuron.errors import SafetyNeuronError
from safetyneuron.neurons.weights import fingerprint

LIBRARIES = ("transformers", "accelerate")  # whose hooks only watch, or move tensors
NO_SETTINGS = ("_name_or_path", "_commit_hash", "transformers_version")  # where it came from
CALLED_WITH = ("padding", "truncation")  # how a tokenizer was last called


def identity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *modules: str) -> list:
    """What a result depends on beside its own parameters.

    Parameters
    ----------
    model, tokenizer
        As returned by `load_model`; inside `patched_generation` and its like the model is another one.
    modules : str
        Names of the modules that compute the result.

    Raises
    ------
    SafetyNeuronError
        If the model has hooks of somebody else, whose doing no key shows.
    """
    return [
        model_digest(model),
        tokenizer_digest(tokenizer),
        code_digest(*modules),
        library_versions(),
    ]


def model_digest(model: PreTrainedModel) -> str:
    """Hash of a model as it stands: weights, configuration, generation settings, and what hooks of this package change.

    Raises
    ------
    SafetyNeuronError
        If it has hooks of somebody else.
    """
    for module_name, module in model.named_modules():
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            owner = getattr(hook, "func", hook).__module__.partition(".")[0]
            if owner not in (*LIBRARIES, __name__.partition(".")[0]):
                raise SafetyNeuronError(
                    f"a hook of {owner} on {module_name or 'the model'} may change what the model"
                    " does, and no cache key would show it: remove the hook, or change the weights"
                )
    settings = [_settings(model.config), _settings(model.generation_config)]
    return digest(fingerprint(model), settings, [key() for key in _changes(model)])


def _settings(config):
    values = json.loads(config.to_json_string(use_diff=False))
    return {name: value for name, value in values.items() if name not in NO_SETTINGS}


@contextmanager
def changed(model: PreTrainedModel, key: Callable) -> Iterator[PreTrainedModel]:
    """Hooks of this package change what the model does for the length of a `with` block; `key()` says how, where it is asked for."""
    model.hooked = [*_changes(model), key]
    try:
        yield model
    finally:
        model.hooked = _changes(model)[:-1]


def _changes(model):
    return getattr(model, "hooked", [])


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of a tokenizer in full: words, merges, normaliser, special tokens, chat template, side of the padding."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend else tokenizer.get_vocab()
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    rest = [tokenizer.chat_template, special, tokenizer.padding_side, tokenizer.model_max_length]
    return digest({k: v for k, v in rules.items() if k not in CALLED_WITH or not backend}, rest)
