"""The organisms: small chat models that this project trains on a generated language, and ships."""

from importlib import import_module

# Public name -> its module, imported when first used: the command line starts without torch.
_HOMES = {
    "decoy_neurons": "shipped",
    "export_organism": "card",
    "load_organism": "shipped",
    "manifest": "shipped",
    "names": "shipped",
    "planted_neurons": "shipped",
    "starting_model": "shipped",
    "train_organism": "stages",
    "training_curve": "shipped",
}
__all__ = list(_HOMES)


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
