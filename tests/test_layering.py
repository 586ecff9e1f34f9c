"""Imports point one way: configuration <- modeling <- finetune <- evaluation <- space; heavy libraries load late.

Every file is parsed, so that an import counts wherever it stands: in a function, or for type checkers only.
"""

import ast
import configparser
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("configuration", "modeling", "finetune", "evaluation", "space")
HEAVY_HOMES = {
    "gradio": "space",
    "gradio_client": "space",
    "accelerate": "finetune",
    "bitsandbytes": "finetune",
    "datasets": "finetune",
    "peft": "finetune",
    "sentence_transformers": "evaluation",
    "trl": "finetune",
}


def python_files(folder: str) -> list[Path]:
    # A saved checkpoint may carry copies of the modelling files.
    files = sorted((ROOT / folder).rglob("*.py"))
    return [path for path in files if not path.is_relative_to(ROOT / "modeling" / "checkpoints" / "duet-mini")]


SOURCES = {path.relative_to(ROOT).as_posix(): path for layer in ("duet_moe", *LAYERS) for path in python_files(layer)}


def imported(nodes: Iterator[ast.AST]) -> Iterator[str]:
    """Yield the dotted name of every import, `from a import b` as `a.b`; relative ones start with their dots."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (f"{module}.{alias.name}" if node.module else module + alias.name for alias in node.names)


def imports_when_loaded(tree: ast.AST) -> Iterator[str]:
    """Yield the imports that run when the module is imported: none inside functions or `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if lazy or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            continue
        yield from imported(iter([node]))
        yield from imports_when_loaded(node)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def layer_of(name: str) -> str | None:
    """Return the layer that a dotted name belongs to; the package itself re-exports modeling, so it counts as that."""
    parts = name.split(".")
    if parts[0] != "duet_moe":
        return None
    if len(parts) > 1 and parts[1] in LAYERS:
        return parts[1]
    return "space" if len(parts) > 1 and (ROOT / "duet_moe" / f"{parts[1]}.py").is_file() else "modeling"


@pytest.mark.parametrize("source", SOURCES)
def test_imports_only_its_own_layer_and_those_before(source: str) -> None:
    folder = source.split("/")[0]
    if source == "duet_moe/__init__.py":
        folder = "modeling"
    highest = LAYERS.index(folder) if folder in LAYERS else len(LAYERS)  # the command line may use everything
    for name in imported(ast.walk(parse(SOURCES[source]))):
        layer = layer_of(name)
        assert layer is None or LAYERS.index(layer) <= highest, f"{source} imports {name}, which builds on {folder}"
        # While `import duet_moe` runs, its own names do not exist yet.
        from_package = layer == "modeling" and not name.startswith("duet_moe.modeling")
        assert not from_package or highest > LAYERS.index("modeling"), f"{source} imports {name}: too early"


@pytest.mark.parametrize("source", SOURCES)
def test_heavy_libraries_load_late(source: str) -> None:
    for name in imports_when_loaded(parse(SOURCES[source])):
        home = HEAVY_HOMES.get(name.split(".")[0])
        assert home in (None, source.split("/")[0]), f"{source}: import {name} inside the function that needs it"


def test_no_file_imports_a_folder_but_through_the_package() -> None:
    # From the repository root `import modeling` works too, and yields a second copy of every class.
    for path in [*SOURCES.values(), *python_files("tests"), *python_files("benchmarks")]:
        names = imported(ast.walk(parse(path)))
        bare = {name for name in names if name.split(".")[0] in LAYERS or name.startswith("..")}
        assert not bare, f"{path.relative_to(ROOT)}: import {bare} through duet_moe"


def travelling_files() -> list[Path]:
    """Return the files that `save_pretrained` copies: the model's, and what they reach by `from .x import y`."""
    found: list[Path] = []
    waiting = [ROOT / "modeling" / "modeling_duet_moe.py", ROOT / "configuration" / "configuration_duet_moe.py"]
    while waiting:
        path = waiting.pop()
        found.append(path)
        relative = {name for name in imported(ast.walk(parse(path))) if name.startswith(".")}
        siblings = {path.parent / f"{name[1:].split('.')[0]}.py" for name in relative}
        waiting += sorted(siblings - set(found) - set(waiting))
    return found


def is_shim(path: Path) -> bool:
    """True for a modeling file that only re-exports the configuration file that takes its place in a checkpoint."""
    _, *statements = parse(path).body
    allowed = (f"from duet_moe.configuration.{path.stem} import ", "__all__ = ")
    return all(ast.unparse(line).startswith(allowed) for line in statements)


def test_files_that_travel_with_a_checkpoint_need_only_torch_and_transformers() -> None:
    for path in travelling_files():
        if path.parent.name == "modeling" and is_shim(path):
            assert (ROOT / "configuration" / path.name).is_file()
            continue
        for node in (node for node in ast.walk(parse(path)) if isinstance(node, ast.ImportFrom) and node.level):
            flat = node.level == 1 and node.module and "." not in node.module
            assert flat, f"{path.name}: {ast.unparse(node)} is not `from .sibling import name`"
        absolute = {name.split(".")[0] for name in imported(ast.walk(parse(path))) if not name.startswith(".")}
        foreign = absolute - {"torch", "transformers"} - sys.stdlib_module_names
        assert not foreign, f"{path.name} imports {foreign}, which a machine without duet_moe may not have"


def test_importing_the_package_loads_no_more_than_a_stock_model_does() -> None:
    # transformers' own modelling code loads accelerate where it is installed.
    code = f"""
import sys
from transformers import AutoModelForCausalLM, MixtralForCausalLM
stock = set(sys.modules)
import duet_moe
print(*sorted((set(sys.modules) - stock) & {set(HEAVY_HOMES)!r}))
print(*sorted(stock & {{"gradio", "trl", "datasets"}}))
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


def test_setup_cfg_ships_every_package() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    inits = (Path(source).parent for source in SOURCES if source.endswith("__init__.py"))
    folders = {".".join(("duet_moe", *folder.parts)) for folder in inits if folder.name != "duet_moe"} | {"duet_moe"}
    assert set(setup["options"]["packages"].split()) == folders
