"""Metrics: every one returns a `Rate`, a proportion with its interval."""

from safetyneuron.metrics.capability import capability
from safetyneuron.metrics.rates import Rate
from safetyneuron.metrics.refusal import is_refusal, is_well_formed
from safetyneuron.metrics.safety import (
    answers,
    attack_success_rate,
    coherent_compliance_rate,
    compliance,
    helpfulness,
    over_refusal_rate,
)
from safetyneuron.metrics.suite import Suite, evaluate

__all__ = [
    "Rate",
    "Suite",
    "answers",
    "attack_success_rate",
    "capability",
    "coherent_compliance_rate",
    "compliance",
    "evaluate",
    "is_refusal",
    "is_well_formed",
    "helpfulness",
    "over_refusal_rate",
]
