"""Attacks that score defences: they return success rates and what was spent, never an answer."""

from safetyneuron.attacks.attack import AttackResult, Direct, attack
from safetyneuron.attacks.autodan import AutoDAN
from safetyneuron.attacks.budgets import searches
from safetyneuron.attacks.gcg import GCG
from safetyneuron.attacks.pair import PAIR
from safetyneuron.attacks.rewriters import ChatJudge, ChatRewriter, RuleJudge, TemplateRewriter
from safetyneuron.data.requests import Request, load_requests

__all__ = [
    "AttackResult",
    "AutoDAN",
    "ChatJudge",
    "ChatRewriter",
    "Direct",
    "GCG",
    "PAIR",
    "Request",
    "RuleJudge",
    "TemplateRewriter",
]
__all__ += ["attack", "load_requests", "searches"]
