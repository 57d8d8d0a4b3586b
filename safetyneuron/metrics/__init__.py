"""Metrics of harm, help and capability: most return a `Rate` or an `Estimate`, a value with its interval."""

from safetyneuron.metrics.answer_class import answer_classes, sort_answers
from safetyneuron.metrics.behaviour import key_scores
from safetyneuron.metrics.capability import capability
from safetyneuron.metrics.cost import answer_costs, cost_by_name, mean_cost, rule_cost
from safetyneuron.metrics.perplexity import perplexity
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
    "answer_classes",
    "answer_costs",
    "answers",
    "attack_success_rate",
    "capability",
    "coherent_compliance_rate",
    "compliance",
    "cost_by_name",
    "evaluate",
    "is_refusal",
    "is_well_formed",
    "helpfulness",
    "key_scores",
    "mean_cost",
    "over_refusal_rate",
    "perplexity",
    "rule_cost",
    "sort_answers",
]
