"""Generating in modes: every decoding strategy, batches that mix modes, seeds, and who wins over whom."""

import copy

import pytest
import torch
from tiny import WINDOW, pad_rows, tiny_model, tokens
from transformers.generation.streamers import BaseStreamer

from duet_moe import DuetMoeForCausalLM, Mode, NotInThisVersionError
from duet_moe.configuration.modes import BUILT_IN_MODES, modes_as_dict
from duet_moe.modeling.cache import DuetMoeCache
from duet_moe.modeling.generation_duet_moe import RowSampler

NEW = 2 * WINDOW  # long enough to pass the window's edge
REPETITIVE = torch.tensor([[7, 8, 9, 10, 11, 12] * 4])


def write(model: DuetMoeForCausalLM, ids: torch.Tensor | None, **kwargs: object) -> torch.Tensor:
    return model.generate(ids, **({"max_new_tokens": NEW} | kwargs))


@torch.no_grad()
def greedy_by_hand(model: DuetMoeForCausalLM, ids: torch.Tensor, **kwargs: object) -> torch.Tensor:
    for _ in range(NEW):
        best = model(ids, use_cache=False, **kwargs).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, best], 1)
    return ids


def test_factual_is_greedy_on_the_coherence_head(model: DuetMoeForCausalLM) -> None:
    ids = tokens(2, 5)
    expected = greedy_by_hand(model, ids, head_mix=0.0)
    for kwargs in ({"mode": "factual"}, {"mode": BUILT_IN_MODES["factual"]}, {"mode": ["factual"] * 2}, {}):
        assert torch.equal(write(model, ids, **kwargs), expected)
    assert not torch.equal(expected, greedy_by_hand(model, ids, head_mix=1.0))


def test_a_mode_of_ones_own_applies_all_its_settings(model: DuetMoeForCausalLM) -> None:
    ids = tokens(2, 5)
    mine = Mode("mine", head_mix=0.7, plausible_min=0.2, num_experts_per_tok=3)
    expected = greedy_by_hand(model, ids, head_mix=0.7, plausible_min=0.2, num_experts_per_tok=3)
    assert torch.equal(write(model, ids, mode=mine), expected)
    assert torch.equal(write(model, ids, mode=[mine, mine]), expected)
    model.generation_config.modes = modes_as_dict({"mine": mine})
    assert torch.equal(write(model, ids, mode="mine"), expected)


@pytest.mark.parametrize("mix", [0.0, 0.4, 1.0])
def test_drafting_strategies_write_what_greedy_decoding_writes(model: DuetMoeForCausalLM, mix: float) -> None:
    expected = greedy_by_hand(model, REPETITIVE, head_mix=mix)
    assert torch.equal(write(model, REPETITIVE, head_mix=mix), expected)
    assert torch.equal(write(model, REPETITIVE, head_mix=mix, prompt_lookup_num_tokens=4), expected)
    for assistant in (copy.deepcopy(model), tiny_model(seed=5, num_hidden_layers=1)):
        assert torch.equal(write(model, REPETITIVE, head_mix=mix, assistant_model=assistant), expected)


@pytest.mark.parametrize("layer_types", [None, ["full_attention", "sliding_attention"]], ids=["sliding", "mixed"])
def test_beams_with_a_cache_write_what_beams_without_one_write(layer_types: list[str] | None) -> None:
    model, ids = tiny_model(layer_types=layer_types), tokens(2, 5)
    settings = dict(num_beams=3, head_mix=torch.tensor([0.0, 0.6]), plan=torch.randn(2, 8))
    cached, uncached = (write(model, ids, use_cache=use_cache, **settings) for use_cache in (True, False))
    assert torch.equal(cached, uncached)
    assert torch.equal(cached[:1], write(model, ids[:1], num_beams=3))


def test_a_static_cache_writes_the_same(model: DuetMoeForCausalLM) -> None:
    ids, mask = pad_rows([tokens(1, 12)[0], tokens(1, 5, seed=2)[0]], "left")
    for settings in ({}, {"mode": ["factual", "creative"], "seed": 1}):
        expected = write(model, ids, attention_mask=mask, **settings)
        assert torch.equal(write(model, ids, attention_mask=mask, cache_implementation="static", **settings), expected)


def test_the_prompt_of_a_long_text_is_chunked_inside_the_model_only(model: DuetMoeForCausalLM) -> None:
    ids = tokens(2, 30)
    expected = write(model, ids)
    model.config.prompt_chunk_size = 7
    lengths: list[int] = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    assert torch.equal(write(model, ids), expected)
    assert lengths == [30] + [1] * (NEW - 1)
    assert torch.equal(write(model, ids, use_cache=False), expected)


def test_generating_keeps_the_cache_at_the_window(model: DuetMoeForCausalLM) -> None:
    outputs = write(model, tokens(2, 5), return_dict_in_generate=True)
    cache = outputs.cache
    assert isinstance(cache, DuetMoeCache)
    assert {layer.keys.shape[2] for layer in cache.layers} == {WINDOW}


class Collected(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("kwargs", [{"mode": "factual"}, {"mode": "creative", "seed": 3}, {"mode": ["hybrid"]}])
def test_a_streamer_gets_every_token(model: DuetMoeForCausalLM, kwargs: dict) -> None:
    streamer = Collected()
    written = write(model, tokens(1, 5), streamer=streamer, **kwargs)
    assert streamer.tokens == written[0].tolist()
    assert streamer.ended


def test_rows_of_a_batch_that_mixes_modes_equal_the_rows_alone(model: DuetMoeForCausalLM) -> None:
    lengths = (5, 12, 7, 20)
    rows = [tokens(1, length, seed=length)[0] for length in lengths]
    ids, mask = pad_rows(rows, "left")
    plan = torch.randn(4, 8)
    wide = Mode("wide", head_mix=1.0, do_sample=True, top_k=5, repetition_penalty=1.3, plan_guidance=0.5)
    modes, seeds = ["factual", "creative", "hybrid", wide], [4, 9, 2, 7]
    settings = dict(num_experts_per_tok=torch.tensor([2, 1, 4, 3]), plan=plan)
    together = write(model, ids, attention_mask=mask, mode=modes, seed=seeds, **settings)
    for number, row in enumerate(rows):
        own = {name: value[number : number + 1] for name, value in settings.items()}
        alone = write(model, row[None], mode=modes[number], seed=seeds[number], **own)
        assert torch.equal(together[number, ids.shape[1] :], alone[0, len(row) :])


def test_a_seed_repeats_and_another_does_not(model: DuetMoeForCausalLM) -> None:
    ids = tokens(1, 5).repeat(3, 1)
    first, again, other = (write(model, ids, mode="creative", seed=seed) for seed in (1, 1, 50))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])
    one_by_one = [write(model, ids[:1], mode="creative", seed=1 + row) for row in range(3)]
    assert torch.equal(first, torch.cat(one_by_one))


def test_without_a_seed_torchs_generator_decides(model: DuetMoeForCausalLM) -> None:
    ids, texts = tokens(2, 5), []
    for mode in ("creative", "creative", ["creative", "hybrid"], ["creative", "hybrid"]):
        torch.manual_seed(5)
        texts.append(write(model, ids, mode=mode))
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[2], texts[3])
    assert not torch.equal(texts[0], write(model, ids, mode="creative"))


def test_a_seed_alone_samples_as_configured() -> None:
    model, ids = tiny_model(head_mix=1.0), tokens(2, 5)
    assert torch.equal(write(model, ids, seed=1), greedy_by_hand(model, ids, head_mix=1.0))
    sampled = write(model, ids, seed=1, do_sample=True, temperature=1.5)
    assert torch.equal(sampled, write(model, ids, seed=1, do_sample=True, temperature=1.5))
    assert not torch.equal(sampled, write(model, ids, seed=1))


def test_row_sampling_follows_the_probabilities_of_the_mode() -> None:
    scores = torch.tensor([2.0, 1.0, 0.5, 0.0, -9.0])
    mode = Mode("warm", do_sample=True, temperature=2.0, min_p=0.4)
    rows = 4000
    sampler = RowSampler([mode] * rows, list(range(rows)))
    drawn = sampler(torch.zeros(rows, 1, dtype=torch.long), scores.repeat(rows, 1)).argmax(-1)
    kept = (scores / 2).softmax(-1)
    expected = kept.where(kept >= 0.4 * kept.max(), 0)
    found = torch.bincount(drawn, minlength=5) / rows
    torch.testing.assert_close(found, expected / expected.sum(), rtol=0, atol=0.03)
    assert found[-2:].tolist() == [0, 0]


def test_what_is_given_beside_a_mode_wins(model: DuetMoeForCausalLM) -> None:
    ids = tokens(2, 5)
    diverse = greedy_by_hand(model, ids, head_mix=1.0)
    creative = BUILT_IN_MODES["creative"]
    plausible = greedy_by_hand(model, ids, head_mix=creative.head_mix, plausible_min=creative.plausible_min)
    assert torch.equal(write(model, ids, mode="factual", head_mix=1.0), diverse)
    assert torch.equal(write(model, ids, mode="creative", do_sample=False), plausible)
    assert torch.equal(write(model, ids, mode=["creative"] * 2, do_sample=False), plausible)
    assert torch.equal(
        write(model, ids, mode=["creative", "hybrid"], head_mix=1.0, do_sample=False, plausible_min=0.0), diverse
    )
    cold = write(model, ids, mode="creative", temperature=1e-4, seed=3)
    assert torch.equal(cold, plausible)
    assert write(model, ids, mode="factual", max_new_tokens=3).shape == (2, 8)


def test_a_call_in_a_mode_leaves_the_models_settings_alone(model: DuetMoeForCausalLM) -> None:
    ids, before = tokens(1, 5), model.generation_config.to_dict()
    write(model, ids, mode="creative", temperature=0.3)
    write(model, ids, mode=["creative"], seed=1)
    assert model.generation_config.to_dict() == before


def test_every_row_may_have_its_own_mix_and_experts(model: DuetMoeForCausalLM) -> None:
    ids, mixes, experts = tokens(3, 5), [0.0, 0.5, 1.0], [1, 2, 4]
    together = write(model, ids, head_mix=torch.tensor(mixes), num_experts_per_tok=experts)
    for row in range(3):
        alone = write(model, ids[row : row + 1], head_mix=mixes[row], num_experts_per_tok=experts[row])
        assert torch.equal(together[row : row + 1], alone)


def test_several_continuations_share_the_settings_of_their_prompt(model: DuetMoeForCausalLM) -> None:
    settings = dict(head_mix=[0.0, 1.0], plan=torch.randn(2, 8), num_experts_per_tok=[2, 3])
    written = write(model, tokens(2, 5), num_return_sequences=2, num_beams=2, do_sample=False, **settings)
    assert written.shape == (4, 5 + NEW)
    own = dict(head_mix=1.0, plan=settings["plan"][1:], num_experts_per_tok=3)
    alone = write(model, tokens(2, 5)[1:], num_return_sequences=2, num_beams=2, **own)
    assert torch.equal(written[2:], alone)


@pytest.mark.parametrize("kwargs", [{}, {"mode": "creative", "seed": 1}])
def test_embeddings_may_stand_for_the_prompt(model: DuetMoeForCausalLM, kwargs: dict) -> None:
    ids = tokens(2, 5)
    written = write(model, None, inputs_embeds=model.model.embed_tokens(ids), **kwargs)
    assert torch.equal(written, write(model, ids, **kwargs)[:, 5:])


def test_every_step_is_reported_with_both_heads(model: DuetMoeForCausalLM) -> None:
    seen: list = []
    written = write(model, tokens(2, 5), mode="factual", on_step=seen.append, output_head_logits=True)
    assert len(seen) == NEW
    for step, outputs in enumerate(seen):
        assert outputs.diversity_logits.shape[::2] == (2, 97)
        assert torch.equal(outputs.coherence_logits[:, -1].argmax(-1), written[:, 5 + step])


def test_factual_mode_never_runs_the_diversity_head(model: DuetMoeForCausalLM) -> None:
    def fail(*args: object) -> None:
        raise AssertionError("the diversity head was computed")

    expected = write(model, tokens(2, 5), mode="factual")
    model.diversity_head.register_forward_pre_hook(fail)
    assert torch.equal(write(model, tokens(2, 5), mode="factual"), expected)
    with pytest.raises(AssertionError, match="was computed"):
        write(model, tokens(2, 5), mode="hybrid")


@pytest.mark.parametrize(
    "kwargs, error, told",
    [
        ({"mode": "poetic"}, ValueError, "'poetic'.*creative"),
        ({"mode": ["factual", "poetic"]}, ValueError, "'poetic'.*creative"),
        ({"mode": "auto"}, ValueError, "no task router: choose a mode yourself"),
        ({"guardrails": "policy.yaml"}, NotInThisVersionError, "guardrails"),
        ({"mode": ["factual"]}, ValueError, "1 entries for 2 rows"),
        ({"mode": "creative", "seed": [1, 2, 3]}, ValueError, "3 entries for 2 rows"),
        ({"mode": ["factual", "creative"], "num_beams": 2}, ValueError, "num_beams must be 1"),
        ({"seed": 1, "num_return_sequences": 2}, ValueError, "num_return_sequences must be 1"),
        ({"head_mix": 2.0}, ValueError, "head_mix must be between 0 and 1"),
        ({"num_experts_per_tok": 9}, ValueError, "num_experts_per_tok=9"),
        ({"mode": "creative", "head_mixx": 1.0}, ValueError, "head_mixx"),
        ({"mode": ["creative"] * 2, "temperature": -1.0}, ValueError, "temperature=-1.0"),
    ],
)
def test_what_cannot_be_done_is_refused_with_what_can(
    model: DuetMoeForCausalLM, kwargs: dict, error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        write(model, tokens(2, 5), **kwargs)


def test_modes_by_row_need_a_batch_to_count(model: DuetMoeForCausalLM) -> None:
    with pytest.raises(ValueError, match="needs input_ids or inputs_embeds"):
        model.generate(mode=["factual"], max_new_tokens=2)
