"""Markers of transformers' tests; those that start several processes are also marked `distributed`."""

import pytest

DISTRIBUTED = ("is_tensor_parallel_test", "is_expert_parallel_test", "is_fsdp_test")
OTHERS = (
    "accelerate_tests",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "torch_compile_test",
    "is_training_test",
)


def pytest_configure(config: pytest.Config) -> None:
    for name in (*DISTRIBUTED, *OTHERS):
        config.addinivalue_line("markers", f"{name}: of transformers' tests")
    config.addinivalue_line("markers", "distributed: starts several processes")


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if any(item.get_closest_marker(name) for name in DISTRIBUTED):
            item.add_marker("distributed")
