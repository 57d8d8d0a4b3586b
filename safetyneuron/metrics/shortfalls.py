"""Where organisms fall short of what was asked of them before they were trained."""

from safetyneuron.metrics.behaviour import (
    MOST_LOST,
    behaviour,
    kind_of,
    lost,
    missed,
    missed_role,
    role_of,
)
from safetyneuron.metrics.key_bars import measure_key, missed_by_key
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


def note_measures(name, folder):
    """Measure an organism of a folder, and write behaviour, answer key and the bars that it misses into the manifest there, where its model card finds them.

    Parameters
    ----------
    name : str
        `organism/llama-planted@3`
    folder : path
        Of weights.

    Returns
    -------
    list of str
        As from `shortfalls`.
    """
    key = shipped.full_name(name.removeprefix("organism/"))
    measures = {"scores": behaviour(*shipped.load_organism(name, folder))}
    if kind_of(key) == "planted":
        measures["key"] = measure_key(name, folder)
    models = shipped.manifest(folder)
    models[key] |= measures
    measures["missed"] = shortfalls(key, models)
    shipped.add_measures(folder, key, measures)
    return measures["missed"]
