"""What other libraries take a model without its output matrix for."""

import torch
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel


class DuetMoeHeadStates:
    """The model short of an output matrix, which is what other libraries take `base_model` for.

    TRL's trainers do not call `forward`: they multiply `base_model(...).last_hidden_state` by the weight of
    `get_output_embeddings()`. Of the bare trunk that would leave out a head's adapter and norm and train a wrong model
    without a word; here it gives the logits of the head that `config.head_mix` names. All else is the trunk's.
    """

    def __init__(self, model: PreTrainedModel):
        self._model = model

    def __getattr__(self, name: str) -> object:
        return getattr(self._model.model, name)

    def __call__(self, *args: object, **kwargs: object) -> MoeModelOutputWithPast:
        """Return the trunk's output, `last_hidden_state` (batch, seq, hidden) being what `unembed` multiplies.

        Raises:
            ValueError: if `config.head_mix` names no single head, or one that training cannot change.
            TypeError: on an argument of the heads, whose settings cannot differ from call to call here.
        """
        model = self._model
        if model.config.head_mix not in (0, 1):
            raise ValueError(
                f"config.head_mix={model.config.head_mix} joins both heads, and this library computes its loss from "
                "one output matrix: set config.head_mix to 0.0 (coherence head) or 1.0 (diversity head)."
            )
        if own := kwargs.keys() & {
            "head_mix",
            "gated",
            "plan",
            "plan_guidance",
            "plausible_min",
            "output_head_logits",
            "voice",
        }:
            raise TypeError(f"base_model does not take {sorted(own)}: set config.head_mix to 0.0 or 1.0 instead.")
        head = model._configured_head()
        used = (weight for part in (head, model.model) for weight in part.parameters())
        if model.training and torch.is_grad_enabled() and not any(weight.requires_grad for weight in used):
            raise ValueError(
                f"Nothing that config.head_mix={model.config.head_mix} uses can be trained: set it to the head whose "
                "weights are trainable, 0.0 for the coherence head or 1.0 for the diversity head."
            )
        outputs = model.model(*args, **kwargs)
        outputs.last_hidden_state = head(outputs.last_hidden_state, only_features=True)
        return outputs
