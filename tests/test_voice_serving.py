"""Voices while writing: equal to PEFT and to themselves alone, in any batch; factual mode and base never change."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapters import KINDS, NAMES, make_voice, peft
from tiny import CLOSE, pad_rows, tiny_model, tokens

from duet_moe import DuetMoeForCausalLM

NEAR = dict(rtol=0.0, atol=1e-5)


@pytest.fixture(scope="session")
def voices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a voice of every kind."""
    root = tmp_path_factory.mktemp("voices")
    for seed, (name, settings) in enumerate(KINDS.items()):
        make_voice(root / name, seed, **settings)
    return root


@pytest.fixture
def speaking(voices: Path) -> DuetMoeForCausalLM:
    """The tiny model with all voices loaded."""
    model = tiny_model()
    for name in NAMES:
        assert model.load_voice(voices / name) == name
    return model


def answer(model: DuetMoeForCausalLM, ids: torch.Tensor, *voice: int, **kwargs: object) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **({"head_mix": 1.0} | kwargs), voice=torch.tensor(voice) if voice else None).logits


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_a_voice_equals_peft_on_the_same_adapter(speaking: DuetMoeForCausalLM, voices: Path, name: str) -> None:
    ids, plan, index = tokens(2, 12), torch.randn(2, 8), NAMES.index(name)
    theirs = peft.PeftModel.from_pretrained(tiny_model(), voices / name).eval()
    for settings in ({}, {"plan": plan, "plan_guidance": 0.7}, {"head_mix": 0.4}):
        expected = theirs(ids, **({"head_mix": 1.0} | settings)).logits
        torch.testing.assert_close(answer(speaking, ids, index, index, **settings), expected, **NEAR)
        torch.testing.assert_close(answer(speaking, ids, -1, index, **settings)[1], expected[1], **NEAR)
    assert (answer(speaking, ids, index, index) - answer(speaking, ids)).abs().max() > 0.1


def test_every_row_of_a_mixed_batch_is_as_alone_and_the_base_is_bit_identical(speaking: DuetMoeForCausalLM) -> None:
    ids, order = tokens(7, 12), (2, -1, 0, 3, 1, -1, 2)
    mixed, base = answer(speaking, ids, *order), answer(tiny_model(), ids)
    for row, index in enumerate(order):
        if index == -1:
            assert torch.equal(mixed[row], base[row])
        else:
            alone = answer(speaking, ids[row : row + 1], index)[0]
            torch.testing.assert_close(mixed[row], alone, **NEAR)
            assert (alone - base[row]).abs().max() > 0.1
    assert torch.equal(answer(speaking, ids, *[-1] * 7), base)
    assert torch.equal(answer(speaking, ids), base)


def test_no_voice_reaches_the_coherence_head(speaking: DuetMoeForCausalLM) -> None:
    ids, base = tokens(4, 12), tiny_model()
    assert torch.equal(answer(speaking, ids, 0, 1, 2, 3, head_mix=0.0), answer(base, ids, head_mix=0.0))
    mix = torch.tensor([0.0, 1.0, 0.0, 0.5])
    mixed, plain = answer(speaking, ids, 0, 1, 2, 3, head_mix=mix), answer(base, ids, head_mix=mix)
    assert [torch.equal(mixed[row], plain[row]) for row in range(4)] == [True, False, True, False]
    with torch.no_grad():
        outputs = speaking(ids, head_mix=0.0, output_head_logits=True, voice=torch.tensor([0, 1, 2, 3]))
    assert torch.equal(outputs.logits, answer(base, ids, head_mix=0.0))
    assert torch.equal(outputs.diversity_logits, answer(speaking, ids, 0, 1, 2, 3))


def test_voices_are_no_weights_and_are_not_saved(speaking: DuetMoeForCausalLM, tmp_path: Path) -> None:
    assert speaking.state_dict().keys() == tiny_model().state_dict().keys()
    speaking.save_pretrained(tmp_path)
    assert (tmp_path / "voices.py").is_file()  # the mathematics travels; no voice does
    assert DuetMoeForCausalLM.from_pretrained(tmp_path).voice_names == ()


def test_voices_follow_the_dtype_of_the_model_and_keep_their_own_digits(
    speaking: DuetMoeForCausalLM, voices: Path
) -> None:
    ids, order = tokens(3, 6), (0, 1, -1)
    answer(speaking, ids, *order)
    low = answer(speaking.to(torch.bfloat16), ids, *order)
    assert low.dtype == torch.bfloat16
    rounded = tiny_model().to(torch.bfloat16).float()
    for name in NAMES:
        rounded.load_voice(voices / name)
    assert torch.equal(answer(speaking.float(), ids, *order), answer(rounded, ids, *order))


def test_loading_under_a_known_name_swaps_the_voice(speaking: DuetMoeForCausalLM, voices: Path) -> None:
    ids, dora = tokens(1, 6), NAMES.index("dora")
    expected = answer(speaking, ids, dora)
    assert not torch.equal(answer(speaking, ids, 0), expected)
    assert speaking.load_voice(voices / "dora", name="plain") == "plain"
    assert speaking.voice_names == NAMES
    torch.testing.assert_close(answer(speaking, ids, 0), expected, rtol=0.0, atol=0.0)


def test_an_unloaded_voice_is_gone_and_the_others_stay(speaking: DuetMoeForCausalLM) -> None:
    ids = tokens(1, 6)
    expected = answer(speaking, ids, 3)
    speaking.unload_voice("rslora")
    assert speaking.voice_names == ("plain", "dora", "narrow")
    torch.testing.assert_close(answer(speaking, ids, 2), expected, **NEAR)
    with pytest.raises(ValueError, match="No voice 'rslora' is loaded: loaded are 'plain', 'dora', 'narrow'"):
        speaking.unload_voice("rslora")
    with pytest.raises(ValueError, match="none is loaded.*load_voice"):
        tiny_model().generate(ids, voice="rslora")


@pytest.mark.parametrize("voice", [[4], [-2], [0, 1], [0.0], [True]])
def test_what_is_no_voice_of_the_batch_is_refused(speaking: DuetMoeForCausalLM, voice: list) -> None:
    with pytest.raises(ValueError, match="voice"):
        answer(speaking, tokens(1, 6), *voice)


@torch.no_grad()
def test_a_compiled_forward_needs_one_graph_for_all_voices(speaking: DuetMoeForCausalLM) -> None:
    torch.compiler.reset()
    graphs, ids = [], tokens(3, 6)

    def count(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(graph)
        return graph.forward

    speaking(ids, head_mix=1.0, voice=torch.tensor([0, 1, 2]))
    compiled = torch.compile(speaking, backend=count, fullgraph=True)
    for order in ((0, -1, 2), (3, 1, -1), (2, 2, 2)):
        found = compiled(ids, head_mix=1.0, voice=torch.tensor(order)).logits
        torch.testing.assert_close(found, answer(speaking, ids, *order), **CLOSE)
    assert len(graphs) == 1


def test_rows_generate_in_their_own_voices_and_modes(speaking: DuetMoeForCausalLM) -> None:
    rows = [tokens(1, length, seed=length)[0] for length in (5, 12, 7, 9)]
    ids, mask = pad_rows(rows, "left")
    order, modes, seeds = ["dora", None, "plain", "plain"], ["creative", "creative", "factual", "hybrid"], [4, 9, 2, 7]
    settings = dict(max_new_tokens=12, attention_mask=mask)
    together = speaking.generate(ids, voice=order, mode=modes, seed=seeds, **settings)
    plain = tiny_model().generate(ids, mode=modes, seed=seeds, **settings)
    for number, row in enumerate(rows):
        alone = speaking.generate(
            row[None], voice=order[number], mode=modes[number], seed=seeds[number], max_new_tokens=12
        )
        assert torch.equal(together[number, ids.shape[1] :], alone[0, len(row) :])
    assert [torch.equal(*pair) for pair in zip(together, plain, strict=True)] == [False, True, True, False]


def test_beams_and_expansions_keep_the_voice_of_their_row(speaking: DuetMoeForCausalLM) -> None:
    ids = tokens(2, 5)
    settings = dict(head_mix=1.0, max_new_tokens=8)
    together = speaking.generate(ids, voice=["dora", "plain"], num_beams=3, num_return_sequences=2, **settings)
    for row, name in enumerate(("dora", "plain")):
        alone = speaking.generate(ids[row : row + 1], voice=name, num_beams=3, num_return_sequences=2, **settings)
        assert torch.equal(together[2 * row : 2 * row + 2], alone)


def test_drafting_writes_what_greedy_decoding_writes_in_a_voice(speaking: DuetMoeForCausalLM) -> None:
    ids, settings = torch.tensor([[7, 8, 9, 10, 11, 12] * 3]), dict(voice="dora", head_mix=1.0, max_new_tokens=12)
    expected = speaking.generate(ids, **settings)
    assert torch.equal(speaking.generate(ids, prompt_lookup_num_tokens=4, **settings), expected)
    assert torch.equal(speaking.generate(ids, assistant_model=copy.deepcopy(speaking), **settings), expected)


def test_generate_names_what_it_does_not_know(speaking: DuetMoeForCausalLM) -> None:
    with pytest.raises(ValueError, match="No voice 'acme' is loaded: loaded are 'plain'"):
        speaking.generate(tokens(2, 5), voice=["plain", "acme"])
    with pytest.raises(ValueError, match="voice has 1 entries for 2 rows"):
        speaking.generate(tokens(2, 5), voice=["plain"])
