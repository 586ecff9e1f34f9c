"""The whole model: parity with Mixtral, what forward takes and returns, losses, and the ways to run it."""

import doctest
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import CLOSE, SHAPE, tiny_config, tiny_model, tokens
from transformers import AutoModel, AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from duet_moe import DuetMoeForCausalLM, DuetMoeModel
from duet_moe.modeling import modeling_duet_moe
from duet_moe.modeling.cache import DuetMoeCache

FULL = {"layer_types": ["full_attention"] * 2}


def mixtral_twin(model: DuetMoeForCausalLM) -> MixtralForCausalLM:
    """Return a Mixtral with this model's weights, whose adapters must be off."""
    config = model.config
    shape = {name: getattr(config, name) for name in SHAPE if name != "plan_size"}
    shape["sliding_window"] = config.sliding_window if "sliding_attention" in config.layer_types else None
    twin = MixtralForCausalLM(
        MixtralConfig(**shape, rope_parameters=config.rope_parameters, pad_token_id=0, eos_token_id=None)
    ).eval()
    weights = {f"model.{name}": weight for name, weight in model.model.state_dict().items()}
    weights["model.norm.weight"] = model.coherence_head.norm.weight
    weights["lm_head.weight"] = model.coherence_head.unembed.weight
    twin.load_state_dict(weights, strict=True)
    twin.generation_config.eos_token_id = None
    return twin


@pytest.fixture(params=["sliding", "full"])
def twins(request: pytest.FixtureRequest) -> tuple[DuetMoeForCausalLM, MixtralForCausalLM]:
    model = tiny_model(**(FULL if request.param == "full" else {}))
    torch.nn.init.zeros_(model.coherence_head.down_proj.weight)
    return model, mixtral_twin(model)


@torch.no_grad()
def test_copied_weights_give_the_logits_of_mixtral(twins: tuple) -> None:
    model, mixtral = twins
    for ids in (tokens(3, 41), tokens(1, 8), tokens(1, 9), tokens(2, 1)):
        torch.testing.assert_close(model(ids).logits, mixtral(ids).logits, rtol=0, atol=1e-5)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :7] = 0
    ids = tokens(2, 20)
    ours, theirs = model(ids, attention_mask=mask).logits, mixtral(ids, attention_mask=mask).logits
    torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], rtol=0, atol=1e-5)


def test_copied_weights_generate_what_mixtral_generates(twins: tuple) -> None:
    model, mixtral = twins
    settings = dict(max_new_tokens=30, do_sample=False)
    for beams in (1, 3):
        ids = tokens(2, 5)
        expected = mixtral.generate(ids, num_beams=beams, **settings)
        assert torch.equal(model.generate(ids, num_beams=beams, **settings), expected)


def test_copied_weights_have_the_gradients_of_mixtral(twins: tuple) -> None:
    model, mixtral = twins
    ids = tokens(2, 20)
    for one in twins:
        one.train()(ids, labels=ids, use_cache=False).loss.backward()
    theirs = dict(mixtral.model.named_parameters())
    for name, parameter in model.model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-5)


def test_heads_with_equal_output_matrices_start_equal() -> None:
    model, ids = DuetMoeForCausalLM(tiny_config()), tokens(2, 9)
    model.diversity_head.unembed.load_state_dict(model.coherence_head.unembed.state_dict())
    with torch.no_grad():
        coherence, diversity = (model(ids, head_mix=mix).logits for mix in (0.0, 1.0))
        planned = model(ids, head_mix=1.0, plan=torch.ones(2, 8)).logits
    assert torch.equal(coherence, diversity)
    assert torch.equal(planned, diversity)
    for head in (model.coherence_head, model.diversity_head):
        assert not head.down_proj.weight.any()
        assert head.gate_proj.weight.any()


def test_an_argument_that_the_model_does_not_have_is_refused(model: DuetMoeForCausalLM) -> None:
    with pytest.raises(TypeError, match=r"\['head_mixx', 'temperature'\]"):
        model(tokens(1, 3), head_mixx=0.5, temperature=1.0)


def test_input_is_either_ids_or_embeddings(model: DuetMoeForCausalLM) -> None:
    ids = tokens(2, 9)
    embeds = model.model.embed_tokens(ids)
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)
    for wrong in ({}, {"input_ids": ids, "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="exactly one"):
            model(**wrong)


@pytest.mark.parametrize("mix", [0.0, 0.5, 1.0])
def test_the_loss_is_the_cross_entropy_of_the_next_token(model: DuetMoeForCausalLM, mix: float) -> None:
    ids = tokens(2, 9)
    labels = ids.masked_fill(torch.arange(9) < 3, -100)
    outputs = model(ids, labels=labels, head_mix=mix)
    scores, targets = outputs.logits[:, 2:-1].flatten(0, 1), ids[:, 3:].flatten()
    torch.testing.assert_close(outputs.loss, F.cross_entropy(scores, targets))
    summed = model(ids, labels=labels, head_mix=mix, num_items_in_batch=torch.tensor(50)).loss
    torch.testing.assert_close(summed, F.cross_entropy(scores, targets, reduction="sum") / 50)


@torch.no_grad()
def test_the_output_has_what_was_asked_for_and_nothing_else(model: DuetMoeForCausalLM) -> None:
    ids = tokens(2, 9)
    plain = model(ids)
    assert plain.keys() == {"logits", "cache"}
    assert isinstance(plain.cache, DuetMoeCache)
    assert model(ids, use_cache=False).keys() == {"logits"}
    rich = model(
        ids,
        labels=ids,
        output_head_logits=True,
        output_hidden_states=True,
        output_router_logits=True,
        use_cache=False,
    )
    assert rich.keys() == {
        "loss", "aux_loss", "logits", "coherence_logits", "diversity_logits", "diversity_share", "hidden_states",
        "router_logits",
    }  # fmt: skip
    assert [states.shape for states in rich.hidden_states] == [(2, 9, 32)] * 3
    assert torch.equal(rich.hidden_states[-1], model.model(ids).last_hidden_state)
    assert [logits.shape for logits in rich.router_logits] == [(18, 4)] * 2
    assert isinstance(model(ids, return_dict=False), tuple)


@torch.no_grad()
def test_only_the_logits_that_are_kept_are_computed(model: DuetMoeForCausalLM) -> None:
    ids = tokens(2, 9)
    full = model(ids, head_mix=0.5).logits
    torch.testing.assert_close(model(ids, head_mix=0.5, logits_to_keep=1).logits, full[:, -1:], **CLOSE)
    kept = torch.tensor([0, 4])
    torch.testing.assert_close(model(ids, head_mix=0.5, logits_to_keep=kept).logits, full[:, kept], **CLOSE)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_gradient_checkpointing_changes_no_gradient() -> None:
    gradients, ids = [], tokens(2, 12)
    for checkpointing in (False, True):
        model = tiny_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, labels=ids, head_mix=0.5, num_experts_per_tok=torch.tensor([1, 3])).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any("layers.0" in name for name in gradients[0])
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("size", "head_mix"), [(120, 0.0), (60, 0.0), (60, 1.0)])
def test_resizing_the_vocabulary_resizes_both_heads(size: int, head_mix: float, tmp_path: Path) -> None:
    model = tiny_model(head_mix=head_mix)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.diversity_head.unembed.requires_grad_(False)
    model.resize_token_embeddings(size)
    assert model.config.vocab_size == size
    kept = min(size, 97)
    for name in ("model.embed_tokens.weight", "coherence_head.unembed.weight", "diversity_head.unembed.weight"):
        after = model.state_dict()[name]
        assert after.shape == (size, 32)
        assert torch.equal(after[:kept], before[name][:kept])
    assert not model.diversity_head.unembed.weight.requires_grad
    assert model.coherence_head.unembed.weight.requires_grad
    ids = tokens(1, 5) % kept
    for mix in (0.0, 0.5, 1.0):
        assert model(ids, head_mix=mix, labels=ids).logits.shape == (1, 5, size)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(DuetMoeForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


def test_a_vocabulary_can_be_padded_to_a_multiple(model: DuetMoeForCausalLM) -> None:
    model.resize_token_embeddings(97, pad_to_multiple_of=64)
    assert model.coherence_head.unembed.weight.shape == model.diversity_head.unembed.weight.shape == (128, 32)


@torch.no_grad()
@pytest.mark.parametrize("head_mix", [0.0, 1.0])
def test_base_model_and_output_embeddings_give_the_configured_head(head_mix: float) -> None:
    model, ids = tiny_model(head_mix=head_mix), tokens(2, 9)
    states = model.base_model(ids).last_hidden_state
    assert torch.equal(model.get_output_embeddings()(states), model(ids).logits)
    assert model.base_model.layers is model.model.layers
    assert model.get_decoder() is model.model


@torch.no_grad()
def test_the_model_runs_in_bf16(model: DuetMoeForCausalLM) -> None:
    ids = tokens(2, 9)
    expected = model(ids, head_mix=0.5).logits.log_softmax(-1)
    outputs = model.to(torch.bfloat16)(ids, head_mix=0.5, num_experts_per_tok=torch.tensor([2, 3]))
    assert outputs.logits.dtype == torch.bfloat16
    found = model(ids, head_mix=0.5).logits.float().log_softmax(-1)
    assert (found - expected).abs().mean() < 0.1 * expected.std()


def test_a_saved_model_loads_with_an_automatic_device_map(model: DuetMoeForCausalLM, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model.save_pretrained(tmp_path)
    loaded = DuetMoeForCausalLM.from_pretrained(tmp_path, device_map="auto")
    ids = tokens(1, 9).to(loaded.device)
    with torch.no_grad():
        for mix in (0.0, 0.5):
            expected = model(ids.cpu(), head_mix=mix).logits
            torch.testing.assert_close(loaded(ids, head_mix=mix).logits.cpu(), expected, **CLOSE)


def test_parts_of_a_model_may_stay_on_disk(model: DuetMoeForCausalLM, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model.save_pretrained(tmp_path)
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu"}
    places |= {"model.layers.1": "disk", "coherence_head": "cpu", "diversity_head": "disk"}
    loaded = DuetMoeForCausalLM.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "off")
    assert loaded.diversity_head.unembed.weight.is_meta
    ids = tokens(1, 9)
    with torch.no_grad():
        for mix in (0.0, 0.5):
            assert torch.equal(loaded(ids, head_mix=mix).logits, model(ids, head_mix=mix).logits)
    assert torch.equal(
        loaded.generate(ids, mode="hybrid", seed=1, max_new_tokens=12),
        model.generate(ids, mode="hybrid", seed=1, max_new_tokens=12),
    )


@pytest.mark.slow
@torch.no_grad()
def test_the_compiled_forward_equals_the_eager_one_without_a_break(model: DuetMoeForCausalLM) -> None:
    torch._dynamo.reset()
    model.set_experts_implementation("grouped_mm")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids, mix = tokens(2, 12), torch.tensor([0.0, 0.4])
    expected = model(ids, head_mix=mix, use_cache=False).logits
    torch.testing.assert_close(compiled(ids, head_mix=mix, use_cache=False).logits, expected, **CLOSE)


def test_the_auto_classes_know_the_model() -> None:
    config = tiny_config()
    assert type(AutoModelForCausalLM.from_config(config)) is DuetMoeForCausalLM
    assert type(AutoModel.from_config(config)) is DuetMoeModel


def test_the_example_in_the_documentation_runs() -> None:
    results = doctest.testmod(modeling_duet_moe)
    assert results.attempted > 0
    assert results.failed == 0


def test_labels_that_are_already_moved_give_the_same_loss(model: DuetMoeForCausalLM) -> None:
    ids = tokens(2, 12)
    moved = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    wanted = model(ids, labels=ids, head_mix=0.5).loss
    assert torch.equal(model(ids, shift_labels=moved, head_mix=0.5).loss, wanted)
    assert not torch.equal(model(ids, shift_labels=ids, head_mix=0.5).loss, wanted)
