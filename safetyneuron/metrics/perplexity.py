"""How well a model still writes: perplexity of answers, with a bootstrap interval over documents."""

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from safetyneuron.data import pad
from safetyneuron.documents import encode_documents
from safetyneuron.metrics.rates import bootstrap


@torch.no_grad()
def perplexity(model, tokenizer, documents, batch_size=32):
    """Perplexity of the completions: (value, low, high), per token, with the 95 % interval of a bootstrap over documents.

    Parameters
    ----------
    documents : list of dict
        `prompt` and `completion`, as from `load_documents`.
    """
    data, sums, counts = encode_documents(model, tokenizer, documents), [], []
    for start in range(0, len(data), batch_size):
        rows = data[start : start + batch_size]
        batch = pad([row["input_ids"] for row in rows], tokenizer, model.device)
        labels = torch.full_like(batch["input_ids"], -100)
        for line, row in zip(labels, rows):
            line[len(line) - len(row["labels"]) :] = torch.tensor(row["labels"])
        logits = model(**batch, use_cache=False).logits[:, :-1].float()
        losses = cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=-100)
        sums += losses.sum(1).tolist()
        counts += (labels[:, 1:] >= 0).sum(1).tolist()
    sums, counts = np.array(sums), np.array(counts)
    mean_loss = lambda chosen: sums[chosen].sum(-1) / counts[chosen].sum(-1)
    ends = bootstrap(mean_loss, len(sums))
    return tuple(float(np.exp(loss)) for loss in (mean_loss(np.arange(len(sums))), *ends))
