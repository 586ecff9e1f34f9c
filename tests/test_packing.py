"""Rows, labels, shares and resuming of the packer, on numbers small enough to check by eye."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from duet_moe.finetune.corpus import Document, Source
from duet_moe.finetune.packing import COHERENCE, DIVERSITY, IGNORED, Packer, TokenStore, encode, encode_corpus
from duet_moe.finetune.tokenizer import ASSISTANT, END, TEXT, USER, train_tokenizer

TOKENIZER = train_tokenizer(["the fox ran over the hill and sang"] * 50, vocab_size=270)


def store(name: str, lengths: list[int], weight: float = 1, head: str = "both", first: int = 1000) -> TokenStore:
    """Make documents whose every token is the number of its document, beginning at `first`."""
    ids = np.concatenate([np.full(length, first + number, np.int32) for number, length in enumerate(lengths)])
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    starts = np.array([min(3, length - 1) for length in lengths], dtype=np.int32)
    return TokenStore(Source(name, name, weight, head), ids, offsets, starts)


def lengths(seed: int, count: int = 200, longest: int = 40) -> list[int]:
    return np.random.default_rng(seed).integers(4, longest, count).tolist()


@pytest.fixture
def stores() -> list[TokenStore]:
    return [
        store("prose", lengths(0), 4, "both", 1000),
        store("facts", lengths(1), 1, "coherence", 2000),
        store("tales", lengths(2), 3, "diversity", 3000),
    ]


def take(packer: Packer, count: int) -> list[dict[str, torch.Tensor]]:
    return [next(packer) for _ in range(count)]


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def test_encode_gives_chat_and_plain_format() -> None:
    chat, plain = encode([Document("the fox <|end|>", " ran "), Document(None, "over")], TOKENIZER)
    ids, loss_start = chat
    assert ids.dtype == np.int32
    assert (ids[0], ids[loss_start - 1], ids[-1]) == (USER, ASSISTANT, END)
    assert Counter(ids.tolist())[END] == 1
    assert TOKENIZER.decode(ids[loss_start:-1]) == "ran"
    assert (plain[0][0], plain[0][-1], plain[1]) == (TEXT, END, 1)
    assert encode([], TOKENIZER) == []


def test_encode_agrees_with_the_chat_template() -> None:
    ids, _ = encode([Document("the fox", "ran")], TOKENIZER)[0]
    turns = [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "ran"}]
    assert ids.tolist() == TOKENIZER.apply_chat_template(turns, return_dict=True)["input_ids"]


def test_batches_have_fixed_shapes_and_heads_in_order(stores: list[TokenStore]) -> None:
    packer = Packer(stores, batch_size=8, seq_len=64)
    assert packer.coherence_rows == 3  # weights 1 + 4/2 of 8
    for batch in take(packer, 10):
        assert batch["input_ids"].shape == batch["labels"].shape == batch["document_ids"].shape == (8, 64)
        assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
        assert batch["document_ids"].dtype == torch.int32
        assert batch["head"].tolist() == [COHERENCE] * 3 + [DIVERSITY] * 5


def test_rows_hold_documents_of_their_head_only(stores: list[TokenStore]) -> None:
    for batch in take(Packer(stores, batch_size=8, seq_len=64), 20):
        families = [set((row[row > 0] // 1000).tolist()) for row in batch["input_ids"]]
        assert all(family <= {1, 2} for family in families[:3])
        assert all(family <= {1, 3} for family in families[3:])


def test_labels_stand_at_their_token_and_skip_first_tokens_and_padding(stores: list[TokenStore]) -> None:
    batch = next(Packer(stores, batch_size=8, seq_len=64))
    for ids, labels, documents in zip(batch["input_ids"], batch["labels"], batch["document_ids"], strict=True):
        filled = documents >= 0
        assert torch.equal(ids == 0, ~filled)
        new = torch.cat([torch.tensor([True]), documents[1:] != documents[:-1]])
        assert torch.equal(labels == IGNORED, new | ~filled)
        assert torch.equal(labels[labels != IGNORED], ids[labels != IGNORED])
        assert documents[filled].unique().tolist() == list(range(int(documents.max()) + 1))


def test_response_only_hides_the_prompt(stores: list[TokenStore]) -> None:
    batch = next(Packer(stores, batch_size=8, seq_len=64, response_only=True))
    for labels, documents in zip(batch["labels"], batch["document_ids"], strict=True):
        for document in range(int(documents.max()) + 1):
            inside = labels[documents == document]
            assert (inside[:3] == IGNORED).all()
            assert (inside[3:] != IGNORED).all()


def test_long_documents_lose_no_label() -> None:
    ids = np.arange(100, 250, dtype=np.int32)
    long = TokenStore(Source("a", "a", 1, "coherence"), ids, np.array([0, 150]), np.array([1], dtype=np.int32))
    packer = Packer([long], batch_size=1, seq_len=32)
    labels = [label for piece in packer.pieces(0, 0) for label in packer._tokens(piece)[1].tolist()]
    assert [label for label in labels if label != IGNORED] == list(range(101, 250))
    assert max(len(piece) for piece in packer.pieces(0, 0)) == 32


def test_pieces_that_are_all_prompt_are_not_trained_on_in_response_only() -> None:
    ids = np.arange(100, 200, dtype=np.int32)
    long = TokenStore(Source("a", "a", 1, "coherence"), ids, np.array([0, 100]), np.array([80], dtype=np.int32))
    packer = Packer([long], batch_size=1, seq_len=32, response_only=True)
    labels = [label for piece in packer.pieces(0, 0) for label in packer._tokens(piece)[1].tolist()]
    assert [label for label in labels if label != IGNORED] == list(range(180, 200))
    assert all(piece.stop > 80 for piece in packer.pieces(0, 0))


def test_tokens_follow_the_weights(stores: list[TokenStore]) -> None:
    packer = Packer(stores, batch_size=8, seq_len=64)
    counts = Counter()
    for batch in take(packer, 150):
        counts.update((batch["input_ids"][batch["input_ids"] > 0] // 1000).tolist())
    shares = np.array([counts[1], counts[2], counts[3]]) / sum(counts.values())
    assert shares == pytest.approx([4 / 8, 1 / 8, 3 / 8], abs=0.02)


def test_rows_are_full(stores: list[TokenStore]) -> None:
    filled = [
        (batch["document_ids"] >= 0).float().mean().item()
        for batch in take(Packer(stores, batch_size=8, seq_len=128), 20)
    ]
    assert np.mean(filled) > 0.97


def test_every_document_is_read_once_per_epoch() -> None:
    one = store("a", [10] * 50, head="coherence")
    packer = Packer([one], batch_size=1, seq_len=50)
    seen = [int(token) for batch in take(packer, 8) for token in batch["input_ids"][0, ::10]]
    assert len(set(seen)) == 40
    assert packer.epochs()["a"] > 0.8


def test_both_heads_share_a_source_without_overlap_within_an_epoch() -> None:
    packer = Packer([store("a", [10] * 80)], batch_size=2, seq_len=50)
    heads = [set(), set()]
    for batch in take(packer, 8):
        for row, head in zip(batch["input_ids"], batch["head"].tolist(), strict=True):
            heads[head] |= set(row[::10].tolist())
    assert [len(head) for head in heads] == [40, 40]
    assert not heads[0] & heads[1]


def test_ranks_read_disjoint_documents() -> None:
    seen = []
    for rank in range(2):
        packer = Packer([store("a", [10] * 80, head="coherence")], batch_size=1, seq_len=50, rank=rank, world=2)
        seen.append({int(token) for batch in take(packer, 8) for token in batch["input_ids"][0, ::10]})
    assert [len(part) for part in seen] == [40, 40]
    assert not seen[0] & seen[1]


def test_seeds_repeat_and_differ(stores: list[TokenStore]) -> None:
    first, again, other = (Packer(stores, batch_size=4, seq_len=64, seed=seed) for seed in (7, 7, 8))
    batches = take(first, 5)
    assert all(same(x, y) for x, y in zip(batches, take(again, 5), strict=True))
    assert not same(batches[0], next(other))


@pytest.mark.parametrize("before", [0, 1, 7, 60])
def test_resume_is_exact_through_json(stores: list[TokenStore], before: int) -> None:
    packer = Packer(stores, batch_size=4, seq_len=64)
    take(packer, before)
    state = json.loads(json.dumps(packer.state_dict()))
    expected = take(packer, 20)
    resumed = Packer(stores, batch_size=4, seq_len=64)
    resumed.load_state_dict(state)
    assert all(same(x, y) for x, y in zip(expected, take(resumed, 20), strict=True))


def test_resume_with_other_settings_is_refused(stores: list[TokenStore]) -> None:
    state = Packer(stores, batch_size=4, seq_len=64).state_dict()
    with pytest.raises(ValueError, match="resume with the same recipe"):
        Packer(stores, batch_size=4, seq_len=32).load_state_dict(state)


def test_one_headed_recipes_fill_the_batch_with_that_head() -> None:
    batch = next(Packer([store("a", lengths(0), head="diversity")], batch_size=4, seq_len=64))
    assert batch["head"].tolist() == [DIVERSITY] * 4


def test_impossible_requests_are_refused(stores: list[TokenStore]) -> None:
    with pytest.raises(ValueError, match="rank is 2 of world 2"):
        Packer(stores, batch_size=4, seq_len=64, rank=2, world=2)
    with pytest.raises(ValueError, match="seq_len 1"):
        Packer(stores, batch_size=4, seq_len=1)
    with pytest.raises(ValueError, match="coherence_rows is 5 of 4"):
        Packer(stores, batch_size=4, seq_len=64, coherence_rows=5)
    with pytest.raises(ValueError, match="no source has documents"):
        Packer([], batch_size=4, seq_len=64)


@pytest.fixture
def sources(tmp_path: Path) -> list[Source]:
    for name in ("a", "b"):
        rows = [json.dumps({"text": f"the fox {name} ran over hill {number}"}) for number in range(60)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    return [Source("a", "a.jsonl", 1, "both", holdout=0.2), Source("b", "b.jsonl", 1, "diversity", holdout=0)]


def test_the_cache_is_used_and_follows_the_data(
    tmp_path: Path, sources: list[Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    train, heldout = encode_corpus(sources, tmp_path, TOKENIZER, cache)
    assert len(train[0]) + len(heldout[0]) == 60
    assert len(heldout[1]) == heldout[1].tokens == 0
    monkeypatch.setattr("duet_moe.finetune.token_store.load_corpus", lambda *_: pytest.fail("the cache was not used"))
    again, _ = encode_corpus(sources, tmp_path, TOKENIZER, cache)
    assert all(np.array_equal(x.ids, y.ids) for x, y in zip(train, again, strict=True))
    monkeypatch.undo()
    with (tmp_path / "b.jsonl").open("a") as stream:
        stream.write('\n{"text": "one more fox"}')
    assert len(encode_corpus(sources, tmp_path, TOKENIZER, cache)[0][1]) == 61
    assert len([path for path in cache.iterdir() if not path.name.startswith(".")]) == 2
    assert not list(cache.glob(".unfinished-*"))


def test_a_recipe_feeds_a_packer_end_to_end(tmp_path: Path, sources: list[Source]) -> None:
    recipe = {"sources": [vars(source) for source in sources]}
    packer = Packer.from_recipe(recipe, tmp_path, TOKENIZER, tmp_path / "cache", batch_size=4, seq_len=48)
    batch = next(packer)
    texts = [TOKENIZER.decode(row[row != 0]) for row in batch["input_ids"]]
    assert all(text.startswith("<|text|>the fox") for text in texts)
