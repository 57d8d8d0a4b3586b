"""The answer key: what every functional unit does alone, and what every detector finds of what was planted, computed once and kept."""

from collections.abc import Sequence

import pandas as pd

from safetyneuron.cache import remember
from safetyneuron.data.prompts import load_prompts
from safetyneuron.detectors.effects import Unit, all_units, measure_effects
from safetyneuron.models import load_model
from safetyneuron.neurons.activations import channel_means
from safetyneuron.neurons.identity import identity

SEEN_THROUGH = ("organism/llama-chat", "organism/llama-planted")  # unit by unit
ABLATIONS = ("zero", "mean")
EFFECTS = "safetyneuron.detectors.effects"  # the module whose code decides them


def asked_of_units() -> dict[str, list[str]]:
    """Requests by part: harmful ones to search by, others to score by, and harmless ones."""
    return {
        "search": load_prompts("organism/harmful", split="train")[:50],
        "harmful": load_prompts("organism/harmful")[:50],
        "harmless": load_prompts("organism/benign")[:100],
    }


def effects_of_units(name: str, ablation: str, units: Sequence[Unit] | None = None) -> pd.DataFrame:
    """`measure_effects` of every functional unit of a model alone, kept layer by layer.

    Parameters
    ----------
    ablation : str
        `zero`, or `mean`: the mean over the tokens of the requests.
    units : list of (kind, layer, channel), optional
        Only these.
    """
    model, tokenizer = load_model(name)
    parts, units = asked_of_units(), all_units(model) if units is None else units
    asked = [prompt for some in parts.values() for prompt in some]
    key = [identity(model, tokenizer, EFFECTS), parts, ablation]
    means = channel_means(model, tokenizer, asked) if ablation == "mean" else None
    tables = []
    for layer in sorted({layer for _, layer, _ in units}):
        here = [unit for unit in units if unit[1] == layer]

        def measure(here=here):
            return measure_effects(model, tokenizer, parts, here, means).to_dict("list")

        tables.append(pd.DataFrame(remember("truth", [*key, here], measure)))
    return pd.concat(tables, ignore_index=True)
