"""AutoDAN (Liu et al. 2024): a genetic search over whole prompts that make the target likely and read like language."""

import random
from dataclasses import dataclass, field

import torch

from safetyneuron.attacks.attack import Attempt
from safetyneuron.attacks.likelihood import TargetLoss
from safetyneuron.attacks.rewriters import ChatRewriter, TemplateRewriter, sentences
from safetyneuron.neurons.encoding import encode_prompts
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
    rewriter: TemplateRewriter | ChatRewriter = field(default_factory=TemplateRewriter)

    def search(self, model, tokenizer, requests):
        """The prompt with the lowest loss in all generations; stops early where greedy decoding writes the whole target."""
        return [self._evolve(model, tokenizer, request) for request in steps(requests, "AutoDAN")]

    def _evolve(self, model, tokenizer, request):
        draw = random.Random(f"{self.seed} {request.prompt}")
        loss = TargetLoss(
            model, tokenizer, tokenizer(request.target, add_special_tokens=False)["input_ids"]
        )
        population = [request.prompt] + [
            self._rewritten(request.prompt, request.prompt, draw)
            for _ in range(self.population - 1)
        ]
        curve = []
        while True:
            losses, written = loss(encode_prompts(model, tokenizer, population))
            order = losses.argsort(stable=True).tolist()
            curve.append(float(losses[order[0]]))
            if written[order[0]] or len(curve) > self.steps:
                return Attempt(population[order[0]], loss.queries, loss.tokens, tuple(curve))
            population = self._children(
                request.prompt, [population[i] for i in order], losses[order], draw
            )

    def _children(self, request, parents, losses, draw):
        """The next generation: the elites first, then children of parents drawn by softmax(−loss). parents: best first."""
        elites = max(1, round(self.elites * self.population))
        weights, children = torch.softmax(-losses, 0).tolist(), []
        for _ in range(self.population - elites):
            first, second = draw.choices(parents, weights, k=2)
            child = cross(first, second, draw) if draw.random() < self.crossover else first
            child = child if self.rewriter.keeps(request, child) else first
            children.append(
                self._rewritten(request, child, draw) if draw.random() < self.mutation else child
            )
        return parents[:elites] + children

    def _rewritten(self, request, prompt, draw):
        """The prompt in other words; as it is, where these would ask for something else."""
        new = self.rewriter.rewrite(request, prompt, draw)
        return new if self.rewriter.keeps(request, new) else prompt


def cross(first, second, draw):
    """The first sentences of one prompt followed by the last ones of another."""
    head, tail = sentences(first), sentences(second)
    return " ".join(head[: draw.randrange(len(head) + 1)] + tail[draw.randrange(len(tail) + 1) :])
