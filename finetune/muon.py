"""Muon for matrices and stacks of matrices (experts), AdamW for the rest.

Muon orthogonalises the momentum of every weight matrix by a Newton-Schulz iteration (Jordan et al. 2024,
github.com/KellerJordan/Muon) and scales the step to AdamW's size (Liu et al. 2025, arXiv 2502.16982, equation 4).
torch.optim.Muon takes 2D weights only; fused experts are 3D and gate/up are two matrices in one.
"""

import math
from collections.abc import Iterable

import torch
from torch import nn

# Quintic coefficients per iteration, from "Polar Express" (Amsel et al. 2025, arXiv 2505.16932), for 5 iterations.
NEWTON_SCHULZ = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


def has_fast_bf16(device: torch.device) -> bool:
    """Say whether the device multiplies bf16 matrices in hardware; many CPUs emulate it a hundred times slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """Return the nearest semi-orthogonal matrices, about: singular values of (..., rows, columns) go near 1."""
    x = matrices.to(torch.bfloat16 if has_fast_bf16(matrices.device) else torch.float32)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT.contiguous()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in NEWTON_SCHULZ:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised steps.

    Args:
        params: parameters or groups; a group's `parts` says how many matrices stand above each other in each of its
            parameters (2 for fused gate and up projections).
        lr, momentum, weight_decay (`float`): decay is decoupled, as in AdamW.
    """

    def __init__(
        self, params: Iterable, lr: float = 6e-3, momentum: float = 0.95, weight_decay: float = 0.1, parts: int = 1
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "parts": parts})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step from the gradients; parameters without a gradient stay."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: torch.Tensor, group: dict) -> None:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        grad = parameter.grad
        assert grad is not None
        momentum = state["momentum"].lerp_(grad, 1 - group["momentum"])
        step = grad.lerp(momentum, group["momentum"])  # Nesterov
        *stack, rows, columns = step.shape
        matrices = step.reshape(*stack, group["parts"], rows // group["parts"], columns)
        scale = 0.2 * math.sqrt(max(matrices.shape[-2:]))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(orthogonalise(matrices).reshape(step.shape).to(parameter.dtype), alpha=-group["lr"] * scale)


def build_optimizers(
    model: nn.Module, matrix_lr: float, lr: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices inside layers and heads, AdamW for embeddings, routers and norms."""
    groups: dict[str, list[nn.Parameter]] = {"fused": [], "matrices": [], "tables": [], "vectors": []}
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            groups["vectors"].append(parameter)
        elif any(part in name for part in ("embed_tokens", "unembed", "mlp.gate.", "plan_proj")):
            groups["tables"].append(parameter)
        else:
            groups["fused" if name.endswith("gate_up_proj") else "matrices"].append(parameter)
    muon = [{"params": groups["fused"], "parts": 2}, {"params": groups["matrices"]}]
    adam: list[dict] = [{"params": groups["tables"]}, {"params": groups["vectors"], "weight_decay": 0.0}]
    return [
        Muon(muon, lr=matrix_lr, weight_decay=weight_decay),
        torch.optim.AdamW(adam, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True),
    ]
