"""States that are computed once train a head exactly as the whole model would."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from transformers import PreTrainedTokenizerBase

from duet_moe.finetune import features
from duet_moe.finetune.corpus import Document
from duet_moe.finetune.features import collate, trunk_states
from duet_moe.finetune.token_store import encode

DOCUMENTS = [
    Document("Sell bread.", "Warm bread, said the little fox."),
    Document(None, "The fox ran."),
    Document("Sing.", "La."),
    Document("Tell me a story about a fox.", "Once upon a time there was a fox. It ran and ran and ran."),
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return tiny_tokenizer()


def frozen(tokenizer: PreTrainedTokenizerBase, seed: int = 0):  # type: ignore[no-untyped-def]
    return tiny_model(seed, vocab_size=len(tokenizer)).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_and_targets_are_those_of_the_whole_model(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "BATCH_TOKENS", 60)  # several batches
    model = frozen(tokenizer).to(dtype)
    states = trunk_states(model, DOCUMENTS, tokenizer, tmp_path, show=False)
    assert len(states) == len(DOCUMENTS)
    for item, (ids, start) in zip(states, encode(DOCUMENTS, tokenizer), strict=False):
        whole = model.model(torch.from_numpy(ids.astype(np.int64))[None]).last_hidden_state[0]
        first = max(1, start)
        assert item["shift_labels"].tolist() == ids[first:].tolist()
        assert item["trunk_states"].dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(item["trunk_states"], whole[first - 1 : -1], atol=tolerance, rtol=tolerance)


def test_the_loss_is_that_of_the_whole_model_on_padded_rows(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = frozen(tokenizer)
    states = trunk_states(model, DOCUMENTS, tokenizer, tmp_path, show=False)
    batch = collate([states[i] for i in range(len(states))])
    rows = encode(DOCUMENTS, tokenizer)
    width = max(len(ids) for ids, _ in rows)
    input_ids, labels = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), -100)
    for row, (ids, start) in enumerate(rows):
        input_ids[row, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
        labels[row, start : len(ids)] = input_ids[row, start : len(ids)]
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows])
    expected = model(input_ids, mask, labels=labels, head_mix=1.0).loss
    assert model(head_mix=1.0, **batch).loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert len(batch["labels"][0]) == states.positions


def test_a_second_call_reads_what_the_first_wrote(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = trunk_states(frozen(tokenizer), DOCUMENTS, tokenizer, tmp_path, show=False)
    monkeypatch.setattr(features, "_compute", lambda *_: pytest.fail("computed again"))
    again = trunk_states(frozen(tokenizer), DOCUMENTS, tokenizer, tmp_path, show=False)
    assert torch.equal(first.states, again.states)


def test_another_trunk_text_or_dtype_has_other_states(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = frozen(tokenizer)
    folders = {trunk_states(model, DOCUMENTS, tokenizer, tmp_path, show=False).folder}
    for others in (DOCUMENTS[1:], DOCUMENTS[:-1]):
        folders.add(trunk_states(model, others, tokenizer, tmp_path, show=False).folder)
    model.model.layers[0].self_attn.q_proj.weight += 1e-3
    folders.add(trunk_states(model, DOCUMENTS, tokenizer, tmp_path, show=False).folder)
    folders.add(trunk_states(model.bfloat16(), DOCUMENTS, tokenizer, tmp_path, show=False).folder)
    assert len(folders) == 5
    model.diversity_head.unembed.weight += 1.0  # no part of the trunk
    assert trunk_states(model, DOCUMENTS, tokenizer, tmp_path, show=False).folder in folders


def test_an_interruption_leaves_nothing(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match="No space"):
        trunk_states(frozen(tokenizer), DOCUMENTS, tokenizer, tmp_path, show=False)
    assert not list(tmp_path.iterdir())


def test_a_trunk_that_learns_and_an_empty_corpus_are_refused(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="no documents"):
        trunk_states(frozen(tokenizer), [], tokenizer, tmp_path)
    with pytest.raises(ValueError, match="require gradients"):
        trunk_states(frozen(tokenizer).requires_grad_(True), DOCUMENTS, tokenizer, tmp_path)


def test_the_heads_take_states_instead_of_tokens_and_not_both(tokenizer: PreTrainedTokenizerBase) -> None:
    model, ids = frozen(tokenizer), torch.tensor([[5, 6, 7]])
    states = model.model(ids).last_hidden_state
    assert torch.equal(model(trunk_states=states, head_mix=0.3).logits, model(ids, head_mix=0.3).logits)
    with pytest.raises(ValueError, match="trunk_states stand in for the trunk"):
        model(ids, trunk_states=states)
