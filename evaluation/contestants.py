"""Who is evaluated: a model of ours in a mode or voice, any causal language model, or an OpenAI-compatible endpoint.

Evaluations need a name and `write`. What only some can do, timing an answer and scoring a given one, are protocols of
their own; a task that needs them leaves the others out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from duet_moe.configuration.modes import AUTO, Mode, voiced
from duet_moe.evaluation.causal import Causal, fingerprint, load_one, log_likelihood
from duet_moe.evaluation.endpoint import Endpoint
from duet_moe.evaluation.timing import Timing, peak_memory_bytes, reset_peak_memory
from duet_moe.modeling.checkpoints import locate
from duet_moe.modeling.footprint import bytes_by_group
from duet_moe.modeling.info import parameter_counts
from duet_moe.modeling.task_router import ROUTED
from duet_moe.modeling.voice_files import voice_folder
from duet_moe.modeling.writer import BASE, Writer

VOICE, GREEDY = "voice-", "greedy"
EXAMPLES = "duet-mini, duet-mini:creative, duet-mini:voice-NAME, hf:FOLDER, openai:http://HOST:PORT/v1#MODEL"


class Contestant(Protocol):
    """Anything that answers prompts.

    Args:
        name (`str`): what results and reports call it.
    """

    @property
    def name(self) -> str: ...

    def write(self, prompts: Sequence[str], seeds: Sequence[int], max_new_tokens: int) -> list[str]:
        """Answer each prompt with its own seed; equal calls give equal texts where the contestant can."""
        ...


@runtime_checkable
class Timed(Protocol):
    """A contestant whose answers can be timed."""

    def time(self, prompt: str, seed: int, max_new_tokens: int) -> Timing:
        """Write one answer, of full length where that can be asked for."""
        ...

    def weights(self) -> dict[str, float]:
        """Return `active_parameters` (of one token) and `weight_bytes` (as held), where they are known."""
        ...


@runtime_checkable
class Scoring(Protocol):
    """A contestant that says how likely a given answer is."""

    def log_likelihood(self, prompt: str, answer: str) -> float:
        """Return the natural logarithm of the answer's probability after the prompt."""
        ...


@runtime_checkable
class Local(Protocol):
    """A contestant whose files may change between two runs."""

    def fingerprint(self) -> str:
        """Return a digest of the names, sizes and times of its files."""
        ...


def contestant(spec: str, voice_store: str | Path | None = None) -> Contestant:
    """Return the contestant that `spec` names; models are loaded when they are first used.

    Args:
        spec: `MODEL`, `MODEL:MODE` or `MODEL:voice-NAME` with a bundled name, folder or Hub id of a Duet-MoE model;
            `hf:MODEL` for any causal language model, sampled as its generation configuration says, `hf:MODEL:greedy`
            for its most likely words; `openai:URL#MODEL` for an endpoint.
        voice_store: folder of the voice store; `$DUET_MOE_VOICES` or the user's own when not given.

    Raises:
        ValueError: if it is none of these.
        FileNotFoundError: if there is no such model or voice.
    """
    family, _, rest = spec.partition(":")
    if family == "openai":
        url, _, model = rest.partition("#")
        if not url.startswith(("http://", "https://")) or not model:
            raise ValueError(f"{spec!r} is no endpoint: write openai:http://HOST:PORT/v1#MODEL.")
        return Endpoint(spec, url, model)
    if family == "hf":
        source, greedy = rest.removesuffix(f":{GREEDY}"), rest.endswith(f":{GREEDY}")
        if not source:
            raise ValueError(f"{spec!r} names no model: write hf:FOLDER or hf:OWNER/NAME.")
        return Causal(spec, source, greedy)
    source, choice = spec.rsplit(":", 1) if ":" in spec else (spec, "")
    if not source:
        raise ValueError(f"{spec!r} names no contestant; such are: {EXAMPLES}.")
    locate(source)
    if not choice.startswith(VOICE):
        return Duet(spec, source, choice or None)
    voice_folder(choice.removeprefix(VOICE), voice_store)
    return Duet(spec, source, "creative", choice.removeprefix(VOICE), voice_store)


@dataclass(frozen=True)
class Duet:
    """A Duet-MoE model in one mode, with or without a voice.

    Args:
        name (`str`): what reports call it.
        source (`str`): bundled name, folder or Hub id.
        mode (`str` or `Mode`, *optional*): the model's default mode when not given.
        voice (`str`, *optional*): a voice of the store. store (*optional*): folder of the voice store.

    Example:

        >>> Duet("mine", "duet-mini", "creative").write(["Write a tagline for a bakery."], [1], 24)
    """

    name: str
    source: str
    mode: str | Mode | None = None
    voice: str | None = None
    store: str | Path | None = None

    @property
    def writer(self) -> Writer:
        """The writer, with the voice loaded; one model at a time stays in memory."""
        writer = load_one(Writer.load, self.source)
        if self.voice is not None and self.voice not in writer.model.voice_names:
            writer.model.load_voice(voice_folder(self.voice, self.store), self.voice)
        return writer

    def write(self, prompts: Sequence[str], seeds: Sequence[int], max_new_tokens: int) -> list[str]:
        """Answer as one batch; errors as those of `Writer.write`."""
        texts = self.writer.write_batch(prompts, self.mode, max_new_tokens, list(seeds), voice=self.voice or BASE)
        return [text.text for text in texts]

    def time(self, prompt: str, seed: int, max_new_tokens: int) -> Timing:
        """Write one answer of exactly `max_new_tokens` tokens."""
        writer = self.writer
        reset_peak_memory()
        text = writer.write(
            prompt, self.mode, max_new_tokens, seed, False, self.voice or BASE, min_new_tokens=max_new_tokens
        )
        peak = peak_memory_bytes()
        return Timing(len(text.tokens), text.time_to_first_token, text.tokens_per_second, peak)

    def weights(self) -> dict[str, float]:
        """Return `active_parameters`, with both heads where the mode uses both, and `weight_bytes`.

        In the mode "auto" they are those of the costliest mode that the task router may choose.
        """
        model = self.writer.model
        chosen = [self._mode(name) for name in ROUTED] if self._asked() == AUTO else [self._mode(self._asked())]
        return {
            "active_parameters": float(max(self._active_parameters(mode) for mode in chosen)),
            "weight_bytes": float(bytes_by_group(model)["total"]),
        }

    def _active_parameters(self, mode: Mode) -> int:
        plausible = mode.head_mix > 0.0 and mode.plausible_min > 0.0  # rule R1 asks both heads
        both = plausible or mode.gated or 0.0 < mode.head_mix < 1.0
        counts = parameter_counts(self.writer.model, mode.num_experts_per_tok)
        return counts["active_both_heads" if both else "active"]

    def log_likelihood(self, prompt: str, answer: str) -> float:
        """Score under the mode's mix of heads and experts; decode rules, which forbid words, are left out.

        The mode "auto" is what the task router makes of the prompt.
        """
        writer, asked = self.writer, self._asked()
        mode = self._mode(writer.route(prompt).mode if asked == AUTO else asked)
        names = ("head_mix", "gated", "num_experts_per_tok")
        settings: dict[str, Any] = {name: getattr(mode, name) for name in names}
        if self.voice is not None:
            settings["voice"] = torch.tensor([writer.model.voices.index(self.voice)], device=writer.model.device)
        return log_likelihood(writer.model, writer.tokenizer, prompt, answer, **settings)

    def fingerprint(self) -> str:
        """Return a digest of the model's files and the voice's."""
        folders = [locate(self.source)]
        folders += [] if self.voice is None else [str(voice_folder(self.voice, self.store))]
        return fingerprint(folders)

    def _asked(self) -> str | Mode:
        return self.mode or self.writer.model.config.default_mode

    def _mode(self, mode: str | Mode) -> Mode:
        writer = self.writer
        found = writer.model.resolved(mode)
        return found if self.voice is None else voiced(found, writer.modes["creative"])
