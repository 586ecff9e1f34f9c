"""The pretraining objective: every row teaches the trunk and exactly one head.

Rows arrive sorted by head, so a head computes its own rows only. The loss over the vocabulary runs in chunks that
never hold more than `CHUNK` rows of logits, forward and backward together.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from duet_moe.modeling.modeling_duet_moe import DuetMoeForCausalLM

IGNORED = -100
CHUNK = 1024  # rows of logits at a time
ROWS = 256  # rows are filled up to a multiple, so that kernels are built for a few shapes only


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies of `features @ weight.T` (rows, hidden) against targets (rows,), in nats.

    Rows whose target is `IGNORED` count nothing.
    """

    @staticmethod
    def forward(
        ctx: Any, features: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, compiled: bool = False
    ) -> torch.Tensor:
        chunk_loss = _compiled_loss_and_gradient if compiled else _loss_and_gradient
        dtype = torch.bfloat16 if torch.is_autocast_enabled(features.device.type) else features.dtype
        rows, table = features.to(dtype), weight.to(dtype)
        total = features.new_zeros((), dtype=torch.float32)
        grad_features, grad_weight = torch.empty_like(rows), torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, len(rows), CHUNK):
            part = slice(start, start + CHUNK)
            loss, grad_logits = chunk_loss(rows[part] @ table.t(), targets[part])
            total += loss
            torch.mm(grad_logits, table, out=grad_features[part])
            grad_weight += grad_logits.t() @ rows[part]
        ctx.save_for_backward(grad_features, grad_weight)
        ctx.dtypes = features.dtype, weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        grad_features, grad_weight = ctx.saved_tensors
        features_dtype, weight_dtype = ctx.dtypes
        return (grad_features * grad).to(features_dtype), (grad_weight * grad).to(weight_dtype), None, None


def _loss_and_gradient(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scores, scored = logits.float(), (targets != IGNORED)[:, None]
    top = scores.amax(1, keepdim=True)
    log_sum = top + (scores - top).exp().sum(1, keepdim=True).log()
    loss = ((log_sum - scores.gather(1, targets.clamp(min=0)[:, None])) * scored).sum()
    # a comparison fuses where a scatter would not
    chosen = torch.arange(logits.shape[1], device=logits.device)[None] == targets[:, None]
    return loss, (((scores - log_sum).exp() - chosen.float()) * scored).to(logits.dtype)


_compiled_loss_and_gradient = torch.compile(_loss_and_gradient, dynamic=False)  # compiles when first called


def position_ids(document_ids: torch.Tensor) -> torch.Tensor:
    """Count positions (batch, seq) from 0 in every document of packed rows."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    starts = document_ids.diff(dim=1, prepend=document_ids[:, :1] - 1) != 0
    return index - torch.where(starts, index, 0).cummax(dim=1).values


class TwoVoicesLoss(nn.Module):
    """Model and objective in one module, so that distributed wrappers see every gradient."""

    def __init__(
        self, model: DuetMoeForCausalLM, router_aux_loss_coef: float | None = None, compile: bool = False
    ) -> None:
        super().__init__()
        self.compiled = compile
        self.model = model
        self.aux_coef = model.config.router_aux_loss_coef if router_aux_loss_coef is None else router_aux_loss_coef

    def forward(
        self, batch: dict[str, torch.Tensor], num_experts_per_tok: int | None = None
    ) -> dict[str, torch.Tensor]:
        """Return `loss` (to minimise) and, detached, `coherence_loss`, `diversity_loss` (nats per token), `aux_loss`.

        Args:
            batch: `input_ids`, `labels`, `document_ids` (batch, seq) and `head` (batch,), as `Packer` yields them.
        """
        outputs = self.model.model(
            batch["input_ids"],
            position_ids=position_ids(batch["document_ids"]),
            use_cache=False,
            num_experts_per_tok=num_experts_per_tok,
            output_router_logits=True,
        )
        hidden = outputs.last_hidden_state
        sums, counts = {}, {}
        for number, name in enumerate(("coherence", "diversity")):
            rows = batch["head"] == number
            targets = F.pad(batch["labels"][rows][:, 1:], (0, 1), value=IGNORED)
            scored = targets != IGNORED
            counts[name] = scored.sum()
            head = getattr(self.model, f"{name}_head")
            if counts[name]:
                fill = -int(counts[name]) % ROWS
                features = head.features(F.pad(hidden[rows][scored], (0, 0, 0, fill)))
                targets = F.pad(targets[scored], (0, fill), value=IGNORED)
                sums[name] = ChunkedCrossEntropy.apply(features, head.unembed.weight, targets, self.compiled)
            else:  # keep every parameter in the graph, as distributed training needs
                sums[name] = 0.0 * head.unembed.weight[0].sum()
        aux = balance_loss(outputs.router_logits, num_experts_per_tok or self.model.config.num_experts_per_tok)
        loss = (sums["coherence"] + sums["diversity"]) / (counts["coherence"] + counts["diversity"]).clamp(min=1)
        named = {f"{name}_loss": (sums[name] / counts[name].clamp(min=1)).detach() for name in sums}
        return {"loss": loss + self.aux_coef * aux, "aux_loss": aux.detach(), **named}


def balance_loss(router_logits: tuple[torch.Tensor, ...], k: int) -> torch.Tensor:
    """Return the load-balance loss of Switch Transformers (Fedus et al. 2021, equation 4), mean over layers.

    An even load gives 1.

    Args:
        router_logits: one tensor (tokens, experts) per layer.
    """
    losses = []
    for logits in router_logits:
        probabilities = logits.float().softmax(-1)
        experts = probabilities.shape[-1]
        chosen = F.one_hot(probabilities.topk(k, dim=-1).indices, experts).sum(1).float()  # (tokens, experts)
        losses.append(experts / k * (chosen.mean(0) * probabilities.mean(0)).sum())
    return torch.stack(losses).mean()
