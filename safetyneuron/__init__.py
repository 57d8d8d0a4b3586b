"""Importance, deactivation and tuning of safety neurons: the package behind the book."""

from safetyneuron.data import load_prompts
from safetyneuron.deactivation import deactivate
from safetyneuron.delta import NeuronDelta
from safetyneuron.detection import ImportanceProfile, measure_importance
from safetyneuron.documents import load_documents
from safetyneuron.errors import SafetyNeuronError, UnsupportedArchitecture
from safetyneuron.metrics import Rate, attack_success_rate, capability
from safetyneuron.models import load_model
from safetyneuron.neurons import NeuronSet
from safetyneuron.screening import screen
from safetyneuron.tuning import sn_tune

__all__ = [
    "ImportanceProfile",
    "NeuronDelta",
    "NeuronSet",
    "Rate",
    "SafetyNeuronError",
    "UnsupportedArchitecture",
    "attack_success_rate",
    "capability",
    "deactivate",
    "load_documents",
    "load_model",
    "load_prompts",
    "measure_importance",
    "screen",
    "sn_tune",
]
__version__ = "0.1.0"
