"""Wheels, with the compiled kernels and without them: what is in them, and that both work."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# in a fresh interpreter without the development installation, whose import hook would come first
USE = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__]
sys.path.insert(0, sys.argv[1])
import nacre, torch
from nacre.core import native
assert nacre.__file__.startswith(sys.argv[1]), nacre.__file__
output = nacre.LayerNorm(4)(torch.tensor([[1.0, 1.0, 3.0, 3.0]]))
torch.testing.assert_close(output, torch.tensor([[-1.0, -1.0, 1.0, 1.0]]), rtol=1e-5, atol=0)
print(native.unavailable() or "the kernels serve")
"""


def build_wheel(folder: Path, **environment: str) -> tuple[Path, Path]:
    """Builds a wheel from a copy of the sources; returns it and the folder it was unpacked to.

    Of the kernels' libraries it has the plain one alone, and that one not optimised: what compiles fastest.
    """
    sources = folder / "sources"
    shutil.copytree(
        ROOT, sources, ignore=shutil.ignore_patterns(".venv", "build", "*.so", "__pycache__", "runs", ".git")
    )
    subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps", "--no-build-isolation"]
        + ["--config-settings=cmake.define.NACRE_INSTRUCTION_SETS=baseline", "--config-settings=cmake.build-type=Debug"]
        + ["--quiet", "--wheel-dir", folder, sources],
        env={**os.environ, **environment},
        check=True,
    )
    (wheel,) = folder.glob("*.whl")
    unpacked = folder / "unpacked"
    zipfile.ZipFile(wheel).extractall(unpacked)
    return wheel, unpacked


def use(unpacked: Path) -> str:
    process = subprocess.run([sys.executable, "-c", USE, unpacked], capture_output=True, text=True, cwd=unpacked)
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


def test_wheel_with_kernels(tmp_path):
    if not any(shutil.which(name) for name in (os.environ.get("CXX") or "c++", "g++", "clang++")):
        pytest.skip("no C++ compiler on this machine")
    wheel, unpacked = build_wheel(tmp_path)
    assert wheel.name.startswith("nacre-") and "-py3-none-" in wheel.name and not wheel.name.endswith("-any.whl")
    libraries = sorted(path.name for path in (unpacked / "nacre").glob("_kernels_*"))
    assert [name.split(".")[0] for name in libraries] == ["_kernels_baseline"]
    assert {path.name for path in unpacked.iterdir()} == {"nacre", *(p.name for p in unpacked.glob("*.dist-info"))}
    assert all(str(tmp_path).encode() not in (unpacked / "nacre" / name).read_bytes() for name in libraries)
    assert use(unpacked) == "the kernels serve"


def test_wheel_without_a_compiler(tmp_path):
    wheel, unpacked = build_wheel(tmp_path, CC="/bin/false", CXX="/bin/false")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not list(unpacked.rglob("_kernels_*"))
    assert use(unpacked).startswith("the C++ kernels were not built")
