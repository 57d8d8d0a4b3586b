"""PAIR (Chao et al. 2023): an attacker rewrites the prompt from the target's answer and a judge's score."""

import random
from dataclasses import dataclass, field

from safetyneuron.attacks.attack import Attempt, conversation_tokens
from safetyneuron.attacks.rewriters import (
    HIGHEST,
    ChatJudge,
    ChatRewriter,
    RuleJudge,
    TemplateRewriter,
    Turn,
)
from safetyneuron.metrics.safety import answers
from safetyneuron.progress import steps


@dataclass(frozen=True)
class PAIR:
    """Defaults are the paper's and HarmBench's budget: 20 streams of 3 prompts each, until one has the highest score."""

    streams: int = 20
    depth: int = 3
    history: int = 3  # turns of a stream that the attacker still sees
    seed: int = 0
    answer_tokens: int | None = None
    rewriter: TemplateRewriter | ChatRewriter = field(default_factory=TemplateRewriter)
    judge: RuleJudge | ChatJudge = RuleJudge()  # its name is part of what a kept result is found by

    def search(self, model, tokenizer, requests):
        """The prompt with the highest score of all streams."""
        return [self._converse(model, tokenizer, request) for request in steps(requests, "PAIR")]

    def _converse(self, model, tokenizer, request):
        draw = random.Random(f"{self.seed} {request.prompt}")

        def rewrite(prompt, turns=()):
            return self.rewriter.rewrite(request.prompt, prompt, draw, turns)

        prompts, turns = [rewrite(request.prompt) for _ in range(self.streams)], [()] * self.streams
        best, highest, tokens, curve = request.prompt, 0, 0, []
        while len(curve) < self.depth and highest < HIGHEST:
            texts = answers(model, tokenizer, prompts, self.answer_tokens)
            scores = [self.judge(request.prompt, text) for text in texts]
            tokens += sum(
                conversation_tokens(tokenizer, prompt, text) for prompt, text in zip(prompts, texts)
            )
            if max(scores) > highest:
                highest, best = max(scores), prompts[scores.index(max(scores))]
            curve.append(float(highest))
            if len(curve) < self.depth and highest < HIGHEST:
                last = map(Turn, prompts, texts, scores)
                turns = [(*seen, turn)[-self.history :] for seen, turn in zip(turns, last)]
                prompts = list(map(rewrite, prompts, turns))
        return Attempt(best, self.streams * len(curve), tokens, tuple(curve))
