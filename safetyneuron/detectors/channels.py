"""Rules that only look at feed-forward channels at the last prompt token: act(gate) · up, which all three projections share.

Every rule gives gate row, up row and down column of a channel its score, and attention neurons a score below all.
"""

import re

import torch

from safetyneuron.neurons.activations import last_activations
from safetyneuron.neurons.architecture import FEED_FORWARD, PROJECTIONS, Architecture


def of_channels(model, values):
    """Scores of all neurons from those of feed-forward channels (layers, channels)."""
    architecture, values = Architecture(model), values.float().cpu()
    below = float(values.min()) - 1
    return {
        p: values.clone()
        if p in FEED_FORWARD
        else torch.full((len(values), architecture.widths[p]), below)
        for p in PROJECTIONS
    }


def mean_difference(case):
    """CNA: |mean on harmful − mean on harmless requests| (after Herring et al. 2026), without their filter of channels that are always active."""
    difference = case.last("harmful").mean(0) - case.last("benign").mean(0)
    return of_channels(case.model, difference.abs())


def effect_size(case):
    """SafeNeuron: difference of the means over the pooled standard deviation (Wang et al. 2026, Eq 5 and 6)."""
    harmful, benign = case.last("harmful"), case.last("benign")
    squares = sum((len(x) - 1) * x.var(0) for x in (harmful, benign))
    pooled = (squares / (len(harmful) + len(benign) - 2)).sqrt()
    difference = harmful.mean(0) - benign.mean(0)
    return of_channels(case.model, difference / pooled.clamp_min(torch.finfo(pooled.dtype).tiny))


def sparse_probe(case):
    """|Coefficient| of an L1-penalised logistic regression that tells harmful requests from harmless ones (after Gurnee et al. 2023)."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    harmful, benign = case.last("harmful"), case.last("benign")
    rows = torch.cat([harmful, benign]).flatten(1).numpy()
    wanted = [1] * len(harmful) + [0] * len(benign)
    probe = LogisticRegression(l1_ratio=1, solver="liblinear", random_state=0)
    found = probe.fit(StandardScaler().fit_transform(rows), wanted).coef_[0]
    return of_channels(case.model, torch.from_numpy(found).abs().view(harmful.shape[1:]))


def perturbed(text):
    """The text with two neighbouring letters of its longest word in each other's place."""
    word = max(re.findall(r"\w+", text), key=len)
    return text.replace(word, word[1::-1] + word[2:], 1)


@torch.no_grad()
def perturbation(case):
    """Perturbation probing: |Δ of the activation × what the channel writes towards refusing| (after Liu et al. 2026).

    Two passes a request: as it is, and with two letters swapped. What a channel writes is read off where the two answers
    first differ: ⟨W_down, w ∘ (u_refusal − u_help)⟩, u rows of the output embedding, w the last norm's weights.
    """
    model, before = case.model, case.last("harmful")
    texts = [perturbed(prompt) for prompt in case.harmful]
    after = torch.from_numpy(last_activations(model, case.tokenizer, texts)).view_as(before)
    architecture, towards = Architecture(model), _towards_refusal(model, case.pairs("harmful"))
    writes = torch.stack(
        [
            towards @ architecture.place(layer, "down").weight.float().cpu().T
            for layer in range(len(architecture.layers))
        ],
        1,
    )  # (prompts, layers, channels)
    return of_channels(model, ((before - after) * writes).abs().mean(0))


def _towards_refusal(model, pairs):
    """What the residual stream would have to gain for each refusal: (prompts, width)."""
    first = [next((r, h) for r, h in zip(p.refusal, p.help) if r != h) for p in pairs]
    table = model.get_output_embeddings().weight.float().cpu()
    refusal, helped = (table[list(ids)] for ids in zip(*first))
    ones = torch.ones(table.shape[1], device=model.device, dtype=model.dtype)
    return (refusal - helped) * model.get_decoder().norm(ones).float().cpu()
