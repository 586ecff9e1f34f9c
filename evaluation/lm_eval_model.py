"""EleutherAI's lm-evaluation-harness on Duet-MoE, in any mode.

The harness has no place for models of other packages, so this module registers `duet_moe` and then is its command
line: `python -m duet_moe.evaluation.lm_eval_model --model duet_moe --model_args pretrained=NAME,mode=creative ...`.
"""

from pathlib import Path
from typing import Any

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from duet_moe.modeling.checkpoints import bundled
from duet_moe.modeling.generation_duet_moe import SAMPLING
from duet_moe.modeling.modeling_duet_moe import DuetMoeForCausalLM

LM_EVAL_TASKS = Path(__file__).parent / "tasks" / "lm_eval"  # for `--include_path`


@register_model("duet_moe")
class DuetMoeLM(HFLM):
    """lm-eval's Hugging Face model with a mode.

    Log-likelihoods are those of the mode's mix of heads and experts; decode rules, which make some of them minus
    infinity, are left out. Text is sampled as the mode says, whatever the task says about sampling.

    Args:
        pretrained (`str` or `DuetMoeForCausalLM`): name of a bundled model, folder, id of the Hub, or a model.
        mode (`str`): `factual`, `creative`, `hybrid` or one that the checkpoint saves; not `auto`, because the harness
            scores a prompt and its answer as one text.
        seed (`int`): the n-th text is drawn from a generator of seed + n, in whatever batches.
        kwargs: as for lm-eval's `hf`.

    Raises:
        ValueError: if the model is of another family, or the mode is not known.
    """

    def __init__(
        self, pretrained: str | DuetMoeForCausalLM, mode: str = "factual", seed: int = 0, **kwargs: Any
    ) -> None:
        if isinstance(pretrained, str) and "/" not in pretrained and not Path(pretrained).is_dir():
            pretrained = str(bundled(pretrained))
        super().__init__(pretrained, **kwargs)
        if self.config.model_type != "duet_moe":
            raise ValueError(f"This is a model of type {self.config.model_type!r}: evaluate it with --model hf.")
        self.mode = self.model.resolved(mode)
        self.next_seed = seed

    def _model_call(
        self, inps: torch.Tensor, attn_mask: torch.Tensor | None = None, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        settings = {name: getattr(self.mode, name) for name in ("head_mix", "gated", "num_experts_per_tok")}
        precision, half = self.mixed_precision_dtype, self.mixed_precision_dtype is not None
        with torch.no_grad(), torch.autocast(self.device.type, dtype=precision, enabled=half):
            return self.model(inps, **settings).logits

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> torch.Tensor:
        kept = {name: value for name, value in generation_kwargs.items() if name not in SAMPLING}
        seed, self.next_seed = self.next_seed, self.next_seed + len(context)
        kwargs = kept | self.mode.sampling_kwargs() | {"mode": self.mode, "seed": seed}
        return super()._model_generate(context, max_length, stop, **kwargs)


if __name__ == "__main__":
    cli_evaluate()
