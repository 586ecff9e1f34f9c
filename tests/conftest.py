"""What all tests share: no network, the same random numbers in every run, one tiny model and tokenizer."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402
from quantized import SHAPE  # noqa: E402
from tiny import tiny_config, tiny_model, tiny_tokenizer, tiny_writer_of  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

from duet_moe import DuetMoeConfig, DuetMoeForCausalLM, Writer  # noqa: E402

torch.set_num_threads(1)  # models of this size only wait for more of them

# No deadline: a slow machine is not a failure. Derandomised: a failure is one on every machine.
settings.register_profile("repeatable", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def config() -> DuetMoeConfig:
    return tiny_config()


@pytest.fixture
def model() -> DuetMoeForCausalLM:
    """A model whose two heads differ and whose plan is not zero."""
    return tiny_model()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture
def tiny_writer(tokenizer: PreTrainedTokenizerFast) -> Writer:
    return tiny_writer_of(tokenizer)


@pytest.fixture(scope="session")
def quantisable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model in bf16 that every form of quantisation fits."""
    path = tmp_path_factory.mktemp("bf16")
    tiny_model(**SHAPE).to(torch.bfloat16).save_pretrained(path)
    return path
