"""Modes: named ways to join the two heads and to sample, saved in `generation_config.json`.

`factual` answers greedily from the coherence head; `creative` samples at a high temperature from the geometric mix,
which leans to the diversity head, among the tokens that the coherence head finds plausible; `hybrid` samples from the
even mix. Users add their own with `Mode(...)`.
This file travels inside saved checkpoints, so it imports only the standard library.
"""

from dataclasses import asdict, dataclass, replace

AUTO = "auto"  # in the place of a mode's name: the model's task router chooses one by the prompt


class NotInThisVersionError(RuntimeError):
    """A documented feature that a later version brings."""

    def __init__(self, feature: str, instead: str):
        super().__init__(f"{feature} is not in this version. {instead}")


@dataclass(frozen=True)
class Mode:
    """How to join the heads and how to sample.

    Args:
        name (`str`): what users call it.
        head_mix (`float`): 0 is the coherence head, 1 the diversity head, between them the geometric mix (rule R3).
        plausible_min (`float`): forbid tokens whose coherence probability is below this share of the best (rule R1);
            0 forbids nothing.
        draw_plan (`bool`): steer each sample of the diversity head by a plan drawn from the model's bank, if it has
            one and the call gives no plan.
        gated (`bool`): let the model's gate weigh the heads at every token, in the place of `head_mix`; a model that
            has no gate keeps to `head_mix`.
        plan_guidance (`float`): weight of plan guidance (rule R2); 0 is off, and it needs a plan.
        num_experts_per_tok (`int`, *optional*): active experts; the model's own number when `None`.
        do_sample, temperature, top_k, top_p, min_p, repetition_penalty: as in `transformers.GenerationConfig`;
            `top_k=0`, `top_p=1`, `min_p=0` are off.

    Raises:
        ValueError: on a value out of range, naming it.
    """

    name: str
    head_mix: float = 0.0
    plausible_min: float = 0.0
    draw_plan: bool = False
    plan_guidance: float = 0.0
    num_experts_per_tok: int | None = None
    gated: bool = False
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for field in ("head_mix", "plausible_min", "top_p", "min_p"):
            if not 0.0 <= getattr(self, field) <= 1.0:
                raise ValueError(f"Mode {self.name!r}: {field}={getattr(self, field)!r} must be between 0 and 1.")
        for field in ("temperature", "repetition_penalty"):
            if not getattr(self, field) > 0.0:
                raise ValueError(f"Mode {self.name!r}: {field}={getattr(self, field)!r} must be above 0.")
        for field in ("plan_guidance", "top_k"):
            if not getattr(self, field) >= 0:
                raise ValueError(f"Mode {self.name!r}: {field}={getattr(self, field)!r} must not be negative.")
        if self.num_experts_per_tok is not None and self.num_experts_per_tok < 1:
            raise ValueError(
                f"Mode {self.name!r}: num_experts_per_tok={self.num_experts_per_tok!r} must be 1 or more, or None for "
                "the model's own number."
            )

    def changed(self, **settings: float | int | bool | None) -> "Mode":
        """Return the mode with settings of a call, which win: a `head_mix` takes the place of the gate too."""
        return replace(self, **({"gated": False} if "head_mix" in settings else {}) | settings)  # type: ignore[arg-type]

    def forward_kwargs(self) -> dict[str, float | int]:
        """Return the part that `forward` applies: how the heads are joined and how many experts answer."""
        names = ("head_mix", "gated", "plausible_min", "plan_guidance", "num_experts_per_tok")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def sampling_kwargs(self) -> dict[str, float | int | bool]:
        """Return the part that `GenerationConfig` holds; sampling settings only where the mode samples."""
        kwargs: dict[str, float | int | bool] = {
            "do_sample": self.do_sample,
            "repetition_penalty": self.repetition_penalty,
        }
        if self.do_sample:
            kwargs |= {name: getattr(self, name) for name in ("temperature", "top_k", "top_p")}
            kwargs |= {"min_p": self.min_p} if self.min_p else {}
        return kwargs


BUILT_IN_MODES: dict[str, Mode] = {
    mode.name: mode
    for mode in (
        Mode("factual", head_mix=0.0),
        Mode("creative", head_mix=0.7, plausible_min=0.05, do_sample=True, temperature=1.5, min_p=0.1),
        Mode("hybrid", head_mix=0.5, do_sample=True, temperature=0.7, min_p=0.05),
    )
}

VOICED = Mode("creative", head_mix=1.0, do_sample=True, temperature=0.8, min_p=0.05)


def voiced(mode: Mode, creative: Mode) -> Mode:
    """Return `mode` as a voice speaks in it: by no rule that asks the coherence head, which never heard of the voice.

    What `mode` has in common with `creative`, the model's mode of this name, gives way to the diversity head alone at
    a lower temperature; of another mode rule R1 and plans are left out.
    """
    if mode.name == creative.name:
        mode = replace(VOICED, **{n: value for n, value in asdict(mode).items() if value != getattr(creative, n)})
    return replace(mode, plausible_min=0.0, draw_plan=False)


def read_modes(saved: dict[str, dict] | None) -> dict[str, Mode]:
    """Return the built-in modes and those saved with a checkpoint, which win.

    Raises:
        ValueError: if a saved mode has a setting that this version does not know, or a value out of range.
    """
    modes = dict(BUILT_IN_MODES)
    for name, fields in (saved or {}).items():
        if unknown := fields.keys() - Mode.__dataclass_fields__.keys():
            raise ValueError(
                f"Mode {name!r} has settings that this version of duet-moe does not know: {sorted(unknown)}. A newer "
                "version saved it. Upgrade this one: pip install --upgrade duet-moe."
            )
        modes[name] = Mode(**fields)
    return modes


def resolve_mode(mode: str | Mode, known: dict[str, dict] | None = None) -> Mode:
    """Return the mode of that name, or the `Mode` itself.

    Args:
        known (`dict[str, dict]`, *optional*): modes saved with a checkpoint; they win over the built-in ones.

    Raises:
        ValueError: if no mode has that name, or a saved one has a setting that this version does not know; for
            `"auto"`, which no prompt is there to choose for.
    """
    if isinstance(mode, Mode):
        return mode
    modes = read_modes(known)
    if mode in modes:
        return modes[mode]
    if mode == AUTO:
        raise ValueError(f"mode='auto' is chosen by a prompt, and there is none here: choose one of {sorted(modes)}.")
    raise ValueError(f"mode={mode!r} is not known: choose one of {sorted(modes)}, or pass a Mode(...) of your own.")


def modes_as_dict(modes: dict[str, Mode]) -> dict[str, dict]:
    """Return the modes as plain data for `generation_config.json`."""
    return {name: asdict(mode) for name, mode in modes.items()}
