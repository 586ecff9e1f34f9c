"""Push and pull over HTTP against a stand-in for the Hub, with what goes wrong on the way."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from fake_hub import FakeHub, Faults, serving
from online import Online, RemoteError

PUSH = """
from tiny import tiny_model, tiny_tokenizer, tokens
tokenizer = tiny_tokenizer()
def push(repo, seed=0, **kwargs):
    return tiny_model(seed, vocab_size=len(tokenizer)).push_to_hub(repo, **kwargs).oid
def logits(model, **kwargs):
    import torch
    with torch.no_grad():
        return model(tokens(1, 6), **kwargs).logits.sum().item()
def expected(seed=0, **kwargs):
    return logits(tiny_model(seed, vocab_size=len(tokenizer)), **kwargs)
from duet_moe import DuetMoeForCausalLM, Writer
load = DuetMoeForCausalLM.from_pretrained
"""


@pytest.fixture(scope="module")
def server() -> Iterator[FakeHub]:
    with serving() as hub:
        yield hub


@pytest.fixture(scope="module")
def process(server: FakeHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Online]:
    online = Online(server.url, tmp_path_factory.mktemp("online"))
    yield online
    online.close()


@pytest.fixture
def hub(server: FakeHub) -> Iterator[FakeHub]:
    yield server
    server.faults = Faults()


@pytest.fixture
def online(process: Online, hub: FakeHub) -> Online:
    return process


def test_a_model_and_its_tokenizer_come_back_as_they_were(online: Online, hub: FakeHub) -> None:
    value = online.run(
        PUSH
        + """
push("me/whole")
tokenizer.push_to_hub("me/whole")
from transformers import AutoModelForCausalLM
writer = Writer.load("me/whole")
same = logits(writer.model), logits(AutoModelForCausalLM.from_pretrained("me/whole")), expected()
value = {"logits": same, "text": writer.write("The fox", mode="factual", max_new_tokens=4).text}
"""
    )
    assert len(set(value["logits"])) == 1
    assert value["text"]
    names = set(hub.files("me/whole"))
    assert {"README.md", "config.json", "model.safetensors", "persistence.py", "tokenizer.json"} <= names
    assert not [name for name in names if name.endswith(".bin") or "/" in name]


def test_a_process_without_the_package_runs_the_code_of_the_repository(
    online: Online, hub: FakeHub, tmp_path: Path
) -> None:
    expected = online.run(PUSH + 'push("me/remote"); value = expected(head_mix=0.5)')
    bare = Online(hub.url, tmp_path / "bare", with_package=False)
    found = bare.run(
        f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging
model = AutoModelForCausalLM.from_pretrained("me/remote", trust_remote_code=True)
ids = torch.randint(6, 97, (1, 6), generator=torch.Generator().manual_seed(1))
with torch.no_grad():
    total = model(ids, head_mix=0.5).logits.sum().item()
model.push_to_hub("me/remote-again")
value = {{"logits": total, "module": type(model).__module__}}
"""
    )
    with pytest.raises(RemoteError, match="lacks weights"):
        hub.repos["me/remote"].commit("main", hub.files("me/remote") | {"model.safetensors": EMPTY_SAFETENSORS})
        bare.run(
            'AutoModelForCausalLM = __import__("transformers").AutoModelForCausalLM\n'
            'AutoModelForCausalLM.from_pretrained("me/remote", trust_remote_code=True)'
        )
    bare.close()
    assert found["logits"] == expected
    assert found["module"].startswith("transformers_modules.")
    assert "persistence.py" in hub.files("me/remote-again")


EMPTY_SAFETENSORS = (2).to_bytes(8, "little") + b"{}"


def test_revisions_are_commits_branches_and_tags(online: Online) -> None:
    old, new, found = online.run(
        PUSH
        + """
first = push("me/history", seed=0)
from huggingface_hub import HfApi
HfApi().create_tag("me/history", tag="v1")
push("me/history", seed=1)
push("me/history", seed=2, revision="trial")
value = expected(0), expected(1), {name: logits(load("me/history", revision=name)) for name in (first, "v1", "main")}
value[2]["first"] = value[2].pop(first)
assert logits(load("me/history", revision="trial")) == expected(2)
"""
    )
    assert old != new
    assert found == {"first": old, "v1": old, "main": new}


def test_shards_are_pushed_and_pulled(online: Online, hub: FakeHub) -> None:
    same = online.run(PUSH + 'push("me/shards", max_shard_size="40KB"); value = logits(load("me/shards")), expected()')
    assert same[0] == same[1]
    names = hub.files("me/shards")
    assert "model.safetensors.index.json" in names and sum(name.startswith("model-") for name in names) > 2


VOICE = """
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
import torch
head = r"diversity_head\\.(gate_proj|up_proj|down_proj|unembed)"
push("me/base")
torch.manual_seed(3)
config = LoraConfig(r=4, target_modules=head, task_type="CAUSAL_LM", init_lora_weights=False)
voice = get_peft_model(load("me/base"), config)
voice.push_to_hub("me/voice")
from transformers import AutoModelForCausalLM
again = [
    PeftModel.from_pretrained(load("me/base"), "me/voice"),
    AutoPeftModelForCausalLM.from_pretrained("me/voice"),
    AutoModelForCausalLM.from_pretrained("me/voice"),
]
value = {
    mix: [logits(model, head_mix=mix) for model in (load("me/base"), voice, *again)] for mix in (0.0, 1.0)
}
"""


def test_a_voice_is_an_adapter_that_loads_over_its_base(online: Online, hub: FakeHub) -> None:
    value = online.run(PUSH + VOICE)
    factual, creative = value["0.0"], value["1.0"]
    assert len(set(factual)) == 1
    assert len(set(creative[1:])) == 1 and creative[0] != creative[1]
    names = hub.files("me/voice")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(names) and "model.safetensors" not in names
    assert json.loads(names["adapter_config.json"])["base_model_name_or_path"] == "me/base"


def front_matter(page: bytes) -> dict:
    return yaml.safe_load(page.decode().split("---")[1])


def test_a_new_repository_gets_a_card_that_describes_the_model(online: Online, hub: FakeHub) -> None:
    online.run(PUSH + 'tokenizer.push_to_hub("me/carded"); push("me/carded", tags=["poems"])')
    page = hub.files("me/carded")["README.md"]
    front = front_matter(page)
    assert front["library_name"] == "transformers" and front["pipeline_tag"] == "text-generation"
    assert {"duet_moe", "moe", "poems"} <= set(front["tags"])
    assert b"# carded" in page and b"| `creative` | 0.7 |" in page and b"automatically generated" not in page


def test_a_card_that_is_there_stays(online: Online, hub: FakeHub) -> None:
    online.run(
        PUSH
        + """
from huggingface_hub import ModelCard
push("me/own")
ModelCard("---\\nlicense: mit\\n---\\n\\nMy own words.").push_to_hub("me/own")
push("me/own", seed=1)
value = tiny_model().save_pretrained("own", push_to_hub=True, repo_id="me/own", max_shard_size="20KB")
"""
    )
    files = hub.files("me/own")
    assert b"My own words." in files["README.md"] and b"creative" not in files["README.md"]
    assert front_matter(files["README.md"])["license"] == "mit"
    assert "model.safetensors.index.json" in files


def test_a_model_of_the_hub_names_its_base_in_its_card(online: Online, hub: FakeHub) -> None:
    online.run(PUSH + 'push("me/parent"); load("me/parent").push_to_hub("me/child")')
    assert front_matter(hub.files("me/child")["README.md"])["base_model"] == "me/parent"
    assert "base_model" not in front_matter(hub.files("me/parent")["README.md"])


def second_shard(hub: FakeHub, repo: str) -> str:
    return sorted(name for name in hub.files(repo) if name.startswith("model-"))[1]


def test_an_upload_that_breaks_off_leaves_the_old_commit_and_the_next_completes(online: Online, hub: FakeHub) -> None:
    online.run(PUSH + 'push("me/cut", seed=0)')
    before, commits = dict(hub.files("me/cut")), len(hub.repos["me/cut"].commits)
    hub.faults.cut_upload_after = 10_000
    with pytest.raises(RemoteError) as failed:
        online.run(PUSH + 'push("me/cut", seed=11)')
    assert failed.value.kind == "RuntimeError" and "model.safetensors" in str(failed.value)
    assert hub.files("me/cut") == before and len(hub.repos["me/cut"].commits) == commits
    assert online.run(PUSH + 'value = logits(load("me/cut", force_download=True)) == expected(0)')
    hub.faults.cut_upload_after = None
    assert online.run(PUSH + 'push("me/cut", seed=11); value = logits(load("me/cut")) == expected(11)')


def test_a_download_that_breaks_off_is_an_error_and_the_next_completes(online: Online, hub: FakeHub) -> None:
    online.run(PUSH + 'push("me/half", max_shard_size="40KB")')
    hub.faults.cut_download_of = second_shard(hub, "me/half")
    with pytest.raises(RemoteError, match="file should be of size"):
        online.run(PUSH + 'load("me/half")')
    hub.faults.cut_download_of = None
    assert online.run(PUSH + 'value = logits(load("me/half")) == expected()')


def test_a_shard_that_was_pushed_cut_off_or_not_at_all_is_named(online: Online, hub: FakeHub) -> None:
    online.run(PUSH + 'push("me/broken", max_shard_size="40KB")')
    files, shard = dict(hub.files("me/broken")), second_shard(hub, "me/broken")
    hub.repos["me/broken"].commit("main", files | {shard: files[shard][:-100]})
    with pytest.raises(RemoteError, match=rf"{shard} has [\d,]+ bytes and should have") as failed:
        online.run(PUSH + 'load("me/broken")')
    assert failed.value.kind == "OSError"
    hub.repos["me/broken"].commit("main", {name: data for name, data in files.items() if name != shard})
    with pytest.raises(RemoteError, match=shard) as failed:
        online.run(PUSH + 'load("me/broken")')
    assert failed.value.kind == "OSError"


def test_a_pickle_on_the_hub_is_neither_fetched_nor_converted(online: Online, hub: FakeHub) -> None:
    online.run(PUSH + 'push("me/pickle")')
    files = dict(hub.files("me/pickle"))
    files["pytorch_model.bin"] = files.pop("model.safetensors")
    hub.repos["me/pickle"].commit("main", files)
    with pytest.raises(RemoteError, match=r"'me/pickle' has no weights in safetensors\. A pickle"):
        online.run(PUSH + 'load("me/pickle")')
    assert not [line for line in hub.requests if "pytorch_model.bin" in line]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ('load("me/nowhere")', "me/nowhere is not a local folder and is not a valid model identifier"),
        ('Writer.load("me/nowhere")', "'me/nowhere' is no folder and was not loaded from the Hub: me/nowhere is not"),
        ('push("me/there"); load("me/there", revision="v9")', "v9 is not a valid git identifier"),
    ],
)
def test_a_repository_or_revision_that_does_not_exist(online: Online, call: str, message: str) -> None:
    with pytest.raises(RemoteError, match=message):
        online.run(PUSH + call)


@pytest.mark.parametrize(("status", "message"), [(401, "401"), (404, "404"), (500, "500")])
def test_a_push_that_the_server_refuses_says_so(online: Online, hub: FakeHub, status: int, message: str) -> None:
    hub.faults.status = {"/api/models/me/refused/commit": status}
    with pytest.raises(RemoteError, match=message):
        online.run(PUSH + 'push("me/refused")')
    assert hub.files("me/refused") == {}


def test_a_server_that_fails_half_way_through_loading_gives_no_model(online: Online, hub: FakeHub) -> None:
    online.run(PUSH + 'push("me/failing")')
    hub.faults.status = {"/me/failing/resolve": 500}
    with pytest.raises(RemoteError, match="500|couldn't connect|We had to resort"):
        online.run(PUSH + 'load("me/failing")')


def test_a_repository_that_one_may_not_read_is_named(online: Online, hub: FakeHub) -> None:
    online.run(PUSH + 'push("me/closed")')
    hub.faults.status = {"/me/closed": 401, "/api/models/me/closed": 401}
    with pytest.raises(RemoteError, match=r"trying to load me/closed:\s+.*401 Unauthorized"):
        online.run(PUSH + 'load("me/closed")')


def test_the_examples_of_the_docs_run_in_order(online: Online, hub: FakeHub) -> None:
    page = (Path(__file__).resolve().parent.parent / "docs" / "hub.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 5
    code = "\n".join(blocks) + "\nvalue = type(model).__name__, type(voice).__name__"
    assert online.run(code) == ["DuetMoeForCausalLM", "PeftModelForCausalLM"]
    assert b"# my-model" in hub.files("me/my-model")["README.md"]
    assert "adapter_model.safetensors" in hub.files("me/my-voice")
