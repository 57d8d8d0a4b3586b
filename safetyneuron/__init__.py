"""Importance, deactivation and tuning of safety neurons: the package behind the book."""

from safetyneuron.data import load_prompts
from safetyneuron.deactivation import deactivate
from safetyneuron.detection import ImportanceProfile, measure_importance
from safetyneuron.errors import SafetyNeuronError, UnsupportedArchitecture
from safetyneuron.metrics import Rate, attack_success_rate, capability
from safetyneuron.models import load_model
from safetyneuron.neurons import NeuronSet
from safetyneuron.screening import screen

__all__ = [
    "ImportanceProfile",
    "NeuronSet",
    "Rate",
    "SafetyNeuronError",
    "UnsupportedArchitecture",
    "attack_success_rate",
    "capability",
    "deactivate",
    "load_model",
    "load_prompts",
    "measure_importance",
    "screen",
]
__version__ = "0.1.0"
