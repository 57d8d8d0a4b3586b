"""How likely a model finds the beginning of an answer after many prompts: what GCG and AutoDAN search by."""

import copy

import torch
from torch.nn.functional import cross_entropy

from safetyneuron.memory import Batches
from safetyneuron.neurons.architecture import cache_argument
from safetyneuron.neurons.encoding import pad


class TargetLoss:
    """Loss of a target after prompts, in batches that fit into memory; counts what it costs.

    Parameters
    ----------
    target : list of int
        Token ids whose mean negative log-likelihood is the loss.
    prefix : list of int
        Token ids with which every prompt begins: read once, then kept as keys and values.

    Attributes
    ----------
    queries, tokens : int
        Prompts and tokens read so far.
    """

    def __init__(self, model, tokenizer, target, prefix=(), batch_size=512):
        self.model, self.tokenizer, self.target, self.batches = (
            model,
            tokenizer,
            list(target),
            Batches(batch_size),
        )
        self.queries, self.tokens, self.prefix, self.cache = 0, len(prefix), len(prefix), None
        if prefix:
            with torch.no_grad():
                ids = torch.tensor([list(prefix)], device=model.device)
                self.cache = model(input_ids=ids, use_cache=True, logits_to_keep=1)[
                    cache_argument(model)
                ]

    def __call__(self, rows):
        """Loss after each row of token ids, and whether greedy decoding would write the target: tensors (rows,).

        With a prefix the rows must be equally long. Out of memory halves the batch, for good.
        """
        parts = [result for _, result in self.batches(rows, self._measure)]
        return tuple(torch.cat(part) for part in zip(*parts))

    @torch.no_grad()
    def _measure(self, rows):
        batch = pad([list(row) + self.target for row in rows], self.tokenizer, self.model.device)
        logits = self._logits(batch["attention_mask"], input_ids=batch["input_ids"])
        self.queries += len(rows)  # after the pass, which may run out of memory
        self.tokens += int(batch["attention_mask"].sum())
        return self._losses(logits).cpu(), (logits.argmax(-1) == self._targets(logits)).all(
            -1
        ).cpu()

    def gradient(self, row):
        """Gradient of the loss in the one-hot tokens of a row: (tokens, words), up to the scale of the embedding.

        The chain rule takes it from the gradient in the embeddings, so that no (tokens, words) input is needed.
        """
        self.queries += 1
        self.tokens += len(row) + len(self.target)
        table = self.model.get_input_embeddings()
        ids = torch.tensor([list(row) + self.target], device=self.model.device)
        embedded = table(ids).detach().requires_grad_()
        loss = self._losses(self._logits(torch.ones_like(ids), inputs_embeds=embedded)).sum()
        (gradient,) = torch.autograd.grad(loss, embedded)
        return gradient[0, : len(row)] @ table.weight.detach().T

    def _logits(self, mask, **inputs):
        """Logits (B, target, words) from which the target is read."""
        cache = None
        if self.prefix:
            cache = copy.deepcopy(self.cache)
            cache.batch_repeat_interleave(len(mask))
            mask = torch.cat([mask.new_ones(len(mask), self.prefix), mask], 1)
        inputs |= {
            cache_argument(self.model): cache,
            "use_cache": bool(self.prefix),
            "logits_to_keep": len(self.target) + 1,
        }
        logits = self.model(**inputs, attention_mask=mask).logits
        return logits[:, :-1].float()

    def _targets(self, logits):
        return torch.tensor(self.target, device=logits.device).expand(len(logits), -1)

    def _losses(self, logits):
        return cross_entropy(logits.transpose(1, 2), self._targets(logits), reduction="none").mean(
            1
        )
