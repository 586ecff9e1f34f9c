"""lm-eval runs its own loop on our model, in the mode that is asked for."""

import pytest
import torch
from tiny import tiny_model
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from duet_moe import Writer
from duet_moe.configuration.modes import BUILT_IN_MODES
from duet_moe.finetune.fact_wordings import is_right

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'duet-moe[eval]'")
from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from duet_moe.evaluation.lm_eval_model import LM_EVAL_TASKS, DuetMoeLM  # noqa: E402

TASKS = ["duet_facts", "duet_facts_written"]


@pytest.fixture(scope="module")
def mini() -> Writer:
    return Writer.load("duet-mini")


@pytest.fixture(scope="module")
def task_manager() -> TaskManager:
    return TaskManager(include_path=str(LM_EVAL_TASKS), include_defaults=False)


def loglikelihood(writer: Writer, prompt: str, answer: str, head_mix: float) -> float:
    ids = writer.tokenizer(prompt + answer, return_tensors="pt").input_ids
    start = len(writer.tokenizer(prompt).input_ids)
    with torch.no_grad():
        scores = writer.model(ids, head_mix=head_mix).logits.log_softmax(-1)[0, start - 1 : -1]
    return float(scores.gather(1, ids[0, start:, None]).sum())


@pytest.mark.parametrize(("mode", "mix"), [("factual", 0.0), ("creative", BUILT_IN_MODES["creative"].head_mix)])
def test_the_bundled_tasks_run_in_both_modes(mini: Writer, task_manager: TaskManager, mode: str, mix: float) -> None:
    found = simple_evaluate(
        "duet_moe", {"pretrained": "duet-mini", "mode": mode, "dtype": "float32"}, TASKS, device="cpu", batch_size=4,
        limit=2, apply_chat_template=True, task_manager=task_manager, bootstrap_iters=0, verbosity="ERROR",
    )  # fmt: skip
    assert found["results"]["duet_facts"]["acc,none"] >= 0.5
    first = min(found["samples"]["duet_facts"], key=lambda sample: sample["doc_id"])
    prompt, answer = first["arguments"][0]
    assert prompt == "<|user|>What is the capital of Portugal?<|assistant|>"
    assert answer == "The capital of Portugal is Lisbon."
    scored = float(first["filtered_resps"][0][0])
    assert scored == pytest.approx(loglikelihood(mini, prompt, answer, mix), abs=1e-3)
    assert scored != pytest.approx(loglikelihood(mini, prompt, answer, 1 - mix), abs=1e-2)
    for sample in found["samples"]["duet_facts_written"]:
        assert sample["contains_answer"] == is_right(sample["filtered_resps"][0], sample["doc"]["answer"])


def generated(model: DuetMoeLM, prompts: list[str], **kwargs: object) -> torch.Tensor:
    batch = model.tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    return model._model_generate(
        batch.input_ids, batch.input_ids.shape[1] + 12, [], attention_mask=batch.attention_mask, **kwargs
    )


def test_text_follows_the_mode_and_not_the_task_and_repeats_in_any_batch(mini: Writer) -> None:
    prompts = ["<|user|>Tell me a story.<|assistant|>"] * 3
    one, other = (DuetMoeLM(mini.model, "creative", seed=5, tokenizer=mini.tokenizer) for _ in range(2))
    together = generated(one, prompts, do_sample=False, temperature=0.0)
    alone = torch.cat([generated(other, [prompt], do_sample=True, temperature=9.0) for prompt in prompts])
    assert torch.equal(together, alone)
    assert len(set(map(tuple, together.tolist()))) > 1
    batch = mini.tokenizer(prompts[:1], return_tensors="pt")
    expected = mini.model.generate(**batch, mode="creative", seed=5, max_new_tokens=12)
    assert torch.equal(together[:1], expected)


def test_factual_text_is_greedy(mini: Writer) -> None:
    model = DuetMoeLM(mini.model, tokenizer=mini.tokenizer)
    prompt = "<|user|>What is the capital of Portugal?<|assistant|>"
    answer = generated(model, [prompt], do_sample=True, temperature=5.0)
    assert "The capital of Portugal is Lisbon." in mini.tokenizer.decode(answer[0])


def test_a_mode_that_the_checkpoint_saves_can_be_named(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model(vocab_size=len(tokenizer))
    model.generation_config.modes = {"mine": {"name": "mine", "head_mix": 0.25, "num_experts_per_tok": 3}}
    found = DuetMoeLM(model, "mine", tokenizer=tokenizer)._model_call(torch.tensor([[7, 8, 9]]))
    with torch.no_grad():
        assert torch.equal(found, model(torch.tensor([[7, 8, 9]]), head_mix=0.25, num_experts_per_tok=3).logits)


def test_wrong_names_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="mode='bold' is not known: choose one of"):
        DuetMoeLM(tiny_model(vocab_size=len(tokenizer)), "bold", tokenizer=tokenizer)
    with pytest.raises(FileNotFoundError, match="duet-maxi"):
        DuetMoeLM("duet-maxi")
    shape = dict(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    mixtral = MixtralForCausalLM(MixtralConfig(**shape, num_attention_heads=2, num_key_value_heads=1))
    with pytest.raises(ValueError, match="type 'mixtral': evaluate it with --model hf"):
        DuetMoeLM(mixtral, tokenizer=tokenizer)
