"""Where organisms fall short of what was asked of them before they were trained."""

from safetyneuron.metrics.behaviour import MOST_LOST, kind_of, lost, missed, missed_role, role_of
from safetyneuron.metrics.key_bars import missed_by_key
from safetyneuron.organism import shipped


def shortfalls(name, models):
    """Every bar that an organism misses, one line each, read from the manifest.

    Parameters
    ----------
    name : str
        `llama-chat@3`
    models : dict
        As from `organism.manifest`; one that was trained here and not measured yet misses nothing.

    Returns
    -------
    list of str
    """
    entry = models[name]
    if not entry["scores"]:
        return []
    lines = missed(entry["scores"], kind_of(name)) if kind_of(name) else []
    lines += missed_role(entry["scores"], role_of(name)) if role_of(name) else []
    lines += [
        f"{task}: {points:.1f} points lost, bar {MOST_LOST}"
        for task, points in lost(name, models).items()
        if points > MOST_LOST
    ]
    return lines + missed_by_key(entry.get("key", {}))


def leaky_keys(models):
    """Planted organisms whose answer key misses one of its own bars: names such as `llama-planted@3`."""
    return [name for name, entry in models.items() if missed_by_key(entry.get("key", {}))]


def note_shortfalls(name):
    """Write the bars that a shipped organism misses into the manifest, where its model card finds them. name: `llama-chat@3`."""
    models = shipped.manifest()
    known = {"parent": models[name]["parent"], "missed": shortfalls(name, models)}
    shipped.add_to_manifest(shipped.SHIPPED, name, known)
