"""AutoDAN (Liu et al. 2024): a genetic search over whole prompts that make the target likely and read like language."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from safetyneuron.attacks.attack import Attempt
from safetyneuron.attacks.likelihood import TargetLoss
from safetyneuron.attacks.rewriters import ChatRewriter, TemplateRewriter, sentences
from safetyneuron.metrics.safety import answer_length
from safetyneuron.neurons.encoding import encode_prompts, fits
from safetyneuron.progress import steps


@dataclass(frozen=True)
class AutoDAN:
    """Defaults are HarmBench's budget; the rewriter mutates prompts."""

    steps: int = 100
    population: int = 64
    elites: float = 0.05  # share of the population that stays as it is, at least one prompt
    crossover: float = 0.5  # chance that a child has two parents
    mutation: float = 0.01  # chance that a child is rewritten
    seed: int = 0
    starts: tuple[str, ...] = ()  # what the first prompts say before the request
    rewriter: TemplateRewriter | ChatRewriter = field(default_factory=TemplateRewriter)

    def search(self, model, tokenizer, requests):
        """The prompt with the lowest loss in all generations; stops early where greedy decoding writes the whole target."""
        return [self._evolve(model, tokenizer, request) for request in steps(requests, "AutoDAN")]

    def _evolve(self, model, tokenizer, request):
        draw = random.Random(f"{self.seed} {request.prompt}")
        target = tokenizer(request.target, add_special_tokens=False)["input_ids"]
        loss = TargetLoss(model, tokenizer, target)
        room = max(len(target), answer_length(model))
        readable = partial(fits, model, tokenizer, room=room)
        breed = Breeder(self, request.prompt, readable, draw, address(self.starts, model))
        population, curve = breed.first(), []
        while True:
            losses, written = loss(encode_prompts(model, tokenizer, population))
            order = losses.argsort(stable=True).tolist()
            curve.append(float(losses[order[0]]))
            if written[order[0]] or len(curve) > self.steps:
                return Attempt(population[order[0]], loss.queries, loss.tokens, tuple(curve))
            population = breed.children([population[i] for i in order], losses[order])


@dataclass(frozen=True)
class Breeder:
    """One generation of prompts from another; what asks for something else, or is too long to be answered, is not born."""

    budget: AutoDAN
    request: str
    readable: Callable[[str], bool]
    draw: random.Random
    starts: tuple[str, ...] = ()

    def first(self):
        """The request behind each start, or alone, and ways to put these in other words."""
        size = self.budget.population
        begun = [f"{start} [PROMPT]: {self.request}" for start in self.starts]
        begun = list(filter(self.readable, begun))[:size] or [self.request]
        rest = range(size - len(begun))
        return begun + [self._rewritten(begun[i % len(begun)]) for i in rest]

    def children(self, parents, losses):
        """The next generation: the elites first, then children of parents drawn by softmax(−loss). parents: best first."""
        budget, draw, weights = self.budget, self.draw, torch.softmax(-losses, 0).tolist()
        elites, children = max(1, round(budget.elites * budget.population)), []
        for _ in range(budget.population - elites):
            first, second = draw.choices(parents, weights, k=2)
            child = cross(first, second, draw) if draw.random() < budget.crossover else first
            child = self._viable(child, first)
            children.append(self._rewritten(child) if draw.random() < budget.mutation else child)
        return parents[:elites] + children

    def _rewritten(self, prompt):
        return self._viable(self.budget.rewriter.rewrite(self.request, prompt, self.draw), prompt)

    def _viable(self, new, old):
        """The new prompt, or the old one where it asks for something else or cannot be read."""
        return new if self.budget.rewriter.keeps(self.request, new) and self.readable(new) else old


def address(starts, model):
    """HarmBench's starts, which speak to ChatGPT of ModelKeeper, as spoken to a model of its makers."""
    *_, makers, name = ("its makers", *Path(model.name_or_path or "this model").parts)
    return tuple(s.replace("ChatGPT", name).replace("ModelKeeper", makers) for s in starts)


def cross(first, second, draw):
    """The first sentences of one prompt followed by the last ones of another."""
    head, tail = sentences(first), sentences(second)
    return " ".join(head[: draw.randrange(len(head) + 1)] + tail[draw.randrange(len(tail) + 1) :])
