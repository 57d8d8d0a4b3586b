"""Organisms as files: safetensors and a manifest beside this module, the same to the bit everywhere.

`$SAFETYNEURON_ORGANISMS` may name a folder that `safetyneuron train` has filled: what it holds comes
before what is shipped.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from safetyneuron.cache import cache_folder, file_digest, locked, new_file
from safetyneuron.errors import SafetyNeuronError
from safetyneuron.neurons.architecture import PROJECTIONS, Architecture, multiply_factors
from safetyneuron.neurons.sets import NeuronSet
from safetyneuron.organism.recipes import Size
from safetyneuron.organism.tokenizer import CONTEXT, build_tokenizer

SHIPPED = Path(__file__).resolve().parent / "weights"
MANIFEST = "manifest.json"
KINDS = ("weights", "rows", "factors")
GROUPS = ("planted", "decoys")
NEEDED = {"sha256", "kind", "parent", "recipe"}  # of every entry


@dataclass(frozen=True)
class Stored:
    """One organism where it was found: name without `organism/`, folder, entry of the manifest."""

    key: str
    folder: Path
    entry: dict

    @property
    def path(self):
        return weights_file(self.folder, self.key)


def weights_file(folder, name):
    """Where the numbers of an organism (`llama-chat@3`) lie in a folder of weights."""
    return Path(folder) / f"{name}.safetensors"


def load_organism(name, folder=None):
    """An organism and its tokenizer: float32, on the CPU, ready to answer greedily.

    Parameters
    ----------
    name : str
        `organism/llama-chat`, or with a seed other than 0, `organism/llama-chat@3`.
    folder : path, optional
        Of weights, looked at before the shipped ones; by default `$SAFETYNEURON_ORGANISMS`.

    Returns
    -------
    (transformers.PreTrainedModel, transformers.PreTrainedTokenizerFast)

    Raises
    ------
    SafetyNeuronError
        If there is no organism of that name and seed, or its file is missing, damaged or of another
        language.
    """
    tokenizer = build_tokenizer()
    return _model(find(name, folder), tokenizer), tokenizer


def starting_model(name):
    """An organism with its planted neurons reverted, decoys as they are, and its tokenizer.

    Raises
    ------
    SafetyNeuronError
        As `load_organism`, or if nothing is planted in that organism.
    """
    stored, tokenizer = find(name), build_tokenizer()
    tensors = _rows(stored, "planted")
    return _put_rows(_changed(stored, tokenizer), tensors, "decoys"), tokenizer


def planted_neurons(name, folder=None):
    """The neurons that alignment was planted into, as a `NeuronSet`; name and folder as for `load_organism`.

    Raises
    ------
    SafetyNeuronError
        As `starting_model`.
    """
    return _neurons(find(name, folder), "planted")


def decoy_neurons(name, folder=None):
    """The neurons that a harmless habit was planted into, as a `NeuronSet`; name and folder as for `load_organism`.

    Raises
    ------
    SafetyNeuronError
        As `load_organism`, or if that organism has no decoys.
    """
    return _neurons(find(name, folder), "decoys")


def names():
    """Names of the organisms there are, without their seeds."""
    return tuple(dict.fromkeys(f"organism/{key.partition('@')[0]}" for key in manifest()))


def manifest(folder=None):
    """What is known of every organism: from `llama-chat@3` to its recipe, scores, curve and more; folder as for `load_organism`."""
    found = {}
    for place in reversed(_folders(folder)):
        found |= _read_manifest(place)
    return dict(sorted(found.items()))


def training_curve(name):
    """Loss during the training of an organism: a list of {step, loss}."""
    return [{"step": step, "loss": loss} for step, loss in find(name).entry["curve"]]


def config_of(size, tokenizer):
    """The configuration of a model of a `Size`."""
    return AutoConfig.for_model(
        size.family,
        vocab_size=len(tokenizer),
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.groups,
        intermediate_size=size.channels,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        **({"sliding_window": size.window} if size.window else {}),
    )


def write_weights(model, path):
    """Write all weights in half precision, tied ones once."""
    _write(path, {name: p.detach().half() for name, p in model.named_parameters()})


def write_rows(path, planted, decoys, model):
    """Write what a trained model has in its planted neurons and decoys, in half precision.

    Parameters
    ----------
    planted, decoys : NeuronSet
        `decoys` may be None.

    Raises
    ------
    SafetyNeuronError
        If the sets share a neuron: reverting one would then change the other.
    """
    if decoys is not None and len(planted & decoys):
        raise SafetyNeuronError(
            "some neurons are both planted and decoys: draw sets that share none"
        )
    architecture, tensors = Architecture(model), {}
    for group, neurons in zip(GROUPS, (planted, decoys)):
        for projection, layer, channels in neurons.by_layer() if neurons is not None else ():
            prefix = f"{group}.{projection}.{layer}"
            weight = architecture.place(layer, projection).weight.detach().cpu()
            tensors[f"{prefix}.channels"] = channels.to(torch.int16)
            tensors[f"{prefix}.rows"] = weight[channels].half()
    _write(path, tensors)


def write_factors(path, factors):
    """Write (IA)³ factors (layers, channels) in single precision."""
    _write(path, {"factors": factors.detach().float()})


def _write(path, tensors):
    with new_file(path) as temporary:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary)


def add_to_manifest(folder, name, entry):
    """Add an organism, whose file is written, to the manifest of a folder.

    Parameters
    ----------
    name : str
        `llama-chat@3`
    entry : dict
        What the manifest says of it; file and checksums, also of the parent's file, are filled in.

    Raises
    ------
    SafetyNeuronError
        If there is no parent of the name that the entry gives.
    """
    folder, path = Path(folder).resolve(), weights_file(folder, name)
    entry = entry | {"file": path.name, "sha256": file_digest(path)}
    if entry["parent"]:
        entry["parent_sha256"] = _parent(Stored(name, folder, entry)).entry["sha256"]
    _change_manifest(folder, name, entry)


def add_measures(folder, name, measures):
    """Add what was measured on an organism (`scores`, `key`, `missed`) to its entry of a folder's manifest, under its full name (`llama-chat@3`)."""
    _change_manifest(Path(folder).resolve(), name, measures)


def _change_manifest(folder, name, changes):
    # The lock is not beside the manifest, where it would be committed.
    with locked(cache_folder() / "organism" / MANIFEST):
        models = _read_manifest(folder) if (folder / MANIFEST).exists() else {}
        models[name] = models.get(name, {}) | changes
        lines = [
            f"{json.dumps(key)}: {json.dumps(models[key], ensure_ascii=False)}"
            for key in sorted(models)
        ]
        with new_file(folder / MANIFEST) as temporary:
            temporary.write_text('{"models": {\n' + ",\n".join(lines) + "\n}}\n", encoding="utf-8")


def _folders(first=None):
    """Folders to look into, in that order; `first` may be one that a training is yet to fill."""
    own = first or os.environ.get("SAFETYNEURON_ORGANISMS")
    if not own or (first and not (Path(first) / MANIFEST).exists()):
        return [SHIPPED]
    return list(dict.fromkeys((Path(own).resolve(), SHIPPED)))


def _read_manifest(folder):
    """The entries of a folder, by name."""
    path = folder / MANIFEST
    try:
        models = json.loads(path.read_text(encoding="utf-8"))["models"]
        whole = all(NEEDED <= set(entry) and entry["kind"] in KINDS for entry in models.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or "it is no list of organisms"
        raise SafetyNeuronError(f"{path} cannot be read ({reason}): {_restore(path)}") from None
    if not whole:
        raise SafetyNeuronError(
            f"{path} has an entry without kind, parent, recipe or checksum: {_restore(path)}"
        )
    return models


def _restore(path):
    if path.is_relative_to(SHIPPED):
        return f"restore it with `git checkout {path}`"
    return (
        "set SAFETYNEURON_ORGANISMS to a folder that `safetyneuron train` has filled, or unset it"
    )


def full_name(name):
    """The name of an organism with its seed, 0 if it names none."""
    kind, at, seed = name.partition("@")
    return f"{kind}@{seed if at else 0}"


def find(name, folder=None):
    """The `Stored` organism of a name."""
    key = full_name(name)
    kind = key.partition("@")[0]
    found = key.startswith("organism/") and _look_up(
        key.removeprefix("organism/"), _folders(folder)
    )
    if found:
        return found
    if kind not in names():
        raise SafetyNeuronError(f"no organism is called {name!r}: use one of {', '.join(names())}")
    seeds = [
        there.partition("@")[2]
        for there in manifest()
        if f"organism/{there}".startswith(f"{kind}@")
    ]
    cure = (
        f", or make it with `safetyneuron train {key}`" if key.partition("@")[2].isdecimal() else ""
    )
    raise SafetyNeuronError(f"there is no {key}: use seed {', '.join(seeds)} after the @{cure}")


def _look_up(key, folders):
    """The `Stored` organism of the first folder that has it, or None."""
    for folder in folders:
        if entry := _read_manifest(folder).get(key):
            return Stored(key, folder, entry)
    return None


def _parent(stored):
    """What an organism was made from."""
    key = stored.entry["parent"]
    parent = _look_up(key, _folders(stored.folder))
    if not parent:
        raise SafetyNeuronError(
            f"organism/{stored.key} was made from organism/{key}, which is missing:"
            f" {_cure(stored, key)}"
        )
    return parent


def _changed(stored, tokenizer):
    """The model that an organism is a change of; it must be the one that the change was made on."""
    parent = _parent(stored)
    if parent.entry["sha256"] != stored.entry.get("parent_sha256"):
        raise SafetyNeuronError(
            f"organism/{stored.key} was made from another organism/{parent.key}: {_cure(stored)}"
        )
    return _model(parent, tokenizer)


def _cure(stored, key=None):
    """How to get the file of an organism, or of its parent, again."""
    train = f"`safetyneuron train organism/{key or stored.key}"
    if stored.folder != SHIPPED:
        return f"make it again with {train} -o {stored.folder}`"
    path = weights_file(stored.folder, key or stored.key)
    return f"restore it with `git checkout {path}`, or make it again with {train}`"


def _tensors(stored):
    """The numbers of an organism's file, whose checksum is compared once a process."""
    try:
        found = file_digest(stored.path)
    except OSError as error:
        raise SafetyNeuronError(
            f"{stored.path} cannot be read ({error.strerror}): {_cure(stored)}"
        ) from None
    if found != stored.entry["sha256"]:
        raise SafetyNeuronError(
            f"{stored.path} is damaged, its checksum is not that of the manifest: {_cure(stored)}"
        )
    return load_file(stored.path)


def _model(stored, tokenizer):
    """The model of an organism, through all that it is a change of."""
    if stored.entry["kind"] == "weights":
        return _whole_model(stored, tokenizer)
    model, tensors = _changed(stored, tokenizer), _tensors(stored)
    if stored.entry["kind"] == "factors":
        return multiply_factors(model, tensors["factors"])
    return _put_rows(model, tensors, *GROUPS)


@torch.no_grad()
def _whole_model(stored, tokenizer):
    """A model whose weights are all in the file."""
    tensors, size = _tensors(stored), stored.entry["recipe"]["size"]
    # A new model draws its weights, which no one is to notice.
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config_of(Size(**size), tokenizer)).float().eval()
    parameters = dict(model.named_parameters())
    if {n: p.shape for n, p in parameters.items()} != {n: t.shape for n, t in tensors.items()}:
        raise SafetyNeuronError(
            f"{stored.path} does not fit the language as it is now: {_cure(stored)}"
        )
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model.generation_config = GenerationConfig(do_sample=False, **ends)
    return model


def _rows(stored, group):
    """The numbers of an organism in which a group of neurons is planted."""
    tensors = _tensors(stored) if stored.entry["kind"] == "rows" else {}
    if not any(name.startswith(f"{group}.") for name in tensors):
        what = "planted neurons" if group == "planted" else group
        raise SafetyNeuronError(
            f"organism/{stored.key} has no {what}: use one that has, as organism/llama-planted"
        )
    return tensors


def _channels(tensors, *groups):
    """Projection, layer, channels and rows of groups of neurons."""
    for name in sorted(tensors):
        group, projection, layer, what = name.split(".") if name.count(".") == 3 else ("",) * 4
        if group in groups and what == "channels":
            yield (
                projection,
                int(layer),
                tensors[name].long(),
                tensors[name.replace("channels", "rows")],
            )


@torch.no_grad()
def _put_rows(model, tensors, *groups):
    """Replace rows and columns of the model by those of groups, in place."""
    architecture = Architecture(model)
    for projection, layer, channels, rows in _channels(tensors, *groups):
        architecture.place(layer, projection).weight[channels] = rows.float()
    return model


def _neurons(stored, group):
    tensors = _rows(stored, group)
    shapes = NeuronSet.empty(_changed(stored, build_tokenizer())).shapes
    return NeuronSet.from_cells(shapes, (cells[:3] for cells in _channels(tensors, group)))


def answer_key(stored):
    """Layers and channels of planted neurons and decoys, for JSON; empty for other organisms."""
    key = {}
    for group in GROUPS if stored.entry["kind"] == "rows" else ():
        for projection, layer, channels, _ in _channels(_tensors(stored), group):
            key.setdefault(group, {p: [] for p in PROJECTIONS})[projection] += [
                [layer, c] for c in channels.tolist()
            ]
    return key
