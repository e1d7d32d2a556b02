"""The shape of the house: imports point one way, a layer's folder is read like every other, no file grows too long."""

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import nacre

PACKAGE = Path(nacre.__file__).parent
FILES = sorted(path for path in PACKAGE.rglob("*.py"))
FOLDERS = sorted(path for path in (PACKAGE / "layers").iterdir() if (path / "__init__.py").exists())

# each may import those to its right; the package itself and nacre.functional only gather public names
LEVELS = ["cli", "tools", "applications", "blocks", "layers", "core"]
SURFACE = {"nacre", "nacre.functional", "nacre.memory", "nacre.threads"}

# what a formula may import beside torch and Python's own modules, apart from files of its folder to which the same
# applies: dropout masks are drawn in core, since a backward regenerates them and kernels must draw the same
ALLOWED_IN_FORMULAS = {"nacre.core.random"}

SECTIONS = ["Args", "Shape", "Numerics", "Raises", "Cost", "Paper", "Example"]
NEEDED = {"Shape", "Numerics", "Cost", "Example"}  # Args and Raises where there are any; a paper where there is one
LAYER_CLASSES = sorted(
    (value for value in vars(nacre).values() if inspect.isclass(value) and issubclass(value, torch.nn.Module)),
    key=lambda layer: layer.__name__,
)


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports anywhere in it, by its full name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module


def level(module: str) -> int:
    return LEVELS.index(module.split(".")[1])


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_one_way(path):
    module = name_of(path)
    for imported in imports(path):
        if imported.split(".")[0] != "nacre" or module in SURFACE:
            continue
        if imported in SURFACE:
            assert level(module) < LEVELS.index("blocks"), f"{module} imports {imported}, which imports it"
            continue
        assert level(imported) >= level(module), f"{module} imports {imported}, which stands above it"
        if level(module) == level(imported) == LEVELS.index("layers") and module != "nacre.layers":
            assert imported.split(".")[2:3] == module.split(".")[2:3], f"{module} imports {imported}, another layer"


def is_formula(path: Path) -> bool:
    return path.stem.startswith("formula") or path.stem.endswith("_formula")


FORMULAS = [path for folder in FOLDERS for path in sorted(folder.glob("*.py")) if is_formula(path)]


@pytest.mark.parametrize("formula", FORMULAS, ids=name_of)
def test_formulas_import_only_torch(formula):
    seen, waiting = set(), [formula]
    while waiting:
        path = waiting.pop()
        seen.add(path)
        for imported in imports(path):
            if imported.split(".")[0] in sys.stdlib_module_names | {"torch"} or imported in ALLOWED_IN_FORMULAS:
                continue
            assert imported in MODULES and MODULES[imported].parent == formula.parent, f"{path.name} imports {imported}"
            if MODULES[imported] not in seen and MODULES[imported] != formula.parent / "__init__.py":
                waiting.append(MODULES[imported])


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_layers_folder_has_the_files_of_every_other(folder):
    names = {path.name for path in folder.iterdir() if path.is_file()}
    assert {"__init__.py", "cost.py", "layer.py", "cases.py"} <= names
    assert any(is_formula(folder / name) for name in names)
    other = {name for name in names if not name.endswith(".py") or name.startswith("kernel")}
    assert all(re.fullmatch(r"(\w+_)?kernel_cpu\.cpp|kernel_cpu(_\w+)?\.h|kernel_gpu\.py", name) for name in other)


def test_no_file_is_too_long():
    sources = [*FILES, *PACKAGE.rglob("*.cpp"), *PACKAGE.rglob("*.h"), *Path(__file__).parent.rglob("*.py")]
    for path in sources:
        limit = 120 if path in FORMULAS else 250 if "kernel_" in path.stem and path.suffix != ".py" else 500
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= limit, f"{path} has {lines} lines, of at most {limit}"


def test_no_line_of_cpp_is_too_long():
    for path in [*PACKAGE.rglob("*.cpp"), *PACKAGE.rglob("*.h")]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert len(line) <= 120, f"{path}:{number} has {len(line)} characters, of at most 120"


def test_importing_nacre_imports_nothing_optional():
    optional = {"jinja2", "latex2mathml", "lightning", "matplotlib", "pandas", "rich", "safetensors", "scipy"}
    optional |= {"sklearn", "sympy", "tqdm", "triton"}
    optional |= {"torch._dynamo"}  # torch.compile's own code takes as long to import as all of torch
    # torch imports some of them itself, as it pleases
    code = "import sys, torch; before = set(sys.modules); import nacre; print(*set(sys.modules) - before)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = set(process.stdout.split())
    assert "nacre.layers" in imported
    assert not imported & optional


def sections(documentation: str) -> list[str]:
    lines = documentation.splitlines()
    return [line[:-1] for line in lines if line.endswith(":") and line[:-1] in SECTIONS]


@pytest.mark.parametrize("layer", LAYER_CLASSES, ids=lambda layer: layer.__name__)
def test_docstrings_of_layers(layer):
    documentation = inspect.cleandoc(layer.__doc__ or "")
    assert layer.__dict__.get("__doc__"), "its own docstring, not torch's"
    first, *rest = documentation.splitlines()
    assert first.endswith(".") and (not rest or not rest[0]), "one sentence on what it is for, on a line of its own"
    found = sections(documentation)
    assert found == sorted(found, key=SECTIONS.index), "the sections in the order of all docstrings"
    assert set(found) >= NEEDED
    given = [p for p in inspect.signature(layer).parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    assert "Args" in found or not given
    assert ".. math::" in documentation.split("\nShape:")[0], "the formula before the sections"
    assert ">>> " in documentation.split("\nExample:")[1]


@pytest.mark.parametrize("name", nacre.__all__)
def test_public_functions_and_classes_are_documented(name):
    value = getattr(nacre, name)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert value.__doc__
    if inspect.isfunction(value):
        found = sections(inspect.cleandoc(value.__doc__))
        assert found == sorted(found, key=SECTIONS.index)
        assert "Example" in found
