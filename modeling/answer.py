"""An answer while it is being written: tokens come in, whole characters and evidence come out."""

import time
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from duet_moe.modeling.evidence import Text, token_evidence
from duet_moe.modeling.stepping import Step

INCOMPLETE = "\ufffd"  # what a tokenizer shows for the first bytes of a character; they wait for the others


class Answer:
    """One answer while it is being written."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: Text) -> None:
        self.tokenizer = tokenizer
        self.text = text
        self.ended = False
        self.started = time.perf_counter()
        self.first_token = 0.0

    def add(self, step: Step, index: int) -> None:
        """Add the token that `step` chose for row `index`; after its end token an answer stays as it is."""
        if self.ended:
            return
        token = int(step.tokens[index])
        tokens = (*self.text.tokens, token)
        now = time.perf_counter()
        if not self.text.tokens:
            self.first_token = now
        self.ended = token == self.tokenizer.eos_token_id
        shown = self.tokenizer.decode(tokens, skip_special_tokens=True).rstrip(INCOMPLETE)
        added = shown[len(self.text.text) :]
        evidence = self.text.evidence
        if step.coherence_logits is not None and step.diversity_logits is not None:
            share = None if step.diversity_share is None else float(step.diversity_share[index])
            heads = step.coherence_logits[index], step.diversity_logits[index]
            evidence += (token_evidence(token, added, *heads, share),)
        self.text = replace(
            self.text,
            text=shown,
            tokens=tokens,
            evidence=evidence,
            finish_reason="end" if self.ended else "running",
            time_to_first_token=self.first_token - self.started,
            tokens_per_second=(len(tokens) - 1) / (now - self.first_token) if len(tokens) > 1 else 0.0,
        )

    def finished(self, max_new_tokens: int) -> Text:
        """Return the answer with the reason why it ended."""
        reason = "end" if self.ended else "length" if len(self.text.tokens) >= max_new_tokens else "stopped"
        return replace(self.text, finish_reason=reason)
