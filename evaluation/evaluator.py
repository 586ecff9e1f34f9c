"""The independent evaluator: how many bits another language model needs per character of a text.

It measures quality, and only of texts whose writer it is no kin of: other data, other tokenizer, other weights. Fewer
bits mean more likely text, and far fewer than human text has mean bland text, so the figure for human text belongs
beside every other.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

LONGEST_WINDOW = 1024  # tokens; longer texts are read in windows that overlap by half
_MOST_LOGITS = 2**27  # of one forward pass: 0.5 GB in float32
_IGNORED = -100


class Evaluator:
    """A causal language model that judges texts.

    ```python
    evaluator = Evaluator.load("runs/evaluator")
    evaluator.bits_per_character(["The fox ran.", "Fox the the ran."])  # array([2.1, 4.4])
    ```

    Args:
        model: any causal language model of transformers.
        tokenizer: its tokenizer, which has to have a token that begins a text (`bos_token`, else `eos_token`).
        window (`int`, *optional*): tokens of one forward pass, at most the model's context, which is the default up
            to 1024.

    Raises:
        ValueError: on such a window, or without such a token.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, window: int | None = None) -> None:
        context = getattr(model.config, "max_position_embeddings", None) or LONGEST_WINDOW
        self.window = min(context, LONGEST_WINDOW) if window is None else window
        if not 2 <= self.window <= context:
            raise ValueError(f"window is {window}; give 2 to {context} tokens, which the evaluator can read at once.")
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if start is None:
            raise ValueError(
                "The evaluator's tokenizer has neither bos_token nor eos_token, so that the first token of a text has "
                "nothing to follow: set one of them."
            )
        self.start: int = start
        self.model = model.eval()
        self.tokenizer = tokenizer

    @classmethod
    def load(cls, name: str, window: int | None = None, dtype: torch.dtype = torch.float32) -> "Evaluator":
        """Load a causal language model by folder or Hub id, onto the GPU where there is one.

        Raises:
            OSError: if there is no such model.
        """
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device)
        return cls(model, AutoTokenizer.from_pretrained(name), window)

    def bits_per_character(
        self, texts: Sequence[str], prompts: Sequence[str] | None = None, separator: str = "\n\n"
    ) -> np.ndarray:
        """Return the bits per character (Unicode code point) of every text, (texts,) float64; fewer is more likely.

        Special tokens written out in a text count as plain characters. The end of the text is not judged. From the
        second window on, a token is judged by at least half a window before it.

        Args:
            prompts: what each text answers or continues; read, but not counted.
            separator: stands between prompt and text; the empty string for texts that continue their prompt.

        Raises:
            ValueError: without texts, on an empty text, on another number of prompts, on characters that the tokenizer
                does not know, and if the model gives no finite figure.
        """
        if isinstance(texts, str) or isinstance(prompts, str):
            raise ValueError("texts and prompts are lists of strings, not one string: put it into a list.")
        if not texts:
            raise ValueError("There are no texts to judge: give one or more.")
        if prompts is not None and len(prompts) != len(texts):
            raise ValueError(f"{len(prompts)} prompts do not go with {len(texts)} texts: give one for each.")
        for number, text in enumerate(texts):
            if not text.strip():
                raise ValueError(f"Text {number} is {text!r}: an empty text has no bits per character, leave it out.")
        before = [[] for _ in texts] if prompts is None else self._encode([p + separator for p in prompts])
        bits = self._nats(before, self._encode(texts)) / math.log(2) / [len(text) for text in texts]
        if not np.isfinite(bits).all():
            number = int(np.argmin(np.isfinite(bits)))
            raise ValueError(
                f"The evaluator gives text {number} {bits[number]} bits per character: its weights are bad."
            )
        return bits

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        # prompts and texts apart, so that no token spans the two
        encoded = self.tokenizer(
            list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False, padding=False
        )["input_ids"]
        unknown = self.tokenizer.unk_token_id
        for text, ids in zip(texts, encoded, strict=True):
            if unknown is not None and unknown in ids:
                raise ValueError(
                    f"The evaluator's tokenizer does not know every character of {text[:60]!r}, so that their "
                    "bits would be missing: take an evaluator with a byte-level tokenizer."
                )
        return encoded

    def _nats(self, before: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]) -> np.ndarray:
        """Return the negative log-likelihood in nats of every text, (texts,) float64."""
        windows = [
            (number, tokens, judged)
            for number, (prompt, text) in enumerate(zip(before, texts, strict=True))
            for tokens, judged in _windows([self.start, *prompt, *text], 1 + len(prompt), self.window)
        ]
        nats = np.zeros(len(texts))
        windows.sort(key=lambda window: len(window[1]))  # little padding
        rows = max(1, _MOST_LOGITS // (self.window * self.model.config.get_text_config().vocab_size))
        for first in range(0, len(windows), rows):
            batch = windows[first : first + rows]
            np.add.at(nats, [number for number, _, _ in batch], self._window_nats(batch))
        return nats

    @torch.no_grad()
    def _window_nats(self, batch: Sequence[tuple[int, Sequence[int], int]]) -> np.ndarray:
        """Return the nats of the judged tokens of every window, (windows,) float64."""
        shape = (len(batch), max(len(tokens) for _, tokens, _ in batch))
        input_ids = torch.full(shape, self.start)
        mask = torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, _IGNORED)
        for row, (_, tokens, judged) in enumerate(batch):
            input_ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1  # padding is on the right, where no judged token sees it
            labels[row, judged : len(tokens)] = input_ids[row, judged : len(tokens)]
        device = self.model.device
        logits = self.model(input_ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
        targets = labels[:, 1:].to(device)  # (windows, tokens - 1)
        flat = logits[:, :-1].flatten(0, 1).float()
        nats = F.cross_entropy(flat, targets.flatten(), ignore_index=_IGNORED, reduction="none")
        return nats.view_as(targets).double().sum(1).cpu().numpy()


def _windows(tokens: Sequence[int], judged: int, window: int) -> Iterator[tuple[Sequence[int], int]]:
    """Yield overlapping windows of `tokens` and where in each begins what none before has judged.

    Args:
        judged: index of the first token that is to be judged; windows without such tokens are left out.
    """
    begin = 0
    while judged < len(tokens):
        stop = begin + window
        if judged < stop:
            yield tokens[begin:stop], judged - begin
            judged = stop
        begin += max(1, window // 2)
