"""The Space as a server: endpoint, Stop, faults, start-up and files; on a fake writer and on real ones."""

import doctest
import importlib
import inspect
import itertools
import re
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoTokenizer

gr = pytest.importorskip("gradio", reason="the Space needs the `space` extra")

from fake_writer import CREATIVE, FACTUAL, FakeWriter  # noqa: E402
from gradio_client import Client  # noqa: E402
from gradio_client.exceptions import AppError  # noqa: E402

from duet_moe import DuetMoeConfig, DuetMoeForCausalLM  # noqa: E402
from duet_moe.modeling import checkpoints  # noqa: E402
from duet_moe.modeling.writer import Writer  # noqa: E402
from duet_moe.space.app import build_app, launch_options, main  # noqa: E402
from duet_moe.space.examples import EXAMPLES  # noqa: E402

# Gradio 6.31 counts its queue with calls that pandas 3 calls old.
pytestmark = pytest.mark.filterwarnings("ignore:.*(no_silent_downcasting|copy keyword)")
SPACE = Path(importlib.import_module("duet_moe.space.app").__file__).parent


# App


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, FakeWriter]]:
    writer = FakeWriter()
    app = build_app(writer)
    _, url, _ = app.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, **launch_options())
    yield url, writer
    app.close()


@pytest.fixture
def client(served: tuple[str, FakeWriter]) -> Client:
    return Client(served[0], verbose=False)


def test_app_builds_without_a_warning() -> None:
    with warnings.catch_warnings():
        for kind in (UserWarning, DeprecationWarning, FutureWarning):
            warnings.simplefilter("error", kind)
        app, options = build_app(FakeWriter()), launch_options()
    assert app.get_config_file()["enable_queue"] and app._queue.max_size == 32
    assert not app.analytics_enabled and not options["ssr_mode"] and not options["share"]


def test_compare_is_the_only_public_endpoint_and_needs_only_a_prompt(client: Client) -> None:
    endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert list(endpoints) == ["/compare"]
    parameters = endpoints["/compare"]["parameters"]
    assert [p["parameter_name"] for p in parameters if not p["parameter_has_default"]] == ["prompt"]
    assert endpoints["/compare"]["description"].startswith("Write two texts for one prompt")
    assert len(endpoints["/compare"]["returns"]) == 3


def test_compare_answers_a_bare_prompt(client: Client) -> None:
    left, right, figures = client.predict("What is the capital of Portugal?", api_name="/compare")
    assert (left, right, figures["seed"]) == (FACTUAL, CREATIVE, 7)
    assert figures["left"]["mode"] == "factual" and figures["right"]["finish_reason"] == "end"
    assert figures["left"]["tokens"] == len(FACTUAL.split()) and 0 < figures["right"]["mean_disagreement"] < 1


def test_compare_streams_and_takes_settings(served: tuple[str, FakeWriter], client: Client) -> None:
    writer = served[1]
    writer.delay = 0.06
    job = client.submit("Hello", left_mode="hybrid", max_new_tokens=5, temperature=0.5, seed=3, api_name="/compare")
    outputs = list(job)
    writer.delay = 0.0
    assert len(outputs) >= 3 and all(
        len(later[1]) >= len(earlier[1]) for earlier, later in itertools.pairwise(outputs)
    )
    assert outputs[-1][2]["seed"] == 3 and outputs[-1][2]["right"]["finish_reason"] == "length"
    left, right = writer.asked[-1]["modes"]
    assert (left.name, left.temperature, right.temperature) == ("hybrid", 0.5, 0.5)


def test_compare_explains_what_was_wrong(client: Client) -> None:
    with pytest.raises(AppError, match="The prompt is empty"):
        client.predict("", api_name="/compare")
    with pytest.raises(AppError, match="Temperature 9 cannot be used"):
        client.predict("Hello", temperature=9, api_name="/compare")


def test_cancelling_a_client_job_ends_generation(served: tuple[str, FakeWriter], client: Client) -> None:
    writer = served[1]
    writer.delay, writer.texts["creative"] = 0.03, "word " * 400
    job = client.submit("Go on", max_new_tokens=400, api_name="/compare")
    next(iter(job))
    job.cancel()
    assert writer.closed.wait(10) and writer.steps < 350
    writer.delay, writer.texts["creative"] = 0.0, CREATIVE
    assert client.predict("Hello", api_name="/compare")[1] == CREATIVE


def test_a_fault_of_the_model_leaves_the_space_usable(served: tuple[str, FakeWriter], client: Client) -> None:
    writer = served[1]
    writer.fault = RuntimeError("tensor trouble")
    with pytest.raises(AppError, match="The model stopped unexpectedly"):
        client.predict("Hello", api_name="/compare")
    writer.fault = None
    assert client.predict("Hello", api_name="/compare")[0] == FACTUAL


# Start


@pytest.mark.parametrize("by_variable", [False, True])
def test_start_with_a_port_in_use_says_so_and_fails(
    by_variable: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Writer, "load", lambda *_, **__: FakeWriter())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        monkeypatch.setenv("GRADIO_SERVER_PORT", port if by_variable else "1")
        assert main([] if by_variable else ["--port", port]) == 1
    assert f"port {port} is in use: choose another with --port or GRADIO_SERVER_PORT" in capsys.readouterr().err


def test_start_serves_on_the_port_of_gradios_variable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Writer, "load", lambda *_, **__: FakeWriter())
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    monkeypatch.setenv("GRADIO_SERVER_PORT", port)
    answers = []

    def ask_once_and_leave(app: gr.Blocks) -> None:
        answers.append(Client(f"http://127.0.0.1:{port}", verbose=False).predict("Hello", api_name="/compare")[0])
        app.close()

    monkeypatch.setattr(gr.Blocks, "block_thread", ask_once_and_leave)
    assert main([]) == 0 and answers == [FACTUAL]
    assert f"is ready at http://127.0.0.1:{port}" in capsys.readouterr().out


def test_start_with_a_missing_checkpoint_says_so_and_fails(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--checkpoint", str(tmp_path / "nowhere")]) == 1
    assert "nowhere" in capsys.readouterr().err


def test_wrong_use_exits_with_status_two() -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--port", "many"])


# Files


def test_examples_are_six_and_half_of_them_creative() -> None:
    assert [example.shows for example in EXAMPLES].count("creative") == 3 == len(EXAMPLES) - 3
    assert len({example.audience for example in EXAMPLES}) == 6 == len({example.prompt for example in EXAMPLES})


def test_space_card_has_what_the_hub_reads() -> None:
    card = yaml.safe_load((SPACE / "README.md").read_text(encoding="utf-8").split("---")[1])
    wanted = {"sdk": "gradio", "sdk_version": "6.31.0", "python_version": "3.11", "app_file": "app.py"}
    assert wanted.items() <= card.items() and card["license"] == "apache-2.0" and "pinned" in card
    assert (
        all(card[key] for key in ("title", "emoji", "colorFrom", "colorTo")) and len(card["short_description"]) <= 60
    )
    assert (SPACE / card["app_file"]).is_file() and "duet-moe[space]" in (SPACE / "requirements.txt").read_text()


def test_looks_need_nothing_from_the_network() -> None:
    look = (SPACE / "style.css").read_text() + launch_options()["theme"]._get_theme_css()
    look = re.sub(r'url\("data:[^"]+"\)', "", look)
    assert not any(sign in look for sign in ("http:", "https:", "url(", "@import", "@font-face"))


@pytest.mark.parametrize("module", ["examples", "settings"])
def test_examples_in_docstrings_hold(module: str) -> None:
    assert doctest.testmod(importlib.import_module(f"duet_moe.space.{module}")).failed == 0


def test_fake_writer_streams_as_the_real_one_does() -> None:
    fake, real = (inspect.signature(kind.stream_compare).parameters for kind in (FakeWriter, Writer))
    assert list(fake)[1:] == [name for name in real if name in fake][1:]
    assert {name: fake[name].default for name in fake} == {name: real[name].default for name in fake}


def test_real_writer_streams_through_the_endpoint_and_stops_on_cancel() -> None:
    tokenizer = AutoTokenizer.from_pretrained(Path(checkpoints.__file__).with_name("duet-mini"))
    sizes = dict(hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4, num_local_experts=4)
    torch.manual_seed(0)
    model = DuetMoeForCausalLM(DuetMoeConfig(vocab_size=len(tokenizer), num_experts_per_tok=2, **sizes))
    app = build_app(Writer(model, tokenizer, "tiny"))
    _, url, _ = app.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, **launch_options())
    try:
        client = Client(url, verbose=False)
        first, again = (client.predict("Hello", max_new_tokens=12, seed=3, api_name="/compare") for _ in range(2))
        assert first[:2] == again[:2] and first[2]["left"]["tokens"] == 12 and first[2]["seed"] == 3
        job = client.submit("Hello", max_new_tokens=512, api_name="/compare")
        next(iter(job))
        job.cancel()
        deadline = time.monotonic() + 10
        while any(thread.name == "duet-generate" for thread in threading.enumerate()):
            assert time.monotonic() < deadline, "generation goes on after the client left"
            time.sleep(0.02)
        assert len(job.outputs()) == 0 or job.outputs()[-1][2]["left"]["tokens"] < 512
    finally:
        app.close()


@pytest.mark.slow
def test_bundled_checkpoint_answers_through_the_endpoint() -> None:
    app = build_app(Writer.load("duet-mini"))
    _, url, _ = app.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, **launch_options())
    try:
        left, right, figures = Client(url, verbose=False).predict(EXAMPLES[0].prompt, seed=1, api_name="/compare")
    finally:
        app.close()
    assert "Lisbon" in left and right and figures["left"]["tokens"] > 0
    assert figures["left"]["finish_reason"] in ("end", "length") and figures["seed"] == 1
