"""Greedy coordinate gradient (Zou et al. 2023): a suffix, changed token by token, that makes the target likely."""

import random
from dataclasses import dataclass

import torch

from safetyneuron.attacks.attack import Attempt
from safetyneuron.attacks.likelihood import TargetLoss
from safetyneuron.neurons.encoding import encode_prompts
from safetyneuron.neurons.weights import frozen
from safetyneuron.progress import steps


@dataclass(frozen=True)
class GCG:
    """Defaults are HarmBench's budget; `tokens` is the length of the suffix, which begins as as many exclamation marks."""

    steps: int = 500
    width: int = 512  # single swaps tried at each step
    top_k: int = 256  # tokens considered at each place
    tokens: int = 20
    seed: int = 0

    def search(self, model, tokenizer, requests):
        """The request followed by the best suffix found; stops early where greedy decoding writes the whole target."""
        allowed = plain_tokens(tokenizer, model)
        with frozen(model):
            return [
                self._optimise(model, tokenizer, request, allowed)
                for request in steps(requests, "GCG")
            ]

    def _optimise(self, model, tokenizer, request, allowed):
        place = Suffix(model, tokenizer, request.prompt, self.tokens)
        loss = TargetLoss(
            model,
            tokenizer,
            tokenizer(request.target, add_special_tokens=False)["input_ids"],
            place.before,
        )
        draw = torch.Generator().manual_seed(
            random.Random(f"{self.seed} {request.prompt}").randrange(2**62)
        )
        best, (lowest, done) = place.start, (float(x) for x in loss([place.start + place.after]))
        curve = [lowest]
        while not done and len(curve) <= self.steps:
            gradient = loss.gradient(best + place.after)[: len(best)].cpu()
            candidates = place.readable(
                swaps(best, gradient, allowed, self.width, self.top_k, draw)
            )
            if candidates:
                losses, written = loss([candidate + place.after for candidate in candidates])
                if losses.min() < lowest:
                    best, lowest, done = (
                        candidates[losses.argmin()],
                        float(losses.min()),
                        bool(written[losses.argmin()]),
                    )
            curve.append(lowest)
        return Attempt(place.prompt(best), loss.queries, loss.tokens, tuple(curve))


def swaps(suffix, gradient, allowed, width, top_k, draw):
    """`width` copies of the suffix, each with one token drawn from the `top_k` allowed ones that the gradient likes best.

    gradient: (tokens, words); allowed: (words,) bool.
    """
    scores = gradient.masked_fill(~allowed, float("inf"))
    top = scores.topk(min(top_k, int(allowed.sum())), largest=False).indices
    places = torch.randint(len(suffix), (width,), generator=draw).tolist()
    ranks = torch.randint(top.shape[1], (width,), generator=draw).tolist()
    return [suffix[:i] + [int(top[i, rank])] + suffix[i + 1 :] for i, rank in zip(places, ranks)]


def plain_tokens(tokenizer, model):
    """Which tokens a suffix may hold: (words,) bool, printable ASCII and not special."""
    words = model.get_input_embeddings().weight.shape[0]
    texts = tokenizer.batch_decode([[i] for i in range(min(words, len(tokenizer)))])
    special = set(tokenizer.all_special_ids)
    allowed = [
        i not in special and text.isascii() and text.isprintable() and bool(text.strip())
        for i, text in enumerate(texts)
    ]
    return torch.tensor(allowed + [False] * (words - len(allowed)))


class Suffix:
    """Where the suffix stands in the encoded conversation: token ids before it, at the start, and after it."""

    def __init__(self, model, tokenizer, request, tokens):
        self.model, self.tokenizer, self.request = model, tokenizer, request
        texts = [request] + [self.prompt_of(" ".join(mark * tokens)) for mark in "!?"]
        alone, ids, other = encode_prompts(model, tokenizer, texts)
        before, after = common(ids, alone), common(ids[::-1], other[::-1])
        self.before, self.start, self.after = (
            ids[:before],
            ids[before : len(ids) - after],
            ids[len(ids) - after :],
        )

    def prompt_of(self, text):
        """The request followed by a suffix, as text."""
        return f"{self.request} {text}"

    def prompt(self, suffix):
        """The request followed by token ids, as text."""
        return self.prompt_of(self.tokenizer.decode(suffix).strip())

    def readable(self, suffixes):
        """Those suffixes that come back as the same token ids when their text is read in place."""
        encoded = encode_prompts(
            self.model, self.tokenizer, [self.prompt(suffix) for suffix in suffixes]
        )
        return [
            suffix
            for suffix, ids in zip(suffixes, encoded)
            if ids == self.before + suffix + self.after
        ]


def common(first, second):
    """Length of the common beginning of two lists."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second))
    )
