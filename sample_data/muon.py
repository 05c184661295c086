"""Optimizer for small models trained from scratch: Muon for layer matrices, AdamW for the rest."""

from __future__ import annotations

import math
from typing import Any

import torch

FASTER = 5  # learning rate of the layers' matrices, as a multiple of the others'
MOMENTUM = 0.95


class Muon(torch.optim.AdamW):
    """AdamW, except that layer matrices follow an orthogonalized momentum at a higher rate.

    From https://kellerjordan.github.io/posts/muon. torch's own Muon computes in bfloat16, which
    takes half a second per step on a CPU limited to AVX2, against 0.04 s here.
    """

    def __init__(
        self, model: torch.nn.Module, learning_rate: float, weight_decay: float, beta2: float
    ) -> None:
        matrices: list[torch.nn.Parameter] = []
        tables: list[torch.nn.Parameter] = []
        vectors: list[torch.nn.Parameter] = []
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                vectors.append(weight)
            elif ".layers." in name:
                matrices.append(weight)
            else:
                tables.append(weight)
        groups = [
            {"params": tables, "orthogonal": False},
            {"params": vectors, "weight_decay": 0.0, "orthogonal": False},
            {"params": matrices, "lr": FASTER * learning_rate, "orthogonal": True},
        ]
        super().__init__(groups, lr=learning_rate, betas=(0.9, beta2), weight_decay=weight_decay)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every weight, like torch's other optimizers."""
        for group in self.param_groups:
            if not group["orthogonal"]:
                continue
            for weight in group["params"]:
                self._move(weight, group)
                weight.grad = None  # AdamW skips weights without a gradient
        return super().step(closure)

    def _move(self, weight: torch.nn.Parameter, group: dict[str, Any]) -> None:
        if weight.grad is None:
            return
        momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
        momentum.lerp_(weight.grad, 1 - MOMENTUM)
        direction = orthogonal(weight.grad.lerp(momentum, MOMENTUM))
        taller = max(1.0, weight.shape[0] / weight.shape[1])
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(direction, alpha=-group["lr"] * math.sqrt(taller))


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix with the same row and column spaces, but with all singular values near 1."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    result: torch.Tensor = wide / (wide.norm() + 1e-7)
    for _ in range(5):  # Newton-Schulz iteration with the coefficients of Muon's author
        square = result @ result.T
        result = 3.4445 * result + (-4.7750 * square + 2.0315 * square @ square) @ result
    return result if wide is matrix else result.T
