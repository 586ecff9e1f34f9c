"""`generate()` with modes, in every decoding strategy of transformers.

A mode has two parts: what `forward` joins (mix, decode rules, experts), which travels as ordinary model arguments and
so works for greedy, sampling, beams, prompt-lookup, assisted and streaming; and how to sample. One mode for the whole
batch sets the library's own sampling; a list of modes, or a `seed`, samples row by row in [`RowSampler`].
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import DynamicCache
from transformers.generation import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .cache import DuetMoeCache
from .modes import AUTO, Mode, NotInThisVersionError, resolve_mode

SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class RowSampler(LogitsProcessor):
    """Samples every row by its own mode, so that one batch may hold greedy and free rows.

    A greedy choice over scores with Gumbel noise is a sample (Gumbel-max), so `generate` runs greedily and each row
    draws from its own generator: a row's text does not depend on its neighbours.

    Args:
        modes (`list[Mode]`): one per row; only their sampling part is used.
        seeds (`list[int]`): one per row.
    """

    def __init__(self, modes: list[Mode], seeds: list[int]):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.groups = {mode: [row for row, other in enumerate(modes) if other == mode] for mode in modes}
        self.warpers = {mode: _warpers(mode) for mode in self.groups}

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.Tensor:
        warped = torch.empty_like(scores)
        for mode, rows in self.groups.items():
            group = self.warpers[mode](input_ids[rows], scores[rows])
            if mode.do_sample:
                draws = [torch.rand(group.shape[1:], generator=self.generators[row]) for row in rows]
                uniform = torch.stack(draws).to(scores.device)
                group = group - (-uniform.clamp(min=1e-20).log()).log()
            warped[rows] = group
        return warped


def _warpers(mode: Mode) -> LogitsProcessorList:
    warpers = LogitsProcessorList()
    if mode.repetition_penalty != 1.0:
        warpers.append(RepetitionPenaltyLogitsProcessor(mode.repetition_penalty))
    if mode.do_sample:
        warpers.append(TemperatureLogitsWarper(mode.temperature))
        if mode.top_k:
            warpers.append(TopKLogitsWarper(mode.top_k))
        if mode.top_p < 1.0:
            warpers.append(TopPLogitsWarper(mode.top_p))
        if mode.min_p:
            warpers.append(MinPLogitsWarper(mode.min_p))
    return warpers


class DuetMoeGenerationMixin(GenerationMixin):
    """Adds `mode`, `seed` and the heads' arguments to `generate`."""

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        mode: str | Mode | list[str | Mode] | None = None,
        seed: int | list[int] | None = None,
        voice: str | list[str | None] | torch.LongTensor | None = None,
        guardrails: object | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate as in transformers, in a mode.

        Args:
            mode (`str`, `Mode` or a list with one per row, *optional*): how to join the heads and how to sample;
                `"auto"` leaves it to the task router, row by row. An argument given beside it (`temperature=`,
                `head_mix=`, ...) wins over the mode's.
            seed (`int` or one per row, *optional*): draw row by row from generators of these seeds; an int counts up
                from row to row. Without it, sampling uses torch's global generator.
            voice (`str` or a list with one per row, *optional*): names of loaded voices; `None` in a list is the base.
            plan (`torch.Tensor` of shape (batch, plan_size), *optional*): as in `forward`; where a mode draws plans,
                one of the model's bank by the row's seed when not given.
            head_mix, gated, plan_guidance, plausible_min, num_experts_per_tok: as in `forward`; a `head_mix` that the
                call names takes the place of the mode's gate.

        Raises:
            ValueError: if a mode or voice is not known, or `mode`/`seed`/`voice` have another length than the batch,
                or `seed`, a list of modes or "auto" meets beams or several continuations per prompt, or a mode is
                "auto" and the model has no task router or the call no `input_ids`.
            NotInThisVersionError: for `guardrails`.
        """
        if guardrails is not None:
            raise NotInThisVersionError("guardrails=", "Generate without it.")
        for name in ("head_mix", "gated", "num_experts_per_tok"):  # only tensors are repeated for beams
            if isinstance(kwargs.get(name), list):
                kwargs[name] = torch.tensor(kwargs[name])
        if self.token_gate is None and generation_config is not None and generation_config.is_assistant:
            kwargs.pop("gated", None)  # it drafts for a model that has a gate
        if voice is not None:  # a tensor, so that it is repeated for beams
            kwargs["voice"] = self._voice_indices(voice, _batch_size(inputs, kwargs))
        if mode is None and seed is None:
            return super().generate(inputs, generation_config=generation_config, **kwargs)
        if "head_mix" in kwargs:
            kwargs.setdefault("gated", False)
        if AUTO in (mode if isinstance(mode, list) else [mode]):
            mode = self._routed(mode, inputs, kwargs)
        generation_config = copy.deepcopy(generation_config or self.generation_config)
        known = getattr(generation_config, "modes", None) or getattr(self.generation_config, "modes", None)
        if isinstance(mode, list) or seed is not None:
            rows = _batch_size(inputs, kwargs)
            own = {name: kwargs.pop(name) for name in SAMPLING if name in kwargs}
            modes = [_with(self.resolved(m, known), own) for m in _per_row(mode, rows, "mode", generation_config)]
            seeds = row_seeds(seed, rows)
            self._sample_by_row(modes, seeds, generation_config, kwargs)
            if mode is not None:
                kwargs = _batched_forward_kwargs(modes, self.config.num_experts_per_tok) | kwargs
            self._draw_plans(modes, seeds, kwargs)
        else:
            chosen = self.resolved(mode, known)
            for name, value in chosen.sampling_kwargs().items():
                setattr(generation_config, name, kwargs.pop(name, value))
            kwargs = chosen.forward_kwargs() | kwargs
            if chosen.draw_plan:
                rows = _batch_size(inputs, kwargs)
                self._draw_plans([chosen] * rows, row_seeds(None, rows), kwargs)
        for name in set(kwargs) & set(generation_config.to_dict()):
            setattr(generation_config, name, kwargs.pop(name))
        return super().generate(inputs, generation_config=generation_config, **kwargs)

    def _routed(
        self, mode: str | Mode | list[str | Mode], inputs: torch.Tensor | None, kwargs: dict
    ) -> list[str | Mode]:
        """Return one mode per row, the router's where it says "auto"."""
        input_ids = inputs if inputs is not None else kwargs.get("input_ids")
        if input_ids is None:
            raise ValueError('mode="auto" reads the prompt: give input_ids, or choose a mode yourself.')
        modes = _per_row(mode, len(input_ids), "mode", self.generation_config)
        routes = self.route(input_ids, kwargs.get("attention_mask"))
        return [route.mode if each == AUTO else each for each, route in zip(modes, routes, strict=True)]

    def resolved(self, mode: str | Mode, known: dict[str, dict] | None = None) -> Mode:
        """Return the mode as `resolve_mode` does, with its gate only where this model has one."""
        found = resolve_mode(mode, known or getattr(self.generation_config, "modes", None))
        return found if self.token_gate is not None else replace(found, gated=False)

    def _draw_plans(self, modes: list[Mode], seeds: list[int], kwargs: dict) -> None:
        """Give the rows whose mode draws a plan one of the bank, where the call gives none and there is a bank."""
        drawing = [mode.draw_plan for mode in modes]
        if kwargs.get("plan") is None and self.planner is not None and any(drawing):
            plan = self.planner.draw(seeds)
            kwargs["plan"] = torch.where(torch.tensor(drawing, device=plan.device)[:, None], plan, 0.0)

    def _voice_indices(self, voice: str | list[str | None] | torch.LongTensor, rows: int) -> torch.Tensor:
        if isinstance(voice, torch.Tensor):
            return voice
        if not isinstance(voice, list):
            voice = [voice] * rows
        if len(voice) != rows:
            raise ValueError(f"voice has {len(voice)} entries for {rows} rows: give one for all, or one for each row.")
        return torch.tensor([self.voices.index(name) for name in voice])

    def _sample_by_row(
        self, modes: list[Mode], seeds: list[int], generation_config: GenerationConfig, kwargs: dict
    ) -> None:
        for name in ("num_beams", "num_return_sequences"):
            if (kwargs.get(name) or getattr(generation_config, name) or 1) != 1:
                raise ValueError(
                    f'seed=, mode="auto" and a list of modes sample row by row, so {name} must be 1: name one mode '
                    "for all rows, or repeat the prompt."
                )
        processors = LogitsProcessorList(kwargs.pop("logits_processor", None) or [])
        kwargs["logits_processor"] = LogitsProcessorList([*processors, RowSampler(modes, seeds)])
        generation_config.do_sample = False
        for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
            setattr(generation_config, name, None)

    def prepare_inputs_for_generation(
        self,
        *args: object,
        inputs_embeds: torch.Tensor | None = None,
        on_step: Callable[[object], None] | None = None,
        **kwargs: object,
    ) -> dict[str, object]:
        """As in transformers; `on_step` is called with the model's output at every step and is not passed on."""
        return super().prepare_inputs_for_generation(*args, inputs_embeds=inputs_embeds, **kwargs)

    def _update_model_kwargs_for_generation(
        self, outputs: object, model_kwargs: dict, *args: object, **kwargs: object
    ) -> dict:
        if (on_step := model_kwargs.get("on_step")) is not None:
            on_step(outputs)
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict, *args: object, **kwargs: object
    ) -> None:
        given = model_kwargs.get("cache")
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        made = model_kwargs.get("cache")
        if given is None and type(made) is DynamicCache and not made.offloading:
            model_kwargs["cache"] = DuetMoeCache(self.config)
            if generation_config.is_assistant:
                model_kwargs["cache"].activate_past_recording()

    @staticmethod
    def create_masks_for_generate(attention_mask: torch.Tensor | None = None, **kwargs: object) -> torch.Tensor | None:
        """Leave masks to the model, which builds them from positions for every cache."""
        return attention_mask


def _with(mode: Mode, own: dict) -> Mode:
    fields = {name: getattr(mode, name) for name in Mode.__dataclass_fields__} | own
    return Mode(**fields)


def _batch_size(inputs: torch.Tensor | None, kwargs: dict) -> int:
    for tensor in (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds")):
        if tensor is not None:
            return len(tensor)
    raise ValueError(
        "generate needs input_ids or inputs_embeds to know how many rows mode=, seed= and voice= are for."
    )


def _per_row(value: object, rows: int, name: str, generation_config: GenerationConfig) -> list:
    if value is None:  # only a seed: the settings that the generation config has
        own = {field: set_to for field in SAMPLING if (set_to := getattr(generation_config, field, None)) is not None}
        value = Mode("as configured", **own)
    if not isinstance(value, list):
        return [value] * rows
    if len(value) != rows:
        raise ValueError(f"{name} has {len(value)} entries for {rows} rows: give one for all, or one for each row.")
    return value


def row_seeds(seed: int | list[int] | None, rows: int) -> list[int]:
    """Return one seed per row: those given, or counting up from the one given or drawn."""
    if seed is None:
        return torch.randint(2**31, (rows,)).tolist()
    if isinstance(seed, int):
        return [seed + row for row in range(rows)]
    if len(seed) != rows:
        raise ValueError(f"seed has {len(seed)} entries for {rows} rows: give one for all, or one for each row.")
    return seed


def _batched_forward_kwargs(modes: list[Mode], default_experts: int) -> dict[str, object]:
    """Return `forward`'s arguments for rows of these modes: plain numbers where all agree, else one value per row."""
    kwargs: dict[str, object] = {}
    for name in ("head_mix", "gated", "plausible_min", "plan_guidance"):
        values = [getattr(mode, name) for mode in modes]
        kwargs[name] = values[0] if len(set(values)) == 1 else torch.tensor(values)
    experts = [mode.num_experts_per_tok or default_experts for mode in modes]
    kwargs["num_experts_per_tok"] = experts[0] if len(set(experts)) == 1 else torch.tensor(experts)
    return kwargs
