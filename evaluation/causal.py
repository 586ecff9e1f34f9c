"""Any causal language model of Transformers as a contestant, and what one of ours shares with it."""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from duet_moe.evaluation.timing import Timing, peak_memory_bytes, reset_peak_memory


@dataclass(frozen=True)
class Causal:
    """Any causal language model of Transformers, asked through its chat template if it has one.

    Args:
        name (`str`): what reports call it.
        source (`str`): folder or Hub id.
        greedy (`bool`): take the most likely words; otherwise sample, as the generation configuration says.
    """

    name: str
    source: str
    greedy: bool = False

    def write(self, prompts: Sequence[str], seeds: Sequence[int], max_new_tokens: int) -> list[str]:
        """Answer one prompt after the other, so that a text depends on its own seed alone."""
        model, tokenizer = load_one(_causal, self.source)
        answers = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            ids = _prompt_ids(tokenizer, prompt)
            written = self._generate(model, ids, seed, max_new_tokens=max_new_tokens)[len(ids) :]
            answers.append(tokenizer.decode(written, skip_special_tokens=True).strip())
        return answers

    def time(self, prompt: str, seed: int, max_new_tokens: int) -> Timing:
        """Write one answer of exactly `max_new_tokens` tokens."""
        model, tokenizer = load_one(_causal, self.source)
        stamps: list[float] = []
        ids = _prompt_ids(tokenizer, prompt)
        reset_peak_memory()
        started = time.perf_counter()
        length = {"max_new_tokens": max_new_tokens, "min_new_tokens": max_new_tokens}
        self._generate(model, ids, seed, streamer=_Stopwatch(stamps), **length)
        # the streamer is handed the prompt first
        return Timing.from_stamps(started, stamps[1:], len(stamps) - 1, peak_memory_bytes())

    def weights(self) -> dict[str, float]:
        """Return `active_parameters`, of the chosen experts where there are some, and `weight_bytes`."""
        model, _ = load_one(_causal, self.source)
        return {"active_parameters": float(_active(model)), "weight_bytes": float(model.get_memory_footprint())}

    def log_likelihood(self, prompt: str, answer: str) -> float:
        """Score `answer` at temperature 1."""
        model, tokenizer = load_one(_causal, self.source)
        return log_likelihood(model, tokenizer, prompt, answer)

    def fingerprint(self) -> str:
        """Return a digest of the model's files."""
        return fingerprint([self.source])

    def _generate(self, model: PreTrainedModel, ids: list[int], seed: int, **kwargs: Any) -> torch.Tensor:
        inputs = torch.tensor([ids], device=model.device)
        config = model.generation_config
        pad = config.pad_token_id if config.pad_token_id is not None else 0
        devices = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            return model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                do_sample=not self.greedy,
                pad_token_id=pad,
                **kwargs,
            )[0]


class _Stopwatch:
    """A streamer that notes when tokens come."""

    def __init__(self, stamps: list[float]) -> None:
        self.stamps = stamps

    def put(self, value: torch.Tensor) -> None:
        self.stamps.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing: the last token's time is known."""


@lru_cache(maxsize=1)
def load_one(loader: Callable[[str], Any], source: str) -> Any:
    """Return `loader(source)`, the last one again if it is asked for again: one model at a time stays in memory."""
    return loader(source)


def _causal(source: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(source)
    return AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval().to(device), tokenizer


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    if not tokenizer.chat_template:
        return tokenizer(prompt)["input_ids"]
    turn = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@torch.inference_mode()
def log_likelihood(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, **kwargs: Any
) -> float:
    """Return the nats of `answer` after `prompt`; a model without a chat template sees a space between them."""
    asked = _prompt_ids(tokenizer, prompt)
    spoken = answer if tokenizer.chat_template else f" {answer}"
    ids = torch.tensor([[*asked, *tokenizer(spoken, add_special_tokens=False)["input_ids"]]], device=model.device)
    logits = model(ids, **kwargs).logits[0, len(asked) - 1 : -1].float()  # (answer, vocab)
    return float(logits.log_softmax(-1).gather(-1, ids[0, len(asked) :, None]).sum())


def _active(model: PreTrainedModel) -> int:
    """Return the parameters that one token uses, the embedding table not counted but where it is the output matrix."""
    config = model.config.get_text_config()
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    held = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 1
    chosen = getattr(config, "num_experts_per_tok", None) or held
    table, output = model.get_input_embeddings().weight, model.get_output_embeddings()
    tied = output is not None and output.weight is table
    return model.num_parameters() - experts * (held - chosen) // held - (0 if tied else table.numel())


def fingerprint(sources: Sequence[str]) -> str:
    """Return a digest of the names, sizes and times of the files in those `sources` that are folders."""
    stats = [
        (source, file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for source in sources
        for file in (sorted(Path(source).iterdir()) if Path(source).is_dir() else [])
    ]
    return hashlib.sha256(repr((list(sources), stats)).encode()).hexdigest()[:16]
