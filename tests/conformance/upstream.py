"""transformers' own model tests, taken from the source distribution of the installed version.

    python tests/conformance/upstream.py

downloads them from the package registry into the environment; nothing of them is in this repository. The source
distribution has the mixins but not all that they import: [`load`] puts small modules of ours in those places. What is
empty there (generation and exporter mixins) is not tested here; tests/test_generation.py and tests/test_hub.py do.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from types import ModuleType

import transformers

FOLDER = Path(sys.prefix) / "share" / "transformers-tests" / transformers.__version__
PACKAGE = "upstream_tests"
# The fields that every configuration has, with values that are no default (tests/utils is not distributed).
CONFIG_FIELDS = {
    "architectures": ["SomeModel"], "chunk_size_feed_forward": 5, "dtype": "float16", "id2label": {0: "label"},
    "is_encoder_decoder": True, "label2id": {"label": "0"}, "output_attentions": True, "output_hidden_states": True,
    "problem_type": "regression", "return_dict": False,
}  # fmt: skip


def download() -> Path:
    """Fetch the tests of the installed transformers into `FOLDER` unless they are there, and return it."""
    if FOLDER.is_dir():
        return FOLDER
    FOLDER.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER.parent) as unfinished:
        wanted = f"transformers=={transformers.__version__}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
        subprocess.run([*command, "--dest", unfinished, wanted], check=True)
        (archive,) = Path(unfinished).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            members = [member for member in tar if "/tests/test_" in member.name and "/src/" not in member.name]
            tar.extractall(unfinished, members, filter="data")
        (tests,) = Path(unfinished).glob("*/tests")
        (tests / "__init__.py").touch()
        os.replace(tests, FOLDER)
    return FOLDER


def load() -> None:
    """Make the downloaded tests importable as `upstream_tests`; the spawned ranks call it too."""
    if PACKAGE in sys.modules:
        return
    import ranks

    package = ModuleType(PACKAGE)
    package.__path__ = [str(FOLDER)]
    sys.modules[PACKAGE] = package
    _stand_in("exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
    _stand_in("generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
    _stand_in("utils.test_configuration_utils", config_common_kwargs=CONFIG_FIELDS)
    sys.modules[f"{PACKAGE}.distributed_testing_utils"] = ranks


def _stand_in(name: str, **members: object) -> None:
    parent, child = name.split(".")
    for full in (f"{PACKAGE}.{parent}", f"{PACKAGE}.{parent}.{child}"):
        sys.modules[full] = ModuleType(full)
    sys.modules[f"{PACKAGE}.{parent}"].__path__ = []
    vars(sys.modules[f"{PACKAGE}.{parent}.{child}"]).update(members)


if __name__ == "__main__":
    print(download())
