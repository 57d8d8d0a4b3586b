"""How well a model still writes: perplexity of answers or of a running text, with a bootstrap interval over documents."""

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from safetyneuron.memory import Batches
from safetyneuron.metrics.rates import bootstrap
from safetyneuron.neurons.encoding import encode_documents, pad

WINDOW = 4096  # tokens of a running text that are read at a time, as by Chen et al.


@torch.no_grad()
def perplexity(model, tokenizer, documents, batch_size=32):
    """Perplexity of the completions: (value, low, high), per token, with the 95 % interval of a bootstrap over documents.

    Parameters
    ----------
    documents : list of dict, or str
        `prompt` and `completion`, as from `load_documents`; or a running text, all of which is weighed, in windows of `WINDOW`
        tokens (fewer where the model reads fewer), each from its second token on.
    """
    text = isinstance(documents, str)
    encode = _windows if text else encode_documents
    data, batch_size = encode(model, tokenizer, documents), 1 if text else batch_size
    parts = [
        part for _, part in Batches(batch_size)(data, lambda rows: _losses(model, tokenizer, rows))
    ]
    sums, counts = (np.concatenate(part) for part in zip(*parts))

    def mean_loss(chosen):
        return sums[chosen].sum(-1) / counts[chosen].sum(-1)

    ends = bootstrap(mean_loss, len(sums))
    return tuple(float(np.exp(loss)) for loss in (mean_loss(np.arange(len(sums))), *ends))


def _windows(model, tokenizer, text):
    """Token ids and labels of a running text, window by window; each begins with the token that begins a text, if there is one."""
    begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    size = min(WINDOW, model.config.get_text_config().max_position_embeddings) - len(begin)
    pieces = [begin + ids[i : i + size] for i in range(0, len(ids), size)]
    rows = [{"input_ids": piece, "labels": [-100, *piece[1:]]} for piece in pieces]
    return [row for row in rows if len(row["labels"]) > 1]


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
