"""How well a model still writes: perplexity of answers, with a bootstrap interval over documents."""

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from safetyneuron.memory import Batches
from safetyneuron.metrics.rates import bootstrap
from safetyneuron.neurons.encoding import encode_documents, pad


@torch.no_grad()
def perplexity(model, tokenizer, documents, batch_size=32):
    """Perplexity of the completions: (value, low, high), per token, with the 95 % interval of a bootstrap over documents.

    Parameters
    ----------
    documents : list of dict
        `prompt` and `completion`, as from `load_documents`.
    """
    data = encode_documents(model, tokenizer, documents)
    parts = [
        part for _, part in Batches(batch_size)(data, lambda rows: _losses(model, tokenizer, rows))
    ]
    sums, counts = (np.concatenate(part) for part in zip(*parts))

    def mean_loss(chosen):
        return sums[chosen].sum(-1) / counts[chosen].sum(-1)

    ends = bootstrap(mean_loss, len(sums))
    return tuple(float(np.exp(loss)) for loss in (mean_loss(np.arange(len(sums))), *ends))


def _losses(model, tokenizer, rows):
    """Summed loss and number of tokens of every completion of one batch."""
    batch = pad([row["input_ids"] for row in rows], tokenizer, model.device)
    labels = torch.full_like(batch["input_ids"], -100)
    for line, row in zip(labels, rows):
        line[len(line) - len(row["labels"]) :] = torch.tensor(row["labels"])
    logits = model(**batch, use_cache=False).logits[:, :-1].float()
    losses = cross_entropy(
        logits.transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=-100
    )
    return losses.sum(1).tolist(), (labels[:, 1:] >= 0).sum(1).tolist()
