"""The table of all rules that find safety neurons; chapters, `safetyneuron league` and the tests run over it.

To add a rule, write a function from `Case` to scores, and a row here. A function returns a dict of (layers, channels) per
projection, or two such dicts where what the second selects is left out of what the first selects.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from safetyneuron.detectors import channels, consensus, gradients
from safetyneuron.detectors.change_scores import change_scores
from safetyneuron.detectors.direction import alignment_with, refusal_directions
from safetyneuron.detectors.heads import safety_heads
from safetyneuron.detectors.relevance import relevance
from safetyneuron.detectors.saliency import snip, wanda
from safetyneuron.detectors.softmax import star
from safetyneuron.neurons.architecture import PROJECTIONS, Architecture
from safetyneuron.neurons.sets import NeuronSet, unit_kinds

ZHAO = "Zhao et al. 2025"


@dataclass(frozen=True)
class Rule:
    """A way of finding safety neurons.

    Attributes
    ----------
    find : callable
        From a `Case` to scores, or to scores and those left out.
    label, family : str
        What figures call it, and what it belongs to.
    source, equation : str
        Where it is from, "after …" where it was built from a description; the equation where the source was read.
    assumes : str
        What must hold for it to find safety neurons.
    needs : tuple of str
        Fields of `Case` besides harmful and benign requests: `general`, `refusals`, `helpful`, `base`, `languages`.
    """

    find: Callable
    label: str
    family: str
    source: str
    assumes: str
    equation: str = ""
    needs: tuple[str, ...] = ()


def saliency(case, measure):
    """Saliency on refusals, less what is salient on helpful answers."""
    return tuple(measure(case.model, case.tokenizer, x) for x in (case.refusals, case.helpful))


def changed(case):
    """Change scores: how far activations moved in alignment."""
    found = change_scores(case.base, case.model, case.tokenizer, case.harmful)
    return found.over_projections()


def along_refusal(case):
    """|cosine| of a neuron's weights with the refusal direction."""
    prompts = case.harmful, case.benign
    return alignment_with(case.model, refusal_directions(case.model, case.tokenizer, *prompts))


def norms(case):
    """Norm of every row and column: a control that has seen no request."""
    architecture = Architecture(case.model)
    return {
        p: torch.stack(
            [
                architecture.place(layer, p).weight.detach().float().norm(dim=1).cpu()
                for layer in range(len(architecture.layers))
            ]
        )
        for p in PROJECTIONS
    }


def random_scores(like, seed):
    """Uniform scores of functional units, the same for all rows and columns of one, in the shape of others or of masks."""
    generator, drawn = torch.Generator().manual_seed(seed), {}
    for projections in unit_kinds({p: x.shape for p, x in like.items()}).values():
        values = torch.rand(like[projections[0]].shape, generator=generator)
        drawn |= dict.fromkeys(projections, values)
    return {p: drawn[p] for p in PROJECTIONS}


# Reading of importance -> (its label, source, equation, what it assumes of the reading).
_READINGS = {
    "exact": ("exact", ZHAO, "Eq 1", "what a neuron does to its block's output"),
    "first_order": ("first order", f"after {ZHAO}", "", "the same, to first order in the logits"),
    "paper": ("paper", ZHAO, "Eq 9 and 12", "the same, by the printed formulas"),
    "released": ("released", f"code of {ZHAO}", "", "the same, by the released code"),
}
# Variant -> (label, function, what it assumes, what it needs).
VARIANTS = {
    "eq3": ("Eq 3", consensus.eq_3, "matters on every harmful request", ()),
    "foundation": (
        "without foundation",
        consensus.without_foundation,
        "matters on every harmful request and not on every general one",
        ("general",),
    ),
    "contrast": (
        "harmful − benign",
        consensus.difference,
        "matters more on harmful requests than on harmless ones",
        (),
    ),
}


def _importance_rules():
    for reading, (name, source, equation, meaning) in _READINGS.items():
        for variant, (label, find, assumes, needs) in VARIANTS.items():
            yield (
                f"{reading}/{variant}",
                Rule(
                    partial(find, rule=reading),
                    f"{name}, {label}",
                    "importance",
                    source,
                    f"safety is {meaning}: it {assumes}",
                    equation
                    if variant == "contrast"
                    else ", ".join(filter(None, (equation, "Eq 3"))),
                    needs,
                ),
            )


_ODDS = "what alignment added shows in the odds of refusing"
DETECTORS: dict[str, Rule] = dict(_importance_rules()) | {
    "snip": Rule(
        partial(saliency, measure=snip),
        "SNIP, safety − utility",
        "saliency",
        "Wei et al. 2024",
        "safety weights move the loss of refusals, and not that of help",
        "",
        ("refusals", "helpful"),
    ),
    "wanda": Rule(
        partial(saliency, measure=wanda),
        "Wanda, safety − utility",
        "saliency",
        "Wei et al. 2024",
        "safety weights carry large inputs on refusals, and not on help",
        "",
        ("refusals", "helpful"),
    ),
    "change": Rule(
        changed,
        "change score",
        "activation",
        "Chen et al. 2025",
        "alignment changed what feed-forward safety neurons put out, given the model before",
        "",
        ("base",),
    ),
    "direction": Rule(
        along_refusal,
        "refusal direction",
        "weights",
        "after Arditi et al. 2024",
        "safety neurons read or write along the difference of mean states, where they read or write",
    ),
    "gradient/signed": Rule(
        gradients.signed,
        "gradient × activation",
        "gradient",
        "after Molchanov et al. 2019",
        f"{_ODDS}, to first order down to zero",
    ),
    "gradient/size": Rule(
        gradients.absolute,
        "|gradient × activation|",
        "gradient",
        "after Molchanov et al. 2019",
        f"{_ODDS}, in either direction",
    ),
    "gradient/contrast": Rule(
        gradients.contrast,
        "weight × gradient, harmful − benign",
        "gradient",
        "after Lee et al. 2019",
        f"{_ODDS} of harmful requests more than of harmless ones",
    ),
    "attribution/mean": Rule(
        gradients.attribution,
        "attribution patching",
        "gradient",
        "after Nanda 2023",
        f"{_ODDS}, to first order towards the mean on harmless requests",
    ),
    "attribution/twin": Rule(
        gradients.attribution_to_twin,
        "attribution patching, twins",
        "gradient",
        "after Nanda 2023",
        f"{_ODDS}, to first order towards a harmless request of the same length",
    ),
    "attribution/star": Rule(
        star,
        "AtP*",
        "gradient",
        "after Kramár et al. 2024",
        f"{_ODDS}, to first order but for the softmax of attention",
    ),
    "attribution/integrated": Rule(
        gradients.integrated,
        "integrated gradients",
        "gradient",
        "after Sundararajan et al. 2017",
        f"{_ODDS}, when all activations leave their mean together",
    ),
    "relevance": Rule(
        relevance,
        "RelP",
        "gradient",
        "after Rezaei Jafari et al. 2025",
        f"{_ODDS}, through norms, activations and gates taken as linear",
    ),
    "cna": Rule(
        channels.mean_difference,
        "CNA",
        "activation",
        "after Herring et al. 2026",
        "safety channels differ most in the mean between harmful and harmless requests",
    ),
    "effect": Rule(
        channels.effect_size,
        "SafeNeuron effect size",
        "activation",
        "Wang et al. 2026",
        "safety channels rise on harmful requests, in units of their spread",
        "Eq 5 and 6",
    ),
    "perturbation": Rule(
        channels.perturbation,
        "perturbation probing",
        "activation",
        "after Liu et al. 2026",
        "a slip in the request moves safety channels, which write straight to the answer's words",
    ),
    "probe": Rule(
        channels.sparse_probe,
        "sparse probe",
        "activation",
        "after Gurnee et al. 2023",
        "safety channels are those that tell harmful requests from harmless ones best",
    ),
    "heads": Rule(
        safety_heads,
        "Ships, spread over neurons",
        "attention heads",
        "after Zhou et al. 2025",
        "safety lies in whole heads, and shows in the first token of an answer",
    ),
    "shared": Rule(
        consensus.shared,
        "shared over languages",
        "importance",
        "after Zhang et al. 2026",
        "safety neurons are the same in every language",
        "",
        ("languages",),
    ),
    "control/norm": Rule(
        norms, "row norm", "control", "", "nothing of requests: what sizes alone give away"
    ),
    "control/benign": Rule(
        consensus.on_benign,
        "importance on harmless requests",
        "control",
        "",
        "nothing of harm: what activity alone gives away",
    ),
    "control/random": Rule(
        lambda case: random_scores(NeuronSet.empty(case.model).masks, 0),
        "random",
        "control",
        "",
        "nothing",
    ),
}
