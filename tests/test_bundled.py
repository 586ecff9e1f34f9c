"""The checkpoint that comes with the package: its shape, its size, its card, and that it writes."""

import json
import math

import pytest

from duet_moe import DuetMoeConfig, Writer, bundled


@pytest.fixture(scope="module")
def writer() -> Writer:
    return Writer.load("duet-mini")


def test_its_shape_is_a_sparse_mixture_with_a_window_that_works() -> None:
    config = DuetMoeConfig.from_pretrained(bundled("duet-mini"))
    assert config.num_local_experts >= 16 and config.num_experts_per_tok == 4 and config.num_hidden_layers >= 4
    assert config.sliding_window < config.max_position_embeddings


def test_it_fits_in_60_megabytes() -> None:
    assert sum(file.stat().st_size for file in bundled("duet-mini").iterdir()) <= 60_000_000


def test_both_modes_write_and_a_seed_repeats(writer: Writer) -> None:
    first = writer.compare("Write a tagline for a small bakery.", seed=4, max_new_tokens=24)
    again = writer.compare("Write a tagline for a small bakery.", seed=4, max_new_tokens=24)
    assert [text.text for text in first.values()] == [text.text for text in again.values()]
    assert all(text.text.strip() for text in first.values())
    assert {round(e.disagreement, 6) for e in first["factual"].evidence} != {0.0}, "the two heads are one"


def test_every_number_of_experts_from_2_to_8_writes_sense(writer: Writer) -> None:
    import torch

    ids = writer.tokenizer("Once upon a time, there was a little girl named Lily.", return_tensors="pt")["input_ids"]
    losses = {}
    for k in range(2, 9):
        with torch.no_grad():
            losses[k] = float(writer.model(ids, labels=ids, num_experts_per_tok=k, head_mix=1.0).loss)
    # far below ln(8192) = 9.0, the loss of a model that knows nothing
    assert max(losses.values()) < 0.6 * math.log(writer.model.config.vocab_size), losses


def test_its_card_has_the_measured_figures() -> None:
    folder = bundled("duet-mini")
    figures = json.loads((folder / "evaluation.json").read_text())
    page = (folder / "README.md").read_text()
    for name, row in figures["facts"].items():
        assert f"| {name.replace('_', ' ')} | {row['questions']:.0f} | {row['factual']:.1%} |" in page
    assert figures["facts"]["held_out_wordings"]["factual"] > figures["facts"]["held_out_wordings"]["creative"]
    assert figures["diversity"]["creative"]["distinct_2"] > figures["diversity"]["factual"]["distinct_2"]
