"""An OpenAI-compatible endpoint as a contestant: a server of your own, or a provider's."""

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from typing import TYPE_CHECKING, Any

from duet_moe.evaluation.timing import Timing

if TYPE_CHECKING:
    from openai import OpenAI

HINTS = {
    401: "Set OPENAI_API_KEY to a key that this endpoint accepts.",
    403: "The key in OPENAI_API_KEY may not use this model.",
    404: "Check the address, which usually ends in /v1, and the name of the model.",
    429: "The endpoint's limit is reached: wait, then run the same command again; it goes on where it stopped.",
}
LATER = "Run the same command again later; it goes on where it stopped."


@dataclass(frozen=True)
class Endpoint:
    """A model behind `/chat/completions`; the key is `$OPENAI_API_KEY`.

    Args:
        name (`str`): what reports call it.
        url (`str`): the base, such as `http://127.0.0.1:8000/v1`.
        model (`str`): as the endpoint calls it.
        timeout (`float`): seconds to wait for an answer. retries (`int`): on timeouts, status 429 and 500 and above.
        workers (`int`): requests at a time.

    Example:

        >>> Endpoint("mine", "http://127.0.0.1:8000/v1", "duet-mini:creative").write(["Hello"], [1], 24)
    """

    name: str
    url: str
    model: str
    timeout: float = 120.0
    retries: int = 4
    workers: int = 4

    def write(self, prompts: Sequence[str], seeds: Sequence[int], max_new_tokens: int) -> list[str]:
        """Answer every prompt with the endpoint's own sampling; whether it honours the seed is up to it.

        Raises:
            RuntimeError: if it cannot be reached, does not answer in time, or answers with an error.
        """
        client = self._client()
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(self._ask, repeat(client), prompts, seeds, repeat(max_new_tokens)))

    def time(self, prompt: str, seed: int, max_new_tokens: int) -> Timing:
        """Stream one answer, of the length that the endpoint chooses; errors as in `write`."""
        started, stamps, counted = time.perf_counter(), [], None
        with self._explained():
            stream = self._client().chat.completions.create(
                **self._request(prompt, seed, max_new_tokens), stream=True, stream_options={"include_usage": True}
            )
            for chunk in stream:
                if chunk.choices and chunk.choices[0].delta.content:
                    stamps.append(time.perf_counter())
                if chunk.usage:
                    counted = chunk.usage.completion_tokens
        return Timing.from_stamps(started, stamps, counted or len(stamps))

    def weights(self) -> dict[str, float]:
        """Return nothing: an endpoint does not say what it holds."""
        return {}

    def _ask(self, client: "OpenAI", prompt: str, seed: int, max_new_tokens: int) -> str:
        with self._explained():
            answer = client.chat.completions.create(**self._request(prompt, seed, max_new_tokens))
        if not answer.choices:
            raise RuntimeError(f"{self.url} sent no answer for the model {self.model!r}. Is it a chat endpoint?")
        return (answer.choices[0].message.content or "").strip()

    def _request(self, prompt: str, seed: int, max_new_tokens: int) -> dict[str, Any]:
        turn = {"role": "user", "content": prompt}
        return {"model": self.model, "messages": [turn], "max_tokens": max_new_tokens, "seed": seed}

    def _client(self) -> "OpenAI":
        from openai import OpenAI

        key = os.environ.get("OPENAI_API_KEY") or "none"  # local servers ask for no key, the library does
        return OpenAI(base_url=self.url, api_key=key, timeout=self.timeout, max_retries=self.retries)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn the library's errors into one line that says what to do."""
        import openai

        asked = f"{self.url} with the model {self.model!r}"
        try:
            yield
        except openai.APITimeoutError as error:
            raise RuntimeError(f"{asked} gave no answer within {self.timeout:g} seconds. {LATER}") from error
        except openai.APIConnectionError as error:
            raise RuntimeError(f"{self.url} cannot be reached: {error.__cause__ or error}. Is it running?") from error
        except openai.APIStatusError as error:
            hint = HINTS.get(error.status_code, LATER if error.status_code >= 500 else "")
            raise RuntimeError(f"{asked} answered {error.status_code}: {error.message} {hint}".rstrip()) from error
