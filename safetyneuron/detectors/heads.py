"""Safety heads: how far the next token's distribution moves when a head is silent (after Zhou et al. 2025, Ships)."""

from functools import partial

import torch

from safetyneuron.memory import Batches
from safetyneuron.neurons.architecture import PROJECTIONS, Architecture
from safetyneuron.neurons.encoding import encode_prompts, pad
from safetyneuron.neurons.hooks import overwriting


@torch.no_grad()
def head_effects(model, tokenizer, prompts, batch_size=32):
    """Mean over prompts of KL(whole ‖ without the head) at the last prompt token: (layers, heads), in nats."""
    architecture = Architecture(model)
    layers, heads = len(architecture.layers), architecture.heads

    def run(some):
        batch, found = pad(some, tokenizer, model.device), torch.zeros(layers, heads).double()

        def next_token():
            logits = model(**batch, use_cache=False, logits_to_keep=1).logits[:, -1]
            return logits.double().log_softmax(-1)

        whole = next_token()
        for layer, head in ((l, h) for l in range(layers) for h in range(heads)):
            with overwriting(model, {("o", layer): partial(_silent, head, heads)}):
                changed = next_token()
            found[layer, head] = (whole.exp() * (whole - changed)).sum()
        return found

    encoded = encode_prompts(model, tokenizer, prompts)
    return sum(found for _, found in Batches(batch_size)(encoded, run)) / len(encoded)


def _silent(head, heads, outputs):
    """Heads' outputs (B, n, H·d) with one at zero."""
    changed = outputs.clone().unflatten(2, (heads, -1))
    changed[:, :, head] = 0
    return changed.flatten(2)


def safety_heads(case):
    """Ships: a head's rows of q and columns of o have its score, rows of k and v the highest of their group; feed-forward neurons lie below."""
    architecture = Architecture(case.model)
    of_heads = head_effects(case.model, case.tokenizer, case.harmful).float()
    of_groups = of_heads.unflatten(1, (architecture.groups, -1)).amax(2)
    wide = {
        p: x.repeat_interleave(architecture.head_width, 1)
        for p, x in {"q": of_heads, "k": of_groups, "v": of_groups, "o": of_heads}.items()
    }
    below = float(of_heads.min()) - 1
    return {
        p: wide.get(p, torch.full((len(of_heads), architecture.widths[p]), below))
        for p in PROJECTIONS
    }
