"""From importance to safety neurons: a running minimum and mean over prompts, and selection."""

import json
from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from safetyneuron.architecture import PROJECTIONS
from safetyneuron.cache import digest, new_file
from safetyneuron.data import encode_prompts, pad
from safetyneuron.errors import SafetyNeuronError
from safetyneuron.recording import RULES, recording
from safetyneuron.models import fingerprint
from safetyneuron.neurons import NeuronSet
from safetyneuron.progress import steps


@dataclass
class ImportanceProfile:
    """Importance of every neuron over a corpus.

    A neuron belongs to the intersection over prompts {importance ≥ ε} (Zhao et al. 2025, Eq 3) exactly when its
    minimum over prompts is ≥ ε, so the minimum answers Eq 3 for every ε at once.

    Attributes
    ----------
    minimum, mean : dict of str to torch.Tensor
        (layers, channels) per projection `q k v o gate up down`, in units of the residual stream.
    count : int
        Prompts measured.
    rule, model, tokenizer : str
        The importance rule, and fingerprints of what was measured.
    """

    minimum: dict
    mean: dict
    count: int
    rule: str
    model: str
    tokenizer: str

    def select(self, threshold=None, fraction=None, per_layer=None):
        """The safety neurons: give exactly one of the three.

        Parameters
        ----------
        threshold : float, optional
            ε of Eq 2: minimum importance at or above it.
        fraction : float, optional
            Share of all neurons, in (0, 1], with the largest minimum.
        per_layer : int, optional
            That many per layer and projection, as the paper's released code does.

        Returns
        -------
        NeuronSet

        Raises
        ------
        SafetyNeuronError
            If not exactly one is given or one is out of range.
        """
        if sum(x is not None for x in (threshold, fraction, per_layer)) != 1:
            raise SafetyNeuronError("select needs exactly one of threshold, fraction, per_layer")
        if threshold is not None:
            return NeuronSet({p: scores >= threshold for p, scores in self.minimum.items()})
        if fraction is not None:
            return select_fraction(self.minimum, fraction)
        return select_per_layer(self.minimum, per_layer)

    def save(self, path):
        """Write the profile to a safetensors file."""
        tensors = {f"{kind}.{p}": getattr(self, kind)[p].contiguous() for kind in ("minimum", "mean") for p in PROJECTIONS}
        facts = {"count": self.count, "rule": self.rule, "model": self.model, "tokenizer": self.tokenizer}
        with new_file(path) as temporary:
            save_file(tensors, temporary, {"profile": json.dumps(facts)})

    @classmethod
    def load(cls, path):
        """Read a file written by `save`."""
        try:
            with safe_open(path, "pt") as stored:
                facts = json.loads(stored.metadata()["profile"])
                read = {kind: {p: stored.get_tensor(f"{kind}.{p}") for p in PROJECTIONS} for kind in ("minimum", "mean")}
                return cls(**read, **facts)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise SafetyNeuronError(f"{path} is not a readable importance profile ({error}): measure it again") from None


def select_fraction(scores, fraction):
    """The `fraction` of all neurons with the highest scores; ties go to the earlier projection, layer, channel.

    scores: dict of (layers, channels) per projection. At least one neuron is selected.
    """
    if not 0 < fraction <= 1:
        raise SafetyNeuronError(f"fraction is {fraction}: it must be in (0, 1], for example 0.01 for one percent")
    flat = torch.cat([scores[p].flatten() for p in PROJECTIONS])
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[flat.argsort(descending=True, stable=True)[: max(1, round(fraction * len(flat)))]] = True
    parts = chosen.split([scores[p].numel() for p in PROJECTIONS])
    return NeuronSet({p: part.view(scores[p].shape) for p, part in zip(PROJECTIONS, parts)})


def select_without_foundation(profile, general, fraction):
    """N_safe without N_foundation, at a given budget (Zhao et al. 2025, §4; Eq 3 for both sets).

    Both sets take the same share of neurons; the share is the smallest one at which the difference holds
    `fraction` of all neurons.

    Parameters
    ----------
    profile, general : ImportanceProfile
        Measured on harmful prompts and on general ones.
    fraction : float
        Size of the result, as a share of all neurons, in (0, 1].
    """
    safe, foundation = ranks(profile.minimum), ranks(general.minimum)
    target = len(select_fraction(profile.minimum, fraction))
    both = torch.bincount(torch.maximum(safe, foundation), minlength=len(safe)).cumsum(0)
    sizes = torch.arange(1, len(safe) + 1) - both
    if sizes.max() < target:
        raise SafetyNeuronError(f"only {int(sizes.max())} neurons differ between the two sets: choose a fraction below {sizes.max() / len(safe):.3f}")
    share = (int((sizes >= target).nonzero()[0]) + 1) / len(safe)
    return select_fraction(profile.minimum, share) - select_fraction(general.minimum, share)


def ranks(scores):
    """Rank of every neuron, 0 for the highest score, flat in the order of `PROJECTIONS`."""
    order = torch.cat([scores[p].flatten() for p in PROJECTIONS]).argsort(descending=True, stable=True)
    return torch.empty_like(order).scatter(0, order, torch.arange(len(order)))


def select_per_layer(scores, count):
    """The `count` neurons with the highest scores in every layer of every projection."""
    if count < 1:
        raise SafetyNeuronError(f"per_layer is {count}: it must be at least 1")
    masks = {}
    for projection, score in scores.items():
        top = score.argsort(dim=1, descending=True, stable=True)[:, :count]
        masks[projection] = torch.zeros_like(score, dtype=torch.bool).scatter(1, top, True)
    return NeuronSet(masks)


def measure_importance(model, tokenizer, prompts, rule="exact", batch_size=16, progress=True):
    """Importance of every neuron of `model` for every prompt, in one forward pass per batch.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    tokenizer : transformers.PreTrainedTokenizerBase
        Its chat template formats the prompts; without one they are used as they are.
    prompts : list of str
        User requests.
    rule : str
        `exact`, `first_order`, `paper` or `released`.
    batch_size : int
        Prompts a forward pass; the result does not depend on it.
    progress : bool
        Whether to print a line every ten seconds.

    Returns
    -------
    ImportanceProfile

    Raises
    ------
    SafetyNeuronError
        If there are no prompts, one is longer than the context, or the rule is unknown.
    UnsupportedArchitecture
        If the model is not in the architecture table.
    """
    if rule not in RULES:
        raise SafetyNeuronError(f"unknown importance rule {rule!r}: use one of {', '.join(RULES)}")
    encoded = encode_prompts(model, tokenizer, prompts)
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    minimum, total = {}, {}
    with torch.inference_mode(), recording(model, rule) as recorder:
        for start in steps(range(0, len(order), batch_size), "importance", progress):
            batch = pad([encoded[i] for i in order[start : start + batch_size]], tokenizer, model.device)
            recorder.start(batch["attention_mask"])
            model.get_decoder()(**batch, use_cache=False)
            for p, scores in recorder.finish().items():
                lowest, summed = scores.amin(0), scores.double().sum(0)
                minimum[p] = torch.minimum(minimum[p], lowest) if p in minimum else lowest
                total[p] = total.get(p, 0) + summed
    mean = {p: (summed / len(prompts)).float() for p, summed in total.items()}
    return ImportanceProfile(
        minimum, mean, len(prompts), rule, fingerprint(model), digest(tokenizer.get_vocab(), tokenizer.chat_template)
    )
