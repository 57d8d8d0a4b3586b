"""Importance, deactivation and tuning of safety neurons: the package behind the book."""

from importlib import import_module

# Public name -> its module, imported when the name is first used: torch and transformers take seconds, the command line needs neither.
_HOMES = {
    "ImportanceProfile": "importance.profile",
    "NeuronDelta": "tuning.delta",
    "NeuronSet": "neurons.sets",
    "Rate": "metrics",
    "SafetyNeuronError": "errors",
    "UnsupportedArchitecture": "errors",
    "answer_classes": "metrics",
    "attack_success_rate": "metrics",
    "capability": "metrics",
    "change_scores": "detectors.change_scores",
    "deactivate": "neurons.deactivation",
    "load_documents": "data.documents",
    "load_model": "models",
    "load_prompts": "data.prompts",
    "measure_importance": "importance.profile",
    "patched_generation": "neurons.patching",
    "screen": "importance.screening",
    "sn_tune": "tuning.sn_tune",
}
__all__ = list(_HOMES)
__version__ = "0.1.0"


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module 'safetyneuron' has no attribute {name!r}")
    return getattr(import_module(f"safetyneuron.{_HOMES[name]}"), name)
