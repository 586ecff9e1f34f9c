"""Sparse mixture of experts with an elastic number of active experts.

Experts are fused 3D tensors under `@use_experts_implementation`, so that the library's kernels (eager, batched_mm,
grouped_mm), expert parallelism and quantisers apply. The router softmaxes over all experts, keeps the best k and
renormalises them, as Mixtral does (Jiang et al. 2024, arXiv 2401.04088, section 2.1); OLMoE does not.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation

from .configuration_duet_moe import DuetMoeConfig


@use_experts_implementation
class DuetMoeExperts(nn.Module):
    """All experts of a layer; this plain loop is the reference that the faster implementations must equal."""

    def __init__(self, config: DuetMoeConfig):
        super().__init__()
        self.num_experts = config.num_local_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        output = torch.zeros_like(hidden_states)  # (tokens, hidden)
        # ids at or above num_experts mark tokens that another rank's experts answer for
        for expert in top_k_index[top_k_index < self.num_experts].unique().tolist():
            token, slot = torch.where(top_k_index == expert)
            gate, up = F.linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            answer = F.linear(self.act_fn(gate) * up, self.down_proj[expert])
            output.index_add_(0, token, (answer * top_k_weights[token, slot, None]).to(output.dtype))
        return output


class DuetMoeTopKRouter(nn.Module):
    """Chooses the experts of every token."""

    def __init__(self, config: DuetMoeConfig):
        super().__init__()
        self.num_experts_per_tok = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(config.num_local_experts, config.hidden_size))

    def forward(
        self, hidden_states: torch.Tensor, num_experts_per_tok: int | torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Route `hidden_states` (tokens, hidden).

        Args:
            num_experts_per_tok (`int` or `torch.Tensor` of shape (tokens,), *optional*): overrides the configured k.

        Returns:
            Router logits (tokens, experts), weights and expert ids (tokens, k). Where a token wants fewer than the
            largest k, its last weights are 0.
        """
        k = self.num_experts_per_tok if num_experts_per_tok is None else num_experts_per_tok
        widest = k if isinstance(k, int) else int(k.max())
        router_logits = F.linear(hidden_states, self.weight)  # (tokens, experts)
        weights, experts = router_logits.float().softmax(dim=-1).topk(widest, dim=-1)
        if not isinstance(k, int):
            weights = weights.masked_fill(torch.arange(widest, device=k.device) >= k[:, None], 0.0)
        if self.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return router_logits, weights, experts


class DuetMoeSharedExperts(nn.Module):
    """Experts that answer for every token, fused into one SwiGLU (DeepSeekMoE, arXiv 2401.06066, section 3.2)."""

    def __init__(self, config: DuetMoeConfig):
        super().__init__()
        width = config.num_shared_experts * config.intermediate_size
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class DuetMoeSparseBlock(nn.Module):
    """Router, routed experts and, if there are any, shared experts."""

    def __init__(self, config: DuetMoeConfig):
        super().__init__()
        self.gate = DuetMoeTopKRouter(config)
        self.experts = DuetMoeExperts(config)
        self.shared_experts = DuetMoeSharedExperts(config) if config.num_shared_experts else None

    def forward(
        self, hidden_states: torch.Tensor, num_experts_per_tok: int | torch.Tensor | None = None
    ) -> torch.Tensor:
        """Map (batch, seq, hidden) to the same shape; `num_experts_per_tok` is an int or one value per row."""
        batch, length, hidden = hidden_states.shape
        if isinstance(num_experts_per_tok, torch.Tensor):
            num_experts_per_tok = num_experts_per_tok.repeat_interleave(length)  # (tokens,)
        flat = hidden_states.reshape(-1, hidden)  # (tokens, hidden)
        _, weights, experts = self.gate(flat, num_experts_per_tok)
        output = self.experts(flat, experts, weights)
        if self.shared_experts is not None:
            output = output + self.shared_experts(flat)
        return output.view(batch, length, hidden)
