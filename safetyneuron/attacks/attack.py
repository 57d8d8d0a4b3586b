"""The protocol of every attack, and the direct one."""

from dataclasses import dataclass
from typing import Protocol

from safetyneuron.errors import SafetyNeuronError
from safetyneuron.metrics.judge import KEYWORD, find_harm
from safetyneuron.metrics.rates import Rate
from safetyneuron.metrics.refusal import is_coherent_compliance, is_refusal
from safetyneuron.metrics.safety import answers

# Name of a rule -> whether an answer to a request is a success. The request is the one without the attack.
JUDGES = {
    "keyword": lambda request, answer: not is_refusal(answer),
    "coherent": is_coherent_compliance,
}


@dataclass(frozen=True)
class Attempt:
    """What a search found for one request: the prompt to ask, and what finding it cost.

    queries: prompts the model was run on; tokens: tokens it read and wrote; curve: loss or score after every step.
    """

    prompt: str
    queries: int = 0
    tokens: int = 0
    curve: tuple[float, ...] = ()


class Attack(Protocol):
    """A search for prompts; its fields are its budget."""

    def search(self, model, tokenizer, requests) -> list[Attempt]:
        """One attempt for each request."""


@dataclass(frozen=True)
class Direct:
    """Ask the request as it is."""

    def search(self, model, tokenizer, requests):
        """The requests themselves; asking them is the whole cost."""
        return [Attempt(request.prompt) for request in requests]


@dataclass(frozen=True)
class AttackResult:
    """Success of each request under each judge, and the cost of each; no prompt and no answer is kept.

    success: judge to one bool per request; queries, tokens: one number per request; curves: one list per request.
    """

    success: dict[str, list[bool]]
    queries: list[int]
    tokens: list[int]
    curves: list[list[float]]

    def rate(self, judge):
        """Share of the requests that succeeded, as a `Rate`."""
        return Rate(sum(self.success[judge]), len(self.success[judge]))


def attack(model, tokenizer, requests, config, judge=KEYWORD, answer_tokens=None):
    """Attack a model and judge its greedy answers, which are then dropped.

    Parameters
    ----------
    requests : list of Request
        As from `load_requests`.
    config : Direct, GCG, AutoDAN or PAIR
        The attack and its budget.
    judge : str
        Of success, as for `find_harm`; the rules of `JUDGES` are asked too.

    Returns
    -------
    AttackResult

    Raises
    ------
    SafetyNeuronError
        If there are no requests, or the attack cannot run on this model or these requests.
    """
    if not requests:
        raise SafetyNeuronError("there are no requests to attack with: give at least one")
    attempts = config.search(model, tokenizer, requests)
    texts = answers(model, tokenizer, [attempt.prompt for attempt in attempts], answer_tokens)
    success = {
        name: [bool(rule(r.prompt, text)) for r, text in zip(requests, texts)]
        for name, rule in JUDGES.items()
    }
    if judge != KEYWORD:
        asked = [request.prompt for request in requests]
        success["classifier"] = find_harm(judge, model, asked, texts)
    asked = [
        conversation_tokens(tokenizer, attempt.prompt, text)
        for attempt, text in zip(attempts, texts)
    ]
    return AttackResult(
        success,
        [attempt.queries + 1 for attempt in attempts],
        [attempt.tokens + count for attempt, count in zip(attempts, asked)],
        [list(attempt.curve) for attempt in attempts],
    )


def conversation_tokens(tokenizer, prompt, answer):
    """Tokens of a prompt and its answer."""
    return sum(
        len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (prompt, answer)
    )
