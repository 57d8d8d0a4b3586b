"""The three searches of Tables 2 and 3 from the settings of a notebook."""

from dataclasses import fields

from safetyneuron.attacks.autodan import AutoDAN
from safetyneuron.attacks.gcg import GCG
from safetyneuron.attacks.pair import PAIR
from safetyneuron.attacks.rewriters import ChatJudge, ChatRewriter, RuleJudge, TemplateRewriter
from safetyneuron.data.prompts import load_prompts
from safetyneuron.errors import SafetyNeuronError

PLUGS = ("rewriter", "judge", "starts")  # which are no settings


def searches(gcg, autodan, pair, attacker, language, starts=""):
    """GCG, AutoDAN and PAIR by name.

    Parameters
    ----------
    gcg, autodan, pair : dict
        Settings that differ from the defaults, which are HarmBench's.
    attacker : str
        Who rewrites prompts and judges answers: `organism/templates`, or a chat model by name.
    language : str
        Of the organism's templates.
    starts : str
        Set of prompts that AutoDAN begins with, as for `load_prompts`; without one it begins with the request in other words.

    Raises
    ------
    SafetyNeuronError
        If a setting is unknown or not positive.
    """
    organism = attacker == "organism/templates"
    rewriter = {"rewriter": TemplateRewriter(language) if organism else ChatRewriter(attacker)}
    begun = {"starts": tuple(load_prompts(starts))} if starts else {}
    judge = {"judge": RuleJudge() if organism else ChatJudge(attacker)}
    return {
        "GCG": _config(GCG, gcg),
        "AutoDAN": _config(AutoDAN, autodan, **rewriter, **begun),
        "PAIR": _config(PAIR, pair, **rewriter, **judge),
    }


def _config(kind, settings, **plugs):
    known = [field.name for field in fields(kind) if field.name not in PLUGS]
    for name, value in settings.items():
        if name not in known:
            raise SafetyNeuronError(
                f"{kind.__name__} has no setting {name!r}: it has {', '.join(known)}"
            )
        if name != "seed" and not value > 0:
            raise SafetyNeuronError(f"{kind.__name__}.{name} is {value}: it must be positive")
    return kind(**settings, **plugs)
