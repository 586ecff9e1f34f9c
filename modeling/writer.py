"""Prompt to text: `Writer` wraps a model and its tokenizer for people who want words."""

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from duet_moe.configuration.configuration_duet_moe import DuetMoeConfig
from duet_moe.configuration.modes import AUTO, Mode, NotInThisVersionError, read_modes, resolve_mode, voiced
from duet_moe.modeling.answer import Answer
from duet_moe.modeling.checkpoints import locate
from duet_moe.modeling.evidence import Piece, Text
from duet_moe.modeling.generation_duet_moe import row_seeds
from duet_moe.modeling.modeling_duet_moe import DuetMoeForCausalLM
from duet_moe.modeling.prompts import encode_prompts, read_tokenizer, without_special_tokens
from duet_moe.modeling.stepping import decoding_steps
from duet_moe.modeling.task_router import Route
from duet_moe.modeling.voice_files import voice_folder

BASE = "base"  # what `voice=` calls the model itself
SPREAD_GUIDANCE = 3.0  # of plans that are spread out: `benchmarks/brainstorm.py`


class Writer:
    """Writes in the modes of a model.

    Example:

    ```python
    >>> from duet_moe import Writer
    >>> writer = Writer.load("duet-mini")
    >>> answer = writer.write("What is the capital of France?", mode="factual", max_new_tokens=24)
    >>> answer.mode
    'factual'

    ```
    """

    def __init__(
        self,
        model: DuetMoeForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        name: str = "model",
        voice: str | Path | None = None,
        store: str | Path | None = None,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.name = name
        self.store = store
        self.voice = self._voice(voice or BASE)
        self.modes = read_modes(getattr(model.generation_config, "modes", None))

    @classmethod
    def load(
        cls,
        name: str | Path = "duet-mini",
        voice: str | Path | None = None,
        guardrails: str | Path | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        store: str | Path | None = None,
    ) -> "Writer":
        """Load a bundled model by name, a folder, or a model of the Hub.

        Args:
            voice: the diversity head's voice where a call names none: a folder, or a name in `store`.
            dtype: float32 on a CPU and bfloat16 elsewhere, when not given.
            device: a GPU if there is one, when not given.
            store: folder of the voice store; `$DUET_MOE_VOICES` or the user's own when not given.

        Raises:
            FileNotFoundError: if there is no such model or voice, or the model has no tokenizer.
            OSError, ValueError: if the checkpoint is damaged, incomplete, of another family or of a newer version, or
                the voice is damaged or for another base.
            NotInThisVersionError: for `guardrails`.
        """
        if guardrails is not None:
            raise NotInThisVersionError("guardrails=", "Load the model without it.")
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
        source = locate(name)
        try:
            DuetMoeConfig.from_pretrained(source)  # the first to say what is wrong with the checkpoint
            tokenizer = read_tokenizer(source)
            model = DuetMoeForCausalLM.from_pretrained(source, dtype=dtype)
        except OSError as error:
            if Path(source).is_dir():
                raise
            reason = str(error).splitlines()[0]
            raise FileNotFoundError(f"{source!r} is no folder and was not loaded from the Hub: {reason}") from error
        return cls(model.to(device), tokenizer, Path(source).name, voice, store)

    def write(
        self,
        prompt: str,
        mode: str | Mode | None = None,
        max_new_tokens: int = 160,
        seed: int | None = None,
        evidence: bool = True,
        voice: str | Path | None = None,
        **generate_kwargs: Any,
    ) -> Text:
        """Answer `prompt`.

        Args:
            mode: name or `Mode`; "auto" leaves it to the task router, and `Text.route` says what that made of the
                prompt; the model's `default_mode` when not given.
            seed: the same seed gives the same text; drawn and reported when not given.
            evidence: also report what both heads thought of every token (computes both heads).
            voice: a loaded voice, a folder, or a name in the store, which is then loaded; "base" is the model without;
                the writer's own voice when not given. A voice speaks from the diversity head alone in `creative`;
                in other modes rule R1 is off unless `plausible_min` is given, and no plan is drawn.
            generate_kwargs: what `model.generate` takes, such as `temperature`, `head_mix`, `num_experts_per_tok`;
                `plan` may also be a text that sets the theme, and an empty text is no plan.

        Raises:
            ValueError: on an empty prompt, an unknown mode or a setting out of range.
            OSError, ValueError: if there is no such voice, or it is damaged or for another base.
        """
        chosen = self._choose([mode], [prompt])
        *_, final = self._run([prompt], chosen, [seed], max_new_tokens, evidence, voice, generate_kwargs)
        return final[0]

    def stream(
        self,
        prompt: str,
        mode: str | Mode | None = None,
        max_new_tokens: int = 160,
        seed: int | None = None,
        evidence: bool = True,
        voice: str | Path | None = None,
        **generate_kwargs: Any,
    ) -> Iterator[Piece]:
        """Yield the answer as it is written; the pieces' texts join to what `write` returns for the same seed.

        Closing the iterator ends the generation at its next token. Arguments and errors as in `write`.
        """
        shown, told = 0, 0
        chosen = self._choose([mode], [prompt])
        for (text,) in self._run([prompt], chosen, [seed], max_new_tokens, evidence, voice, generate_kwargs):
            if len(text.text) > shown or len(text.evidence) > told:
                yield Piece(text.text[shown:], text.evidence[told:])
            shown, told = len(text.text), len(text.evidence)

    def compare(
        self,
        prompt: str,
        modes: Sequence[str | Mode] = ("factual", "creative"),
        max_new_tokens: int = 160,
        seed: int | None = None,
        **generate_kwargs: Any,
    ) -> dict[str, Text]:
        """Answer `prompt` in several modes at once, as one batch; arguments as in `stream_compare`."""
        *_, final = self.stream_compare(prompt, modes, max_new_tokens, seed, **generate_kwargs)
        return final

    def stream_compare(
        self,
        prompt: str,
        modes: Sequence[str | Mode] = ("factual", "creative"),
        max_new_tokens: int = 160,
        seed: int | None = None,
        evidence: bool = True,
        voice: str | Path | None = None,
        **generate_kwargs: Any,
    ) -> Iterator[dict[str, Text]]:
        """Yield, after every token, each mode's answer so far; the modes share the prompt and the seed.

        Settings given here apply to the modes that sample: the answer of a greedy mode stays what that mode says. A
        mode that is named twice gets a number in its key; the key of "auto" is "auto", whatever it chose.
        """
        chosen = self._choose(modes, [prompt] * len(modes))
        names = [AUTO if route else mode.name for mode, route in chosen]
        keys = [
            name if names.index(name) == i else f"{name} ({names[: i + 1].count(name)})"
            for i, name in enumerate(names)
        ]
        own = {name: generate_kwargs.pop(name) for name in Mode.__dataclass_fields__ if name in generate_kwargs}
        experts = {"num_experts_per_tok": own["num_experts_per_tok"]} if "num_experts_per_tok" in own else {}
        chosen = [(mode.changed(**(own if mode.do_sample else experts)), route) for mode, route in chosen]
        seed = _drawn(seed)
        rows = len(chosen)
        seeds: list[int | None] = [seed] * rows
        for texts in self._run([prompt] * rows, chosen, seeds, max_new_tokens, evidence, voice, generate_kwargs):
            yield dict(zip(keys, texts, strict=True))

    def brainstorm(
        self,
        prompt: str,
        n: int = 8,
        mode: str | Mode | None = None,
        max_new_tokens: int = 80,
        seed: int | None = None,
        evidence: bool = False,
        voice: str | Path | None = None,
        **generate_kwargs: Any,
    ) -> list[Text]:
        """Answer `prompt` `n` times with seeds that count up; arguments and errors as in `write`.

        A model that has learnt plans gives every idea one of its own, spread out so that the ideas lie apart, in modes
        that sample from the diversity head; `plan=""` does without. Guidance is 3 where none is named.
        """
        if n < 1:
            raise ValueError(f"n={n}: ask for at least one idea.")
        seed = _drawn(seed)
        chosen = self._choose([mode], [prompt]) * n
        taken = chosen[0][0]
        free = taken.do_sample and taken.head_mix > 0 and self._voice(voice) is None
        if free and self.model.planner is not None and "plan" not in generate_kwargs:
            generate_kwargs["plan"] = self.model.planner.spread(n, seed)
            generate_kwargs.setdefault("plan_guidance", taken.plan_guidance or SPREAD_GUIDANCE)
        seeds = row_seeds(seed, n)
        *_, final = self._run([prompt] * n, chosen, seeds, max_new_tokens, evidence, voice, generate_kwargs)
        return final

    def write_batch(
        self,
        prompts: Sequence[str],
        mode: str | Mode | None = None,
        max_new_tokens: int = 160,
        seed: int | list[int] | None = None,
        evidence: bool = False,
        voice: str | Path | Sequence[str | Path | None] | None = None,
        **generate_kwargs: Any,
    ) -> list[Text]:
        """Answer several prompts as one batch, with seeds that count up; arguments and errors as in `write`.

        Args:
            seed, voice: also a list with one for each prompt.
        """
        seeds = row_seeds(_drawn(seed) if seed is None else seed, len(prompts))
        chosen = self._choose([mode] * len(prompts), prompts)
        *_, final = self._run(list(prompts), chosen, seeds, max_new_tokens, evidence, voice, generate_kwargs)
        return final

    def plan(self, theme: str) -> torch.Tensor:
        """Return the plan (1, plan_size) that a text's words make; zeros, which is no plan, of an empty text.

        Raises:
            ValueError: if the model has learnt no plans.
        """
        if self.model.planner is None:
            raise ValueError(f"{self.name} has learnt no plans: leave out plan=, or train its diversity head on them.")
        ids = self.tokenizer(
            without_special_tokens(self.tokenizer, theme), add_special_tokens=False, return_tensors="pt"
        )
        ids = ids["input_ids"][0].long().to(self.model.device)
        return self.model.planner.of_tokens(ids, self.model.coherence_head.unembed.weight)[None]

    def route(self, prompt: str) -> Route:
        """Say whether `prompt` asks for invention or for facts: what `mode="auto"` goes by.

        Raises:
            ValueError: on an empty prompt, or if the model has no task router.
        """
        return self.model.route(**self.encode([prompt], 1)[0])[0]

    @property
    def mode_names(self) -> list[str]:
        """What `mode=` takes by name: the modes, and "auto" where the model has a task router."""
        return [*self.modes, *([] if self.model.task_router is None else [AUTO])]

    def _mode(self, mode: str | Mode) -> Mode:
        known = {name: asdict(saved) for name, saved in self.modes.items()}
        return resolve_mode(mode, known)

    def _choose(self, modes: Sequence[str | Mode | None], prompts: Sequence[str]) -> list[tuple[Mode, Route | None]]:
        """Return each prompt's mode, and what the task router said where it chose; equal prompts are read once."""
        asked = [mode or self.model.config.default_mode for mode in modes]
        read = list(dict.fromkeys(prompt for mode, prompt in zip(asked, prompts, strict=True) if mode == AUTO))
        found = dict(zip(read, self.model.route(**self.encode(read, 1)[0]), strict=True)) if read else {}
        routes = [found[prompt] if mode == AUTO else None for mode, prompt in zip(asked, prompts, strict=True)]
        return [(self._mode(route.mode if route else mode), route) for mode, route in zip(asked, routes, strict=True)]

    def _voices(self, voice: str | Path | Sequence[str | Path | None] | None, rows: int) -> list[str | None]:
        given = [voice] * rows if voice is None or isinstance(voice, str | Path) else list(voice)
        if len(given) != rows:
            raise ValueError(f"voice has {len(given)} entries for {rows} prompts: give one for all, or one for each.")
        return [self._voice(entry) for entry in given]

    def _voice(self, voice: str | Path | None) -> str | None:
        """Return the name of a voice, loading it if need be; `None` is the base."""
        if voice is None:
            return self.voice
        if voice == BASE:
            return None
        if voice in self.model.voice_names:
            return str(voice)
        return self.model.load_voice(voice_folder(voice, self.store))

    def _run(
        self,
        prompts: list[str],
        chosen: Sequence[tuple[Mode, Route | None]],
        seeds: Sequence[int | None],
        max_new_tokens: int,
        evidence: bool,
        voice: str | Path | Sequence[str | Path | None] | None,
        generate_kwargs: dict[str, Any],
    ) -> Iterator[list[Text]]:
        """Yield all rows' answers after every step, the last time with their finish reasons."""
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens}: ask for at least one token.")
        batch, notes = self.encode(prompts, max_new_tokens)
        voices = self._voices(voice, len(prompts))
        if isinstance(generate_kwargs.get("plan"), str):
            generate_kwargs = generate_kwargs | {"plan": self.plan(generate_kwargs["plan"]).repeat(len(prompts), 1)}
        modes = [
            voiced(mode, self.modes["creative"]) if named else mode
            for (mode, _), named in zip(chosen, voices, strict=True)
        ]
        drawn = [_drawn(seed) for seed in seeds]
        rows = [
            Answer(self.tokenizer, Text("", mode.name, prompt, seed, notes=note, voice=named, route=route))
            for (mode, route), prompt, seed, note, named in zip(chosen, prompts, drawn, notes, voices, strict=True)
        ]
        steps = decoding_steps(
            self.model,
            **batch,
            mode=modes,
            seed=drawn,
            max_new_tokens=max_new_tokens,
            output_head_logits=evidence,
            voice=voices,
            **generate_kwargs,
        )
        try:
            for step in steps:
                for index, row in enumerate(rows):
                    row.add(step, index)
                yield [row.text for row in rows]
        finally:
            steps.close()  # type: ignore[attr-defined]
        yield [row.finished(max_new_tokens) for row in rows]

    def encode(
        self, prompts: Sequence[str], max_new_tokens: int
    ) -> tuple[dict[str, torch.Tensor], list[tuple[str, ...]]]:
        """Return prompts as the model reads them, and notes on each of them.

        Returns:
            `input_ids` and `attention_mask`, (prompts, seq), padded on the left, on the model's device.

        Raises:
            ValueError: on an empty prompt, or where `max_new_tokens` leave no room for one.
        """
        context = self.model.config.max_position_embeddings
        batch, notes = encode_prompts(self.tokenizer, prompts, context, max_new_tokens)
        return {name: tensor.to(self.model.device) for name, tensor in batch.items()}, notes


def _drawn(seed: int | None) -> int:
    return secrets.randbelow(2**31) if seed is None else seed
