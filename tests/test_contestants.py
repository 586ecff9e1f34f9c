"""Contestants: what a name means, that a text depends on its seed alone, and what an endpoint says of its errors."""

import copy
import math
import re
import time
from pathlib import Path

import pytest
import torch
from adapters import ALL, peft
from fake_endpoint import fake_endpoint
from sources import SHAPE
from tiny import SENTENCES, tiny_tokenizer, tiny_writer_of
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from duet_moe import Writer
from duet_moe.evaluation.causal import Causal
from duet_moe.evaluation.contestants import Duet, Local, Scoring, Timed, contestant
from duet_moe.evaluation.endpoint import Endpoint
from duet_moe.evaluation.timing import CLEAR, Timing, peak_memory_bytes, reset_peak_memory
from duet_moe.modeling.info import parameter_counts

PROMPTS = (SENTENCES[0], "Hi", SENTENCES[1])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Duet-MoE model with a tokenizer."""
    folder = tmp_path_factory.mktemp("duet") / "model"
    writer = tiny_writer_of(tiny_tokenizer())
    writer.model.save_pretrained(folder)
    writer.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A voice store with `acme`, for the model of `saved`."""
    folder = tmp_path_factory.mktemp("store")
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, lora_alpha=40, target_modules=ALL, init_lora_weights=False)
    model = copy.deepcopy(tiny_writer_of(tiny_tokenizer()).model)
    peft.get_peft_model(model, settings).save_pretrained(folder / "acme")
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of another family, whose tokenizer has no chat template."""
    folder = tmp_path_factory.mktemp("hf") / "llama"
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(folder)
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_name_says_model_mode_and_voice(saved: str, store: Path) -> None:
    assert contestant("duet-mini") == Duet("duet-mini", "duet-mini")
    assert contestant(f"{saved}:creative") == Duet(f"{saved}:creative", saved, "creative")
    spoken = contestant(f"{saved}:voice-acme", store)
    assert (spoken.source, spoken.mode, spoken.voice) == (saved, "creative", "acme")
    assert contestant("hf:some/model") == Causal("hf:some/model", "some/model")
    assert contestant("hf:folder:greedy") == Causal("hf:folder:greedy", "folder", greedy=True)
    asked = contestant("openai:http://localhost:80/v1#maker/model:latest")
    assert (asked.url, asked.model) == ("http://localhost:80/v1", "maker/model:latest")


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("openai:http://localhost:80/v1", "openai:http://HOST:PORT/v1#MODEL"),
        ("openai:localhost#model", "no endpoint"),
        ("hf:", "names no model"),
        ("hf::greedy", "names no model"),
        ("", "names no contestant"),
        (":creative", "names no contestant"),
        ("no-such-model:creative", "no-such-model"),
        ("duet-mini:voice-nobody", "no voice 'nobody'"),
        ("duet-mini:voice-../x", "no name for a voice"),
    ],
)
def test_a_bad_name_says_what_is_wrong(spec: str, told: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(told)):
        contestant(spec, tmp_path)


def test_ours_writes_what_the_writer_writes(saved: str) -> None:
    texts = contestant(f"{saved}:creative").write(PROMPTS, [5, 1, 5], 12)
    writer = Writer.load(saved)
    alone = [
        writer.write(p, "creative", 12, seed, evidence=False).text for p, seed in zip(PROMPTS, [5, 1, 5], strict=True)
    ]
    assert texts == alone
    assert contestant(f"{saved}:factual").write(PROMPTS, [5, 1, 5], 12) != texts


def test_a_voice_speaks_for_its_own_contestant_only(saved: str, store: Path) -> None:
    spoken = contestant(f"{saved}:voice-acme", store).write(PROMPTS[:1], [3], 10)
    base = contestant(f"{saved}:creative").write(PROMPTS[:1], [3], 10)  # shares the loaded model
    writer = Writer.load(saved, store=store)
    assert spoken == [writer.write(PROMPTS[0], "creative", 10, 3, voice="acme").text]
    assert base == [writer.write(PROMPTS[0], "creative", 10, 3, voice="base").text] != spoken


def test_a_mode_that_does_not_exist_is_named(saved: str) -> None:
    with pytest.raises(ValueError, match="poetic"):
        contestant(f"{saved}:poetic").write(PROMPTS, [1, 2, 3], 4)


def test_others_write_by_prompt_and_seed_alone(llama: str) -> None:
    sampled = contestant(f"hf:{llama}")
    before = torch.get_rng_state()
    texts = sampled.write(PROMPTS, [7, 8, 9], 12)
    assert torch.equal(torch.get_rng_state(), before)
    assert sampled.write(PROMPTS[2:], [9], 12) == texts[2:]
    assert sampled.write(PROMPTS[2:], [10], 12) != texts[2:]
    greedy = contestant(f"hf:{llama}:greedy")
    assert greedy.write(PROMPTS, [1, 2, 3], 12) == greedy.write(PROMPTS, [4, 5, 6], 12)


def test_a_likelihood_is_the_sum_over_the_answers_tokens(llama: str) -> None:
    tokenizer, model = tiny_tokenizer(), LlamaForCausalLM.from_pretrained(llama).eval()
    asked, said = tokenizer(PROMPTS[0])["input_ids"], tokenizer(" the fox")["input_ids"]
    expected = 0.0
    with torch.no_grad():
        for i, token in enumerate(said):
            logits = model(torch.tensor([[*asked, *said[:i]]])).logits[0, -1]
            expected += math.log(float(logits.softmax(-1)[token]))
    assert contestant(f"hf:{llama}").log_likelihood(PROMPTS[0], "the fox") == pytest.approx(expected, abs=1e-4)


def test_a_likelihood_of_ours_is_that_of_its_mode_and_voice(saved: str, store: Path) -> None:
    scores = {
        spec: contestant(f"{saved}:{spec}", store).log_likelihood("Hi", "the fox")
        for spec in ("factual", "creative", "hybrid", "voice-acme")
    }
    assert len(set(scores.values())) == 4
    writer = Writer.load(saved)
    text = writer.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    start = writer.tokenizer(text, add_special_tokens=False)["input_ids"]
    said = writer.tokenizer("the fox")["input_ids"]
    with torch.no_grad():
        mix = writer.modes["creative"].head_mix
        logits = writer.model(torch.tensor([[*start, *said]]), head_mix=mix).logits[0, len(start) - 1 : -1]
    expected = logits.log_softmax(-1)[range(len(said)), said].sum()
    assert scores["creative"] == pytest.approx(float(expected), abs=1e-4)


def test_ours_is_timed_over_a_full_answer(saved: str) -> None:
    timing = contestant(f"{saved}:creative").time("Hi", 1, 9)
    assert timing.tokens == 9
    assert timing.seconds_to_first_token > 0 and timing.tokens_per_second > 0
    assert timing.peak_memory_bytes > 2**20


def test_others_are_timed_over_a_full_answer(llama: str) -> None:
    started = time.perf_counter()
    timing = contestant(f"hf:{llama}:greedy").time("Hi", 1, 9)
    seconds = time.perf_counter() - started
    assert timing.tokens == 9
    assert 0 < timing.seconds_to_first_token < seconds
    assert 8 / timing.tokens_per_second < seconds


def test_timing_counts_what_came_after_the_first_token() -> None:
    timing = Timing.from_stamps(10.0, [12.0, 13.0, 16.0], tokens=9)
    assert (timing.seconds_to_first_token, timing.tokens_per_second) == (2.0, 2.0)
    assert Timing.from_stamps(10.0, [12.0], tokens=1).tokens_per_second == 0.0
    with pytest.raises(ValueError, match="nothing to time"):
        Timing.from_stamps(10.0, [], tokens=0)


@pytest.mark.skipif(not CLEAR.exists() or torch.cuda.is_available(), reason="peaks are reset on Linux, without a GPU")
def test_the_peak_is_what_was_held_since_the_reset() -> None:
    size = 2**26
    reset_peak_memory()
    held = b"x" * size
    high = peak_memory_bytes()
    assert len(held) == size
    del held
    reset_peak_memory()
    assert peak_memory_bytes() < high - size // 2


def test_active_parameters_count_the_heads_and_experts_in_use(saved: str, store: Path) -> None:
    counts = parameter_counts(Writer.load(saved).model)
    active = {
        spec: contestant(f"{saved}:{spec}", store).weights()["active_parameters"]
        for spec in ("factual", "creative", "hybrid", "voice-acme")
    }
    # creative mode's rule R1 asks the coherence head as well; with a voice it is off
    assert active == {
        "factual": counts["active"],
        "creative": counts["active_both_heads"],
        "hybrid": counts["active_both_heads"],
        "voice-acme": counts["active"],
    }
    total = sum(p.numel() for p in Writer.load(saved).model.parameters())
    assert contestant(f"{saved}:factual").weights()["weight_bytes"] == 4 * total


def test_active_parameters_of_others_leave_out_idle_experts_and_the_embedding_table(tmp_path: Path) -> None:
    model = MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=6, num_experts_per_tok=2))
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    expert = 3 * SHAPE["hidden_size"] * SHAPE["intermediate_size"]
    idle = 4 * expert * SHAPE["num_hidden_layers"]
    expected = model.num_parameters() - idle - SHAPE["vocab_size"] * SHAPE["hidden_size"]
    weights = contestant(f"hf:{tmp_path}").weights()
    assert weights["active_parameters"] == expected
    assert weights["weight_bytes"] >= 4 * model.num_parameters()


def test_a_fingerprint_changes_with_the_files(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"abc")
    before = contestant(f"hf:{tmp_path}").fingerprint()
    assert contestant(f"hf:{tmp_path}").fingerprint() == before
    (tmp_path / "weights").write_bytes(b"abcd")
    assert contestant(f"hf:{tmp_path}").fingerprint() != before


def test_only_local_models_score_answers_and_have_files() -> None:
    local, remote = contestant("duet-mini"), contestant("openai:http://localhost:80/v1#m")
    assert isinstance(local, Scoring) and isinstance(local, Timed) and isinstance(local, Local)
    assert not isinstance(remote, Scoring) and isinstance(remote, Timed) and not isinstance(remote, Local)


def asked(url: str, **settings: object) -> Endpoint:
    return Endpoint("remote", url, "some-model", **({"retries": 0, "timeout": 5.0} | settings))


def test_an_endpoint_gets_prompt_seed_length_and_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with fake_endpoint() as server:
        texts = contestant(f"openai:{server.url}#some-model").write(PROMPTS, [4, 5, 6], 20)
    assert texts == [f"{prompt} #{seed}" for prompt, seed in zip(PROMPTS, [4, 5, 6], strict=True)]
    assert {(r["path"], r["model"], r["max_tokens"]) for r in server.asked} == {
        ("/v1/chat/completions", "some-model", 20)
    }
    assert set(server.keys) == {"Bearer secret"}


def test_a_refusal_is_an_empty_answer() -> None:
    with fake_endpoint(text=None) as server:
        assert asked(server.url).write(["Hi"], [1], 5) == [""]


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (401, "answered 401: .*planned 401.* Set OPENAI_API_KEY"),
        (404, "answered 404: .*usually ends in /v1"),
        (429, "answered 429: .*goes on where it stopped"),
        (500, "answered 500: .*goes on where it stopped"),
    ],
)
def test_an_endpoints_error_says_what_to_do(status: int, told: str) -> None:
    with fake_endpoint(status) as server, pytest.raises(RuntimeError, match=told) as caught:
        asked(server.url).write(["Hi"], [1], 5)
    assert server.url in str(caught.value) and "some-model" in str(caught.value)


def test_a_passing_error_is_tried_again() -> None:
    with fake_endpoint(500) as server:
        assert asked(server.url, retries=1).write(["Hi"], [1], 5) == ["Hi #1"]
    assert len(server.asked) == 2


def test_an_endpoint_that_does_not_answer_in_time_is_named() -> None:
    with fake_endpoint(1.0) as server, pytest.raises(RuntimeError, match=r"no answer within 0\.2 seconds"):
        asked(server.url, timeout=0.2).write(["Hi"], [1], 5)


def test_an_endpoint_that_is_not_there_is_named() -> None:
    with fake_endpoint() as server:
        pass
    with pytest.raises(RuntimeError, match=f"{server.url} cannot be reached.*Is it running"):
        asked(server.url).write(["Hi"], [1], 5)


def test_an_endpoint_is_timed_by_its_stream() -> None:
    with fake_endpoint(0.1, text="one two three four") as server:
        timing = asked(server.url).time("Hi", 1, 20)
    assert timing.tokens == 12  # the endpoint's own count
    assert 0.1 <= timing.seconds_to_first_token < 2.0
    assert 11 / timing.tokens_per_second == pytest.approx(0.06, abs=0.05)
    assert timing.peak_memory_bytes is None
    with fake_endpoint(401) as server, pytest.raises(RuntimeError, match="OPENAI_API_KEY"):
        asked(server.url).time("Hi", 1, 20)
