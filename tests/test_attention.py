"""Who sees whom: windows, padding, packed documents, and the same answer from every attention implementation."""

import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import CLOSE, WINDOW, pad_rows, tiny_model, tokens

from duet_moe import DuetMoeForCausalLM
from duet_moe.modeling.attention import packed_document_ids, visible_keys

MIXED = ["full_attention", "sliding_attention"]
FULL = ["full_attention", "full_attention"]
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="flex_attention on a CPU needs a C++ compiler"
)


@st.composite
def scenes(draw: st.DrawFn) -> dict:
    """Draw queries, keys, a window, a padding mask and packed documents over a few positions."""
    count, rows = draw(st.integers(1, 10)), draw(st.integers(1, 2))
    positions = st.lists(st.integers(0, count - 1), min_size=1, max_size=8, unique=True)
    covered = draw(st.integers(1, count))  # the padding mask may end before the last key
    masks = st.lists(st.lists(st.booleans(), min_size=covered, max_size=covered), min_size=rows, max_size=rows)
    documents = st.lists(st.lists(st.integers(0, 2), min_size=count, max_size=count), min_size=rows, max_size=rows)
    return {
        "queries": draw(positions),
        "keys": draw(positions),
        "window": draw(st.none() | st.integers(1, 5)),
        "padding": draw(st.none() | masks),
        "documents": draw(st.none() | documents),
        "rows": rows,
    }


def may_see(scene: dict, row: int, query: int, key: int) -> bool:
    if query == key:
        return True
    if key > query or (scene["window"] is not None and query - key >= scene["window"]):
        return False
    padding, documents = scene["padding"], scene["documents"]
    if padding is not None and not (key < len(padding[row]) and padding[row][key]):
        return False
    return documents is None or documents[row][query] == documents[row][key]


@given(scenes())
def test_visible_keys_equal_a_loop_over_every_pair(scene: dict) -> None:
    padding, documents = scene["padding"], scene["documents"]
    seen = visible_keys(
        torch.tensor(scene["queries"]),
        torch.tensor(scene["keys"]),
        scene["window"],
        None if padding is None else torch.tensor(padding),
        None if documents is None else torch.tensor(documents),
    )
    seen = seen.expand(scene["rows"], -1, -1, -1)
    expected = [
        [[may_see(scene, row, query, key) for key in scene["keys"]] for query in scene["queries"]]
        for row in range(scene["rows"])
    ]
    assert seen[:, 0].tolist() == expected


def test_documents_start_where_positions_do_not_count_on() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [4, 5, 6, 7, 8, 9]])
    ids = packed_document_ids(positions)
    assert ids is not None
    assert [len(set(row)) for row in ids.tolist()] == [3, 1]
    assert ids[0, :3].unique().numel() == 1
    assert packed_document_ids(positions[1:]) is None


def changes_of_last_logits(model: DuetMoeForCausalLM, length: int) -> list[float]:
    """Return how much each token's replacement changes the logits of the last position."""
    ids = tokens(1, length)
    replaced = ids.repeat(length, 1)
    replaced[range(length), range(length)] = (ids[0] - 6 + 40) % 91 + 6
    with torch.no_grad():
        before, after = model(ids).logits[:, -1], model(replaced).logits[:, -1]
    return (after - before).abs().amax(-1).tolist()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("length", [WINDOW, WINDOW + 1, 3 * WINDOW])
def test_a_sliding_layer_sees_exactly_its_window(implementation: str, length: int) -> None:
    model = tiny_model(num_hidden_layers=1, attn_implementation=implementation)
    changes = changes_of_last_logits(model, length)
    assert all(change < 1e-5 for change in changes[:-WINDOW])
    assert all(change > 1e-3 for change in changes[-WINDOW:])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_full_layer_sees_everything_before_it(implementation: str) -> None:
    model = tiny_model(num_hidden_layers=1, layer_types=["full_attention"], attn_implementation=implementation)
    assert all(change > 1e-3 for change in changes_of_last_logits(model, 3 * WINDOW))


@pytest.mark.parametrize(
    "implementation, layer_types",
    [
        ("eager", None),
        ("eager", MIXED),
        ("sdpa", None),
        ("sdpa", MIXED),
        pytest.param("flex_attention", MIXED, marks=[pytest.mark.slow, needs_compiler]),
    ],
)
def test_attention_implementations_agree_with_masks_written_by_hand(
    implementation: str, layer_types: list[str] | None
) -> None:
    model = tiny_model(layer_types=layer_types)
    ids, mask = pad_rows(list(tokens(1, 21)) + list(tokens(1, 13)), "left")
    with torch.no_grad():
        expected = by_hand(model, ids, mask)
        model.set_attn_implementation(implementation)
        for row, real in enumerate(mask.bool()):
            found = model(ids, attention_mask=mask).logits
            torch.testing.assert_close(found[row, real], expected[row, real], **CLOSE)


def by_hand(model: DuetMoeForCausalLM, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Run layer by layer with additive masks that a loop fills."""
    model.set_attn_implementation("eager")
    states = model.model.embed_tokens(ids)
    positions = torch.arange(ids.shape[1])[None]
    for layer, layer_type in zip(model.model.layers, model.config.layer_types, strict=True):
        reach = WINDOW if layer_type == "sliding_attention" else ids.shape[1]
        allowed = torch.full((*ids.shape, ids.shape[1]), -1e9)
        for row, query, key in torch.ones_like(allowed).nonzero().tolist():
            if key == query or (0 < query - key < reach and mask[row, key]):
                allowed[row, query, key] = 0.0
        states = layer(states, model.model.rotary_emb(states, positions), allowed[:, None])
    return model.coherence_head(states)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("layer_types", [None, MIXED], ids=["sliding", "mixed"])
def test_padding_does_not_change_the_logits(implementation: str, side: str, layer_types: list[str] | None) -> None:
    model = tiny_model(layer_types=layer_types, attn_implementation=implementation)
    rows = [tokens(1, length, seed=length)[0] for length in (5, WINDOW, WINDOW + 1, 23)]
    ids, mask = pad_rows(rows, side)
    counted = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        for positions in (None, counted):
            together = model(ids, attention_mask=mask, position_ids=positions).logits
            for number, row in enumerate(rows):
                alone = model(row[None]).logits[0]
                torch.testing.assert_close(together[number, mask[number].bool()], alone, **CLOSE)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_packed_documents_do_not_see_each_other(implementation: str) -> None:
    model = tiny_model(layer_types=MIXED, attn_implementation=implementation)
    documents = [tokens(1, length, seed=length)[0] for length in (4, 13, 3, 10)]
    ids = torch.cat(documents)[None]
    positions = torch.cat([torch.arange(len(document)) for document in documents])[None]
    with torch.no_grad():
        packed = model(ids, position_ids=positions, use_cache=False).logits[0]
        alone = [model(document[None]).logits[0] for document in documents]
    torch.testing.assert_close(packed, torch.cat(alone), **CLOSE)


def test_packed_documents_stay_apart_when_they_pass_in_chunks() -> None:
    model = tiny_model(layer_types=MIXED)
    first, second = tokens(1, 20, seed=3), tokens(1, 15, seed=4)
    positions = torch.cat([torch.arange(20), torch.arange(15)])[None]
    with torch.no_grad():
        alone = model(second).logits
        model.config.prompt_chunk_size = 6
        packed = model(torch.cat([first, second], 1), position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(packed[:, 20:], alone, **CLOSE)


def test_a_ready_mask_is_taken_as_it_is(model: DuetMoeForCausalLM) -> None:
    ids = tokens(1, 6)
    nobody_else = torch.eye(6, dtype=torch.bool)[None, None]
    with torch.no_grad():
        found = model(ids, attention_mask=nobody_else).logits
        alone = torch.cat([model(ids[:, i : i + 1], position_ids=torch.tensor([[i]])).logits for i in range(6)], 1)
    torch.testing.assert_close(found, alone, **CLOSE)


def test_attention_weights_are_shares_of_the_window() -> None:
    model, ids = tiny_model(attn_implementation="eager"), tokens(1, 12)
    with torch.no_grad():
        weights = model(ids, output_attentions=True).attentions
    assert [layer.shape for layer in weights] == [(1, 4, 12, 12)] * 2
    distance = torch.arange(12)[:, None] - torch.arange(12)
    outside = (distance < 0) | (distance >= WINDOW)
    for layer in weights:
        assert layer[..., outside].abs().max() == 0
        torch.testing.assert_close(layer.sum(-1), torch.ones(1, 4, 12))


@pytest.mark.parametrize("name", ["q_proj", "k_proj"])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_qk_norm_takes_away_the_scale_of_queries_and_keys(name: str, qk_norm: bool) -> None:
    model, ids = tiny_model(qk_norm=qk_norm), tokens(1, 12)
    with torch.no_grad():
        before = model(ids).logits
        for layer in model.model.layers:
            getattr(layer.self_attn, name).weight.mul_(3.0)
        change = (model(ids).logits - before).abs().max()
    assert bool(change < 1e-3) is qk_norm


def test_qk_norm_of_all_heads_keeps_the_heads_scales_apart() -> None:
    ids = tokens(1, 12)
    for qk_norm, keeps in ((True, False), ("all_heads", True)):
        model = tiny_model(qk_norm=qk_norm)
        with torch.no_grad():
            before = model(ids).logits
            for layer in model.model.layers:
                layer.self_attn.q_proj.weight[:8].mul_(3.0)  # the first of four heads
            change = (model(ids).logits - before).abs().max()
        assert bool(change > 1e-2) is keeps
