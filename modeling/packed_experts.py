"""Experts in 4 or 8 bits: packed once, unpacked one at a time where a token needs them.

Codes and scales are ordinary tensors, so that saving and loading needs nothing special. 4 bits use the operators that
bitsandbytes registers with torch, 8 bits are plain torch.
This file travels inside saved checkpoints: it imports only torch, transformers and flat siblings.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import BitsAndBytesConfig

from .moe import DuetMoeExperts

BLOCK = 64  # weights of a row that share a scale in 4 bits, as in bitsandbytes' own layers
PROJECTIONS = ("gate_up_proj", "down_proj")


def pack(weight: torch.Tensor, config: BitsAndBytesConfig) -> dict[str, torch.Tensor]:
    """Quantise `weight` (experts, out, in) and return its codes and scales by name suffix.

    8 bits: int8 codes of the same shape and one float32 `_absmax` a row. 4 bits: two codes a byte in uint8
    (experts, out, in / 2) and one float32 `_absmax` a block of 64 (Dettmers et al. 2023, arXiv 2305.14314, section 3).
    With double quantisation the scales are uint8 shares of a float32 `_absmax_max` a row.
    """
    if config.load_in_8bit:
        absmax = weight.float().abs().amax(-1, keepdim=True)  # (experts, out, 1)
        codes = (weight.float() * (127 / absmax.clamp(min=torch.finfo(torch.float32).tiny))).round().to(torch.int8)
        return {"": codes, "_absmax": absmax}
    rows = weight.shape[:-1]
    codes, absmax = torch.ops.bitsandbytes.quantize_4bit(
        weight.contiguous(), BLOCK, config.bnb_4bit_quant_type, torch.uint8
    )
    packed = {"": codes.view(*rows, -1), "_absmax": absmax.view(*rows, -1)}
    if config.bnb_4bit_use_double_quant:
        largest = packed["_absmax"].amax(-1, keepdim=True)
        share = packed["_absmax"] * (255 / largest.clamp(min=torch.finfo(torch.float32).tiny))
        packed |= {"_absmax": share.round().to(torch.uint8), "_absmax_max": largest}
    return packed


def unpack(
    dtype: torch.dtype, method: str, codes: torch.Tensor, absmax: torch.Tensor, largest: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the weight (..., out, in) in `dtype` that `pack` made codes and scales of; `method` names the codes."""
    if largest is not None:
        absmax = absmax * (largest / 255)
    if method == "llm_int8":
        return (codes * (absmax / 127)).to(dtype)
    shape = (*codes.shape[:-1], 2 * codes.shape[-1])
    return torch.ops.bitsandbytes.dequantize_4bit(
        codes.reshape(-1, 1), absmax.reshape(-1), BLOCK, method, shape, dtype
    )


class _PackedLinear(torch.autograd.Function):
    """`x @ weight.T` for a packed weight, which is unpacked again for the backward pass instead of being kept."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, method: str, *packed: torch.Tensor) -> torch.Tensor:  # type: ignore[no-untyped-def]
        ctx.method = method
        ctx.save_for_backward(*packed)
        return F.linear(x, unpack(x.dtype, method, *packed))

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[no-untyped-def]
        packed = ctx.saved_tensors
        return gradient @ unpack(gradient.dtype, ctx.method, *packed), None, *(None for _ in packed)


class PackedExperts(nn.Module):
    """All experts of a layer in packed form, in place of `experts`; one expert at a time is unpacked."""

    def __init__(self, experts: DuetMoeExperts, config: BitsAndBytesConfig):
        super().__init__()
        self.num_experts = experts.num_experts
        self.act_fn = experts.act_fn
        self.method = config.quantization_method()
        self.compute_dtype = config.bnb_4bit_compute_dtype if config.load_in_4bit else None
        for name in PROJECTIONS:
            for suffix, tensor in pack(getattr(experts, name), config).items():
                if suffix:
                    self.register_buffer(name + suffix, tensor)
                else:
                    self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.suffixes = [suffix for suffix in ("", "_absmax", "_absmax_max") if hasattr(self, name + suffix)]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        output = torch.zeros_like(hidden_states)  # (tokens, hidden)
        inputs = hidden_states.to(self.compute_dtype or hidden_states.dtype)
        # ids at or above num_experts mark tokens that another rank's experts answer for
        for expert in top_k_index[top_k_index < self.num_experts].unique().tolist():
            token, slot = torch.where(top_k_index == expert)
            gate, up = self._project("gate_up_proj", expert, inputs[token]).chunk(2, dim=-1)
            answer = self._project("down_proj", expert, self.act_fn(gate) * up)
            output.index_add_(0, token, (answer * top_k_weights[token, slot, None]).to(output.dtype))
        return output

    def _project(self, name: str, expert: int, states: torch.Tensor) -> torch.Tensor:
        return _PackedLinear.apply(states, self.method, *(getattr(self, name + s)[expert] for s in self.suffixes))

    def unpacked(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight `name` (experts, out, in) of all experts."""
        return unpack(dtype, self.method, *(getattr(self, name + suffix) for suffix in self.suffixes))
