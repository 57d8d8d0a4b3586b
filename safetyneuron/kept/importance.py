"""Importance over a corpus, measured once and kept."""

from safetyneuron.cache import cache_folder, digest, kept_folder
from safetyneuron.importance.profile import ImportanceProfile
from safetyneuron.importance.profile import measure_importance as measure
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


def keep_file(kind, key, make, result):
    """What `make` returns, a `result` with `save` and `load`, made once for this key."""
    folder = kept_folder(
        cache_folder() / kind / digest(*key), lambda new: make().save(new / "result.safetensors")
    )
    return result.load(folder / "result.safetensors")
