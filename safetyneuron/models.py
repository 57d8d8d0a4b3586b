"""Load a model and its tokenizer by name: an organism, a Hugging Face id, or a local folder."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from safetyneuron.cache import cache_folder
from safetyneuron.errors import SafetyNeuronError
from safetyneuron.neurons.factors import apply_factors
from safetyneuron.neurons.files import read_tensors
from safetyneuron.organism import shipped
from safetyneuron.progress import without_bars

FACTORS = "factors.safetensors"  # of an aligned model
TRAININGS = 5  # of every aligned model, as Chen et al. have
# Models that were trained on conversations but whose tokenizer does not say how they are written: part of the name -> template.
CHAT_TEMPLATES = {
    "vicuna": "{{ bos_token or '' }}A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the"
    " user's questions.{% for m in messages %}{% if m['role'] == 'user' %} USER: {{ m['content'] }}{% else %} ASSISTANT: {{ m['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
}


def load_model(name, device=None, dtype=None):
    """Model and tokenizer, ready to be measured.

    Parameters
    ----------
    name : str
        An organism (`organism/llama-chat`, with a seed other than 0 `organism/llama-chat@3`; see `safetyneuron.organism.names()`), a
        model that `safetyneuron train` aligned (`aligned/…`), a
        Hugging Face id, with a revision after `@`, or a folder in Hugging Face format. `$SAFETYNEURON_MODELS` may hold folders under their
        Hugging Face ids; they come before the hub.
    device : str, optional
        `cpu`, `cuda`, … ; by default the GPU if there is one; `auto`, the default where there are several, splits the model over them.
    dtype : str, optional
        `float32`, `bfloat16`, … ; by default, and with `auto`, float32 for organisms, the stored one otherwise.

    Returns
    -------
    (transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase)

    Raises
    ------
    SafetyNeuronError
        If the name, the device or the dtype is unknown.
    """
    device = device or (
        "auto" if torch.cuda.device_count() > 1 else "cuda" if torch.cuda.is_available() else "cpu"
    )
    placed = {"device_map": "auto"} if device == "auto" else {"device_map": {"": _device(device)}}
    if name.startswith("organism/"):
        return _shipped(name, device, dtype)
    if name.startswith("aligned/"):
        return _aligned(name, device, dtype)
    dtype = _dtype(dtype) if dtype not in (None, "auto") else "auto"
    source, chosen = source_of(name)
    try:
        with without_bars():
            tokenizer = AutoTokenizer.from_pretrained(source, **chosen)
            model = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, use_safetensors=True, **placed, **chosen
            )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SafetyNeuronError(
            f"cannot load model {name!r}: it is not one of {', '.join(shipped.names())}, and as a folder or Hugging Face id it says: {reason}"
        ) from None
    return model.eval(), _ready(tokenizer, name)


def _ready(tokenizer, name):
    """A tokenizer that can pad, and write a conversation where its model was trained on some."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    tokenizer.chat_template = tokenizer.chat_template or next(
        (t for word, t in CHAT_TEMPLATES.items() if word in name.lower()), None
    )
    return tokenizer


def chat_template_of(name):
    """The chat template of a model by name; of no name, none.

    Raises
    ------
    SafetyNeuronError
        If the model has none, or its tokenizer cannot be loaded.
    """
    if not name:
        return None
    source, chosen = source_of(name)
    try:
        tokenizer = _ready(AutoTokenizer.from_pretrained(source, **chosen), name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SafetyNeuronError(f"cannot load the tokenizer of {name!r}: {reason}") from None
    if not tokenizer.chat_template:
        raise SafetyNeuronError(f"{name} has no chat template: name a model that has one, or none")
    return tokenizer.chat_template


def _aligned(name, device, dtype):
    """An aligned model: the model that its training began with, and its factors. Its tokenizer has the template of the training."""
    folder = aligned_folder(name)
    with read_tensors(folder / FACTORS, "factors", f"`safetyneuron train {name}`") as (kept, facts):
        factors, start = kept["factors"], facts["start"]
    model, _ = load_model(start, device, dtype)
    apply_factors(model, factors)
    return model, _ready(AutoTokenizer.from_pretrained(folder), name)


def _shipped(name, device, dtype):
    """An organism that is shipped as a file, on one device."""
    model, tokenizer = shipped.load_organism(name)
    place = (
        ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else _device(device)
    )
    return model.to(place, model.dtype if dtype in (None, "auto") else _dtype(dtype)), tokenizer


def trainings_of(name: str, most: int) -> list[str]:
    """Names of the trainings of an organism or an aligned model, at most so many (`organism/llama-chat`, `organism/llama-chat@1`, …); other models have one."""
    short, there = name.removeprefix("organism/"), 1
    if name.startswith("organism/"):
        there = sum(key.partition("@")[0] == short for key in shipped.manifest())
    elif name.startswith("aligned/"):
        there = TRAININGS
    return [name] + [f"{name}@{seed}" for seed in range(1, min(most, there))]


class Loaded(Mapping):
    """Models by name, as `load_model` gives them: loaded when asked for, and on a GPU one at a time.

    Parameters
    ----------
    names : list of str
    dtype : str, optional
    templates : dict, optional
        Model to the one whose chat template it gets, or to nothing (`""`) for none: others keep their own.
    """

    def __init__(self, names, dtype=None, templates=None):
        self.names, self.dtype, self.templates, self.held = list(names), dtype, templates or {}, {}

    def __getitem__(self, name):
        if name not in self.names:
            raise KeyError(name)
        if name not in self.held:
            if torch.cuda.is_available():
                self.held.clear()
                torch.cuda.empty_cache()
            model, tokenizer = load_model(name, dtype=self.dtype)
            if name in self.templates:
                tokenizer.chat_template = chat_template_of(self.templates[name])
            self.held[name] = model, tokenizer
        return self.held[name]

    def __iter__(self):
        return iter(self.names)

    def __len__(self):
        return len(self.names)


def source_of(name):
    """Folder or Hugging Face id of a model, and its revision as an argument, if it has one."""
    if name.startswith("organism/"):
        raise SafetyNeuronError(
            f"{name} is no folder: write one with `safetyneuron export {name} FOLDER`"
        )
    repository, _, revision = name.partition("@")
    local = local_model(repository)
    return (local, {}) if local else (repository, {"revision": revision} if revision else {})


def aligned_folder(name):
    """The folder of an aligned model (`aligned/llama2-7b-dpo`) that `safetyneuron train` made last."""
    home = cache_folder() / name
    try:
        return home / (home / "current").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise SafetyNeuronError(
            f"there is no {name} yet: make it with `safetyneuron train {name}`"
        ) from None


def local_model(repository):
    """The folder that stands for a Hugging Face id: in `$SAFETYNEURON_MODELS`, or the path itself; else None."""
    folder = os.environ.get("SAFETYNEURON_MODELS")
    paths = ([Path(folder) / repository] if folder else []) + [Path(repository)]
    return next((path for path in paths if (path / "config.json").is_file()), None)


def _device(text):
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SafetyNeuronError(
            f"device {text!r} cannot be used ({str(error).splitlines()[0]}): use 'cpu' or an installed GPU"
        ) from None
    return device


def _dtype(text):
    dtype = getattr(torch, text, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise SafetyNeuronError(
            f"dtype {text!r} is not a floating point type: use float32, bfloat16, float16 or float64"
        )
    return dtype
