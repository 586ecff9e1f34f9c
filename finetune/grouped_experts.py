"""Expert computation for training on a CPU: one matrix product per expert, on rows sorted by expert.

oneDNN builds and caches a kernel per matrix shape, and the rows of an expert change at every step; row counts are
therefore rounded up to a multiple of 64, the overrun being overwritten by the next expert's rows. Two custom operators
keep a compiled layer in one graph. Selected with `experts_implementation="grouped_cpu"`.
"""

from typing import Any

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

ROWS = 64


@torch.library.custom_op("duet_moe::grouped_linear", mutates_args=())
def grouped_linear(x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Multiply rows sorted by expert with each expert's matrix.

    Args:
        x (rows, in), weight (experts, out, in) of one dtype, counts (experts,) int64: rows of each expert.

    Returns:
        (rows, out)
    """
    rows = x.shape[0]
    y = x.new_empty(rows, weight.shape[1])
    start = 0
    for expert, count in enumerate(counts.tolist()):
        if count:
            stop = min(start + -(-count // ROWS) * ROWS, rows)
            torch.mm(x[start:stop], weight[expert].t(), out=y[start:stop])
        start += count
    return y


@grouped_linear.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op("duet_moe::grouped_linear_backward", mutates_args=())
def grouped_linear_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of `grouped_linear` for `x` and `weight`."""
    grad, rows = grad.contiguous(), x.shape[0]
    grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight)
    start = 0
    for expert, count in enumerate(counts.tolist()):
        if count:
            stop = min(start + -(-count // ROWS) * ROWS, rows)
            torch.mm(grad[start:stop], weight[expert], out=grad_x[start:stop])
            whole = count // ROWS * ROWS
            if whole:
                torch.mm(grad[start : start + whole].t(), x[start : start + whole], out=grad_weight[expert])
            if count > whole:
                rest = slice(start + whole, start + count)
                grad_weight[expert] += torch.mm(grad[rest].t(), x[rest])
        start += count
    return grad_x, grad_weight


@grouped_linear_backward.register_fake
def _(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def _save_inputs(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple:
    return *torch.ops.duet_moe.grouped_linear_backward(grad, *ctx.saved_tensors), None


grouped_linear.register_autograd(_backward, setup_context=_save_inputs)


def grouped_cpu_experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Answer for `hidden_states` (tokens, hidden) by the experts `top_k_index` (tokens, k), in bf16 under autocast."""
    tokens, k = top_k_index.shape
    dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else hidden_states.dtype
    chosen = top_k_index.reshape(-1)
    order = chosen.argsort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    counts = (chosen[:, None] == torch.arange(self.num_experts, device=chosen.device)).sum(0)
    x = hidden_states.to(dtype).index_select(0, order // k)  # (tokens * k, hidden)
    gate, up = grouped_linear(x, self.gate_up_proj.to(dtype), counts).chunk(2, dim=-1)
    y = grouped_linear((self.act_fn(gate) * up).contiguous(), self.down_proj.to(dtype), counts)
    y = y.index_select(0, inverse).view(tokens, k, -1)
    return (y.float() * top_k_weights.float().unsqueeze(-1)).sum(1).to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS["grouped_cpu"] = grouped_cpu_experts_forward
