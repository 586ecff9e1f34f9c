"""TRL's own trainers train the head that `config.head_mix` names, with our forward's loss, or say why they cannot."""

from pathlib import Path

import pytest
import torch
from tiny import SENTENCES, tiny_model, tokens
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from duet_moe import DuetMoeForCausalLM

pytest.importorskip("trl", reason="TRL is not installed: pip install 'duet-moe[finetune]'")
from datasets import Dataset  # noqa: E402
from peft import AutoPeftModelForCausalLM, LoraConfig  # noqa: E402
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer  # noqa: E402
from trl.trainer.utils import add_fused_lm_head  # noqa: E402

ADAPTER = r"diversity_head\.(gate_proj|up_proj|down_proj)"
QUIET = dict(report_to=[], save_strategy="no", use_cpu=True, bf16=False, disable_tqdm=True, logging_steps=1)
EXAMPLES = [{"prompt": text[:20], "completion": text[20:]} for text in SENTENCES * 2]
PAIRS = [{"prompt": text[:20], "chosen": text[20:], "rejected": " Nothing."} for text in SENTENCES]


def lora(target: str = ADAPTER, **settings: object) -> LoraConfig:
    return LoraConfig(r=4, target_modules=target, task_type="CAUSAL_LM", **settings)


@pytest.fixture
def policy(tokenizer: PreTrainedTokenizerFast) -> DuetMoeForCausalLM:
    model = tiny_model(vocab_size=len(tokenizer))
    model.config.head_mix = 1.0
    return model


def sft(
    model: DuetMoeForCausalLM | str, tokenizer: PreTrainedTokenizerFast, folder: Path, peft: LoraConfig | None = None,
    rows: list[dict] = EXAMPLES, **changes: object,
) -> SFTTrainer:  # fmt: skip
    settings = dict(max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, gradient_checkpointing=False)
    arguments = SFTConfig(output_dir=str(folder), **(QUIET | settings | changes))
    return SFTTrainer(model, arguments, None, Dataset.from_list(rows), processing_class=tokenizer, peft_config=peft)


def losses(trainer: Trainer) -> list[float]:
    trainer.train()
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("mix", [0.0, 1.0])
def test_what_trl_computes_is_the_loss_of_our_forward_with_the_same_gradients(mix: float) -> None:
    ours, theirs, ids = tiny_model(head_mix=mix), tiny_model(head_mix=mix), tokens(2, 12)
    labels = ids.masked_fill(torch.arange(12) < 4, -100)
    add_fused_lm_head(theirs)
    expected = ours(ids, labels=labels, output_router_logits=True)
    found = theirs(ids, labels=labels, output_router_logits=True, fused_lm_head=True)
    torch.testing.assert_close(found.loss, expected.loss, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.aux_loss, expected.aux_loss)
    expected.loss.backward()
    found.loss.backward()
    trained = {name for name, weight in ours.named_parameters() if weight.grad is not None}
    assert trained == {name for name, weight in theirs.named_parameters() if weight.grad is not None}
    assert {name.split(".")[0] for name in trained} == {"model", "diversity_head" if mix else "coherence_head"}
    for (name, weight), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if name in trained:
            torch.testing.assert_close(other.grad, weight.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("coefficient", [0.0, None])
def test_sft_trains_the_whole_model_as_its_forward_sees_it(
    policy: DuetMoeForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, coefficient: float | None
) -> None:
    trainer = sft(policy, tokenizer, tmp_path, router_aux_loss_coef=coefficient)
    batch = next(iter(trainer.get_train_dataloader()))
    own = policy(**batch).loss.item()  # the trainer has asked the configuration for the router's loss, or not
    assert policy.config.output_router_logits is (coefficient is None)
    assert trainer.compute_loss(policy, dict(batch)).item() == pytest.approx(own, abs=1e-5)
    found = losses(trainer)
    assert found[0] == pytest.approx(own, abs=1e-3)
    assert found[-1] < found[0] - 0.5


def test_lora_on_the_diversity_head_changes_no_bit_of_factual_mode(
    policy: DuetMoeForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    policy.save_pretrained(tmp_path / "base")
    ids = tokens(2, 12)
    with torch.no_grad():
        factual, creative = (policy(ids, head_mix=mix).logits for mix in (0.0, 1.0))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    trainer = sft(model, tokenizer, tmp_path, lora(), max_steps=6, router_aux_loss_coef=0.0)
    found = losses(trainer)
    assert found[-1] < found[0]
    trainer.save_model(str(tmp_path / "voice"))
    voice = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "voice")
    with torch.no_grad():
        assert torch.equal(voice(ids, head_mix=0.0).logits, factual)
        assert (voice(ids, head_mix=1.0).logits - creative).abs().max() > 1e-2
        assert torch.equal(voice(ids, head_mix=1.0).logits, trainer.model.eval()(ids, head_mix=1.0).logits)
    assert voice.generate(input_ids=ids, mode="creative", seed=1, max_new_tokens=4).shape == (2, 16)


def test_a_fully_trained_model_is_saved_loaded_and_speaks(
    policy: DuetMoeForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    trainer = sft(policy, tokenizer, tmp_path / "run", gradient_checkpointing=True)
    losses(trainer)
    trainer.save_model(str(tmp_path / "model"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = tokens(2, 12)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, policy.eval()(ids, head_mix=1.0).logits)
    assert again.generate(ids, mode="factual", max_new_tokens=4).shape == (2, 16)


def test_a_path_as_in_trls_readme_trains_the_head_that_the_arguments_name(
    policy: DuetMoeForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    policy.config.head_mix = 0.0
    policy.save_pretrained(tmp_path / "base")
    before = {name: weight.clone() for name, weight in policy.named_parameters()}
    trainer = sft(
        str(tmp_path / "base"), tokenizer, tmp_path / "run", model_init_kwargs={"head_mix": 1.0}, max_steps=1
    )
    losses(trainer)
    moved = {name.split(".")[0] for name, weight in trainer.model.named_parameters() if (weight != before[name]).any()}
    assert moved == {"model", "diversity_head"}


def test_a_whole_output_matrix_can_be_trained_beside_lora(
    policy: DuetMoeForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    trainer = sft(policy, tokenizer, tmp_path, lora(modules_to_save=["diversity_head.unembed"]))
    losses(trainer)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        own = trainer.model(**batch, head_mix=1.0).loss.item()
    assert trainer.compute_loss(trainer.model, dict(batch)).item() == pytest.approx(own, abs=1e-5)


@pytest.mark.parametrize(
    ("mix", "peft", "message"),
    [
        (0.0, lora(), "Nothing that config.head_mix=0.0 uses can be trained"),
        (0.3, None, "config.head_mix=0.3 joins both heads"),
        (1.0, lora(r"diversity_head\.unembed"), "adapter to `lm_head` is not supported"),
        (0.0, lora(r"diversity_head\.unembed"), "Nothing that config.head_mix=0.0 uses can be trained"),
    ],
)
def test_what_would_train_nothing_or_something_else_is_refused(
    policy: DuetMoeForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, mix: float,
    peft: LoraConfig | None, message: str,
) -> None:  # fmt: skip
    policy.config.head_mix = mix
    with pytest.raises(ValueError, match=message):
        # checkpointing gives the states a gradient, so that nothing else would stop
        sft(policy, tokenizer, tmp_path, peft, gradient_checkpointing=True).train()


def test_settings_of_the_heads_are_refused_where_they_would_be_lost(policy: DuetMoeForCausalLM) -> None:
    with pytest.raises(TypeError, match=r"\['head_mix'\]: set config.head_mix"):
        policy.base_model(tokens(1, 4), head_mix=0.0)


@pytest.mark.parametrize("trl", [True, False])
def test_accumulated_batches_count_as_one_large_one(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, trl: bool
) -> None:
    curves = []
    for size, steps in ((8, 1), (2, 4)):
        model = tiny_model(vocab_size=len(tokenizer), head_mix=1.0)
        sizes = dict(per_device_train_batch_size=size, gradient_accumulation_steps=steps, max_steps=2)
        trainer = sft(model, tokenizer, tmp_path, router_aux_loss_coef=0.0, **sizes)
        if not trl:
            model.__dict__.pop("forward")  # TRL's
            arguments = TrainingArguments(str(tmp_path), learning_rate=1e-2, **QUIET, **sizes)
            trainer = Trainer(model, arguments, trainer.data_collator, trainer.train_dataset)
        curves.append(losses(trainer))
    assert curves[0] == pytest.approx(curves[1], abs=2e-3)


@pytest.mark.parametrize("peft", [lora(), None])
def test_dpo_starts_at_the_reference_and_its_loss_falls(
    policy: DuetMoeForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, peft: LoraConfig | None
) -> None:
    policy.config.head_mix = 0.0
    policy.save_pretrained(tmp_path / "base")
    arguments = DPOConfig(
        output_dir=str(tmp_path / "run"), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2,
        gradient_checkpointing=False, router_aux_loss_coef=0.0, model_init_kwargs={"head_mix": 1.0}, **QUIET,
    )  # fmt: skip
    trainer = DPOTrainer(
        str(tmp_path / "base"), args=arguments, train_dataset=Dataset.from_list(PAIRS), processing_class=tokenizer,
        peft_config=peft,
    )  # fmt: skip
    found = losses(trainer)
    assert found[0] == pytest.approx(0.693, abs=1e-3)  # ln 2: policy and reference agree
    assert found[-1] < 0.68
    if peft is not None:
        with torch.no_grad():
            factual = (model(tokens(2, 12), head_mix=0.0).logits for model in (policy, trainer.model.eval()))
            assert torch.equal(*factual)
