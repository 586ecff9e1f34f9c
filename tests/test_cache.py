"""The ring: cached decoding equals the full forward, and memory stays at the window."""

from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CLOSE, WINDOW, pad_rows, tiny_config, tiny_model, tokens

from duet_moe import DuetMoeForCausalLM
from duet_moe.modeling import attention
from duet_moe.modeling.cache import DuetMoeCache, RingLayer

LENGTH = 26
SPLITS = st.lists(st.sampled_from([1, 1, 1, 2, 3, 5, 7, 8, 9, 17]), min_size=LENGTH, max_size=LENGTH)


@lru_cache
def shared_model(window: int = WINDOW, mixed: bool = False) -> DuetMoeForCausalLM:
    layer_types = ["sliding_attention", "full_attention"] if mixed else None
    return tiny_model(sliding_window=window, layer_types=layer_types)


def pieces(sizes: list[int], length: int) -> list[slice]:
    """Cut `length` into consecutive spans of these sizes."""
    spans, start = [], 0
    for size in sizes:
        if start < length:
            spans.append(slice(start, min(start + size, length)))
            start += size
    return spans


def storage_bytes(layer: RingLayer) -> int:
    return layer.keys.untyped_storage().nbytes() + layer.values.untyped_storage().nbytes()


@given(SPLITS, st.sampled_from([1, 3, WINDOW]), st.booleans(), st.booleans())
@settings(max_examples=40)
@torch.no_grad()
def test_any_split_of_a_text_equals_the_full_forward(sizes: list[int], window: int, mixed: bool, padded: bool) -> None:
    model = shared_model(window, mixed)
    ids, mask = pad_rows([tokens(1, LENGTH)[0], tokens(1, LENGTH - 6 * padded, seed=2)[0]], "left")
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    cache = DuetMoeCache(model.config)
    found = [
        model(ids[:, span], attention_mask=mask[:, : span.stop], cache=cache).logits for span in pieces(sizes, LENGTH)
    ]
    assert cache.get_seq_length() == LENGTH
    torch.testing.assert_close(torch.cat(found, 1)[mask.bool()], expected[mask.bool()], **CLOSE)


@pytest.mark.parametrize("prompt", [WINDOW - 1, WINDOW, WINDOW + 1])
@torch.no_grad()
def test_decoding_is_right_on_both_sides_of_the_window_edge(prompt: int) -> None:
    model, ids = shared_model(), tokens(2, 3 * WINDOW)
    expected = model(ids, use_cache=False).logits
    outputs = model(ids[:, :prompt])
    cache = outputs.cache
    assert isinstance(cache, DuetMoeCache)
    for position in range(prompt, 3 * WINDOW):
        logits = model(ids[:, position : position + 1], cache=cache).logits[:, 0]
        torch.testing.assert_close(logits, expected[:, position], **CLOSE)


@given(SPLITS)
@settings(max_examples=30)
def test_a_ring_never_holds_more_than_its_window(sizes: list[int]) -> None:
    layer, seen = RingLayer(WINDOW), 0
    states = torch.randn(2, 2, LENGTH, 4)
    full = 2 * states[:, :, :WINDOW].numel() * states.element_size()
    for span in pieces(sizes, LENGTH):
        layer.update(states[:, :, span], states[:, :, span])
        seen = span.stop
        assert layer.keys.shape[2] <= WINDOW
        assert storage_bytes(layer) == full if seen >= WINDOW else storage_bytes(layer) <= full
        held = layer.keys[:, :, [position % WINDOW for position in range(max(0, seen - WINDOW), seen)]]
        assert torch.equal(held, states[:, :, max(0, seen - WINDOW) : seen])


@torch.no_grad()
def test_the_cache_of_a_long_text_is_as_large_as_that_of_a_window() -> None:
    model, sizes = shared_model(), []
    for length in (WINDOW, WINDOW + 1, 40, 200):
        cache = model(tokens(1, length)).cache
        model(tokens(1, 1), cache=cache)
        sizes.append([storage_bytes(layer) for layer in cache.layers])
    assert sizes[0] == sizes[1] == sizes[2] == sizes[3]
    config = model.config
    assert sizes[0][0] == 2 * WINDOW * config.num_key_value_heads * config.head_dim * 4


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_a_long_prompt_passes_in_chunks_without_a_large_mask_or_cache(
    implementation: str, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk, model = 5, tiny_model(attn_implementation=implementation)
    ids, mask = pad_rows([tokens(1, 90)[0], tokens(1, 90 - 20 * padded, seed=2)[0]], "left")
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    model.config.prompt_chunk_size = chunk
    sizes, held = [], []
    build, update = attention.visible_keys, RingLayer.update

    def spy_on_mask(*args: object) -> torch.Tensor:
        seen = build(*args)
        sizes.append(seen.shape[-2] * seen.shape[-1])
        return seen

    def spy_on_ring(layer: RingLayer, *args: object) -> tuple[torch.Tensor, torch.Tensor]:
        returned = update(layer, *args)
        held.append((storage_bytes(layer), returned[0].shape[2]))
        return returned

    monkeypatch.setattr(attention, "visible_keys", spy_on_mask)
    monkeypatch.setattr(RingLayer, "update", spy_on_ring)
    found = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], **CLOSE)
    assert len(sizes) > 10
    assert max(sizes) <= chunk * (WINDOW + chunk)
    assert max(keys for _, keys in held) < WINDOW + chunk
    ring_bytes = 2 * 2 * WINDOW * 2 * 8 * 4  # keys and values, rows, slots, heads, head_dim, bytes
    assert {size for size, _ in held[4:]} == {ring_bytes}


@torch.no_grad()
def test_a_long_continuation_passes_in_chunks_over_the_cache_it_is_given() -> None:
    model, ids = tiny_model(), tokens(2, 60)
    expected = model(ids, use_cache=False).logits
    model.config.prompt_chunk_size = 7
    cache = model(ids[:, :25]).cache
    found = model(ids[:, 25:], cache=cache).logits
    torch.testing.assert_close(found, expected[:, 25:], **CLOSE)
    assert cache.get_seq_length() == 60


@given(st.integers(1, 30), st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), min_size=1, max_size=4))
@settings(max_examples=30)
@torch.no_grad()
def test_tokens_that_are_taken_back_leave_no_trace(prompt: int, drafts: list[tuple[int, int]]) -> None:
    model, wrong = shared_model(), tokens(1, 6, seed=9)
    ids = tokens(1, prompt + 8 * len(drafts))
    expected = model(ids, use_cache=False).logits
    cache = DuetMoeCache(model.config)
    model(ids[:, :prompt], cache=cache)
    cache.activate_past_recording()
    at = prompt
    for count, taken_back in drafts:
        taken_back = min(taken_back, count)
        kept = count - taken_back
        drafted = torch.cat([ids[:, at : at + kept], wrong[:, :taken_back]], 1)
        found = model(drafted, cache=cache).logits[:, :kept]
        torch.testing.assert_close(found, expected[:, at : at + kept], **CLOSE)
        cache.crop(-taken_back)
        at += kept
        assert cache.get_seq_length() == at
        found = model(ids[:, at : at + 1], cache=cache).logits
        torch.testing.assert_close(found, expected[:, at : at + 1], **CLOSE)
        at += 1


@torch.no_grad()
def test_taking_back_without_recording_is_refused_once_the_window_is_overwritten() -> None:
    model = shared_model()
    cache = model(tokens(1, 2 * WINDOW)).cache
    with pytest.raises(ValueError, match=r"Cannot take back 3 tokens.*activate_past_recording"):
        cache.crop(-3)


@torch.no_grad()
def test_taking_back_needs_no_recording_while_everything_is_still_there() -> None:
    model, ids = shared_model(), tokens(1, WINDOW)
    expected = model(ids, use_cache=False).logits
    cache = model(ids).cache
    cache.crop(-3)
    found = model(ids[:, -3:], cache=cache).logits
    torch.testing.assert_close(found, expected[:, -3:], **CLOSE)


ROWS = [2, 0, 2]


@pytest.mark.parametrize(
    "change, rows",
    [
        (lambda cache: cache.reorder_cache(torch.tensor(ROWS)), ROWS),
        (lambda cache: cache.batch_select_indices(torch.tensor(ROWS)), ROWS),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ],
    ids=["reorder", "select", "repeat"],
)
@pytest.mark.parametrize("prompt", [5, 20])
@torch.no_grad()
def test_rows_can_be_reordered_selected_and_repeated(change: object, rows: list[int], prompt: int) -> None:
    model, ids = shared_model(mixed=True), tokens(3, prompt)
    cache = model(ids).cache
    change(cache)
    following = tokens(len(rows), 4, seed=7)
    expected = model(torch.cat([ids[rows], following], 1), use_cache=False).logits[:, -4:]
    torch.testing.assert_close(model(following, cache=cache).logits, expected, **CLOSE)


@pytest.mark.parametrize("rows", [2, 3])
@torch.no_grad()
def test_a_cache_that_was_reset_starts_anew(rows: int) -> None:
    model, ids = shared_model(), tokens(rows, 12)
    cache = model(tokens(2, 20, seed=5)).cache
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(model(ids, cache=cache).logits, model(ids).logits, **CLOSE)


def test_full_layers_get_a_growing_cache_and_sliding_layers_a_ring() -> None:
    cache = DuetMoeCache(tiny_config(layer_types=["full_attention", "sliding_attention"]))
    assert [type(layer).__name__ for layer in cache.layers] == ["DynamicLayer", "RingLayer"]
    assert cache.get_max_length(1) == WINDOW


def test_the_name_that_the_cache_had_before_still_works(model: DuetMoeForCausalLM) -> None:
    ids = tokens(1, 12)
    outputs = model(ids[:, :-1])
    assert outputs.past_key_values is outputs.cache
    found = model(ids[:, -1:], past_key_values=outputs.past_key_values).logits
    torch.testing.assert_close(found, model(ids).logits[:, -1:], **CLOSE)
    before = model.base_model(ids[:, :-1], use_cache=True).cache
    found = model.base_model(ids[:, -1:], past_key_values=before).last_hidden_state
    torch.testing.assert_close(found, model.base_model(ids).last_hidden_state[:, -1:], **CLOSE)
