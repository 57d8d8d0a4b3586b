"""Importance over a corpus, measured once and kept."""

from safetyneuron.importance.profile import ImportanceProfile
from safetyneuron.importance.profile import measure_importance as measure
from safetyneuron.kept.files import keep_file
from safetyneuron.neurons.identity import identity


def measure_importance(model, tokenizer, prompts, sizes=(), progress=True):
    """`safetyneuron.measure_importance` by the rule `exact`, computed once and then read from the cache."""
    sizes = list(sizes)
    key = [identity(model, tokenizer, "safetyneuron.importance.profile"), prompts, sizes]
    return keep_file(
        "importance",
        key,
        lambda: measure(model, tokenizer, prompts, sizes=sizes, progress=progress),
        ImportanceProfile,
    )
