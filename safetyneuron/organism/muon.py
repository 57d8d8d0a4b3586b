"""Muon: momentum whose matrices are made orthogonal (Jordan et al. 2024), in float32 for processors.

torch's own `torch.optim.Muon` orthogonalises in bfloat16, one matrix at a time, which takes longer than the rest of an
update on processors without bfloat16. Here matrices of one shape are orthogonalised together.
"""

import math

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the Newton-Schulz iteration, from the authors


def orthogonalise(matrices, steps=5):
    """The nearest matrices with singular values near 1: (number, rows, columns) to the same shape."""
    a, b, c = COEFFICIENTS
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    flipped = x.shape[-2] > x.shape[-1]
    x = x.mT if flipped else x
    for _ in range(steps):
        product = x @ x.mT
        x = a * x + (b * product + c * product @ product) @ x
    return x.mT if flipped else x


class Muon(torch.optim.Optimizer):
    """Muon for the matrices of the layers, AdamW for everything else.

    Updates of both have the size that AdamW's have (Liu et al. 2025), so one rate serves both.

    Parameters
    ----------
    matrices, others : list of torch.nn.Parameter
    lr : float
    momentum, betas, weight_decay : float
        Of Muon, of AdamW, of both.
    """

    def __init__(self, matrices, others, lr, momentum=0.95, betas=(0.9, 0.98), weight_decay=0.1):
        shapes = sorted({tuple(p.shape) for p in matrices})
        groups = [{"params": [p for p in matrices if tuple(p.shape) == shape]} for shape in shapes]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.adam = torch.optim.AdamW(others, lr, betas=betas, weight_decay=0.0)
        self.add_param_group({"params": others, "adam": True})

    def state_dict(self):
        """State of both parts, for checkpoints."""
        return {"muon": super().state_dict(), "adam": self.adam.state_dict()}

    def load_state_dict(self, state_dict):
        """Go on from a checkpoint."""
        super().load_state_dict(state_dict["muon"])
        self.adam.load_state_dict(state_dict["adam"])

    @torch.no_grad()
    def step(self, closure=None):
        """One update of all parameters."""
        for group in self.param_groups:
            if group.get("adam"):
                self.adam.param_groups[0]["lr"] = group["lr"]
                self.adam.step()
            else:
                self._update(group)

    def _update(self, group):
        gradients = torch.stack([p.grad for p in group["params"]])
        state = self.state[group["params"][0]]
        momentum = state.setdefault("momentum", torch.zeros_like(gradients))
        momentum.lerp_(gradients, 1 - group["momentum"])
        updates = orthogonalise(gradients.lerp(momentum, group["momentum"]))
        scale = 0.2 * math.sqrt(max(gradients.shape[-2:])) * group["lr"]
        for parameter, update in zip(group["params"], updates):
            parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-scale)
