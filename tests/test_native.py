"""The compiled kernels: they run where they should, agree with their formulas, and give the same bits every time."""

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nacre
from nacre.blocks import BLOCKS
from nacre.core import native
from nacre.core.choice import Kernel, record_choices
from nacre.core.op import OPS
from nacre.layers import LAYERS
from tests.support import assert_as_good_as_torch, build, build_pair, fresh, in_dtype, run, tensors

ROOT = Path(__file__).parent.parent
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

WITH_KERNEL = {name for name, op in OPS.items() if any(kernel.language == "C++" for kernel in op.kernels)}
# a Dropout that drops nothing calls no op, and a sparse gradient is the formula's
WITHOUT_KERNEL = {"dropout": ("none dropped", "evaluation"), "embedding": ("sparse",)}
CASES = [
    pytest.param(spec, case, id=f"{spec.name}-{case.name}")
    for spec in {**LAYERS, **BLOCKS}.values()
    for case in spec.cases
    if WITH_KERNEL & set(spec.operators) and not case.bench
    if not case.name.startswith(WITHOUT_KERNEL.get(spec.name, ()))
]

# what ATEN_CPU_CAPABILITY may ask for on this machine, and the library that nacre then loads
LIBRARIES = {"default": "baseline", "avx2": "avx2", "avx512": "avx512"}
CAPABILITIES = {"AVX512": ["default", "avx2", "avx512"], "AVX2": ["default", "avx2"]}

# in two halves, which two workers run side by side
TESTS_OF_KERNELS = {
    "shared": ["test_native", "test_cpu_math", "layers/test_layer_norm", "layers/test_softmax"],
    "others": [
        f"layers/test_{name}"
        for name in (
            "activation_kernel",
            "cross_entropy_kernel",
            "dropout",
            "embedding",
            "linear_kernel",
            "conv2d_kernel",
        )
    ],
}


@pytest.fixture
def library():
    if reason := native.unavailable():
        pytest.skip(reason)  # test_the_library_is_loaded fails then, unless this machine has no compiler


def without_library(monkeypatch):
    monkeypatch.setattr(Kernel, "unavailable", lambda kernel: "the test asks for the formula")


def test_the_library_is_loaded():
    if not any(shutil.which(name) for name in (os.environ.get("CXX") or "c++", "g++", "clang++")):
        pytest.skip("no C++ compiler on this machine")
    assert native.unavailable() == ""
    assert (
        native.find().stem == f"_kernels_{LIBRARIES.get(torch.backends.cpu.get_cpu_capability().lower(), 'baseline')}"
    )


def test_every_kernel_is_taken(library):
    with record_choices() as choices:
        for param in CASES:
            spec, case = param.values
            layer = build(spec, case, torch.float32)
            inputs, keywords = case.make(torch.float32)
            run(layer, inputs, keywords)
    taken = {choice.operator for choice in choices if choice.implementation == "C++ kernel"}
    assert taken == WITH_KERNEL | {f"{name}_backward" for name in WITH_KERNEL}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("spec", "case"), CASES)
def test_kernel_and_formula_agree(spec, case, dtype, library, monkeypatch):
    layer, reference = build_pair(spec, case, dtype)
    if case.random:
        reference = copy.deepcopy(layer)  # torch.nn draws other random numbers
    inputs, keywords = case.make(dtype)
    judge = run(reference.to(torch.float64), *in_dtype((inputs, keywords), torch.float64))
    torchs = run(reference.to(dtype), fresh(inputs), fresh(keywords))
    with record_choices() as choices:
        ours = run(layer, fresh(inputs), fresh(keywords))
    for choice in choices:
        if choice.operator.removesuffix("_backward") in WITH_KERNEL:
            assert choice.implementation.startswith("C++") or "asks for" in choice.reason, choice
    without_library(monkeypatch)
    with record_choices() as choices:
        formulas = run(layer, fresh(inputs), fresh(keywords))
    assert {choice.implementation for choice in choices} == {"formula"}
    # a gradient lies in memory as torch's does, or as what it is the gradient of
    wanted = [t for t in (*tensors((inputs, keywords)), *layer.parameters()) if t.requires_grad]
    places = [None] * len(list(tensors(ours[0])))
    places += [t.stride() for t, gradient in zip(wanted, ours[1], strict=True) if gradient is not None]
    for other in (torchs, formulas):
        for one, two, exact, own in zip(tensors(ours), tensors(other), tensors(judge), places, strict=True):
            assert_as_good_as_torch(one, two, exact, dtype, f"{spec.name}, {case.name}")
            assert one.numel() == 0 or one.stride() in (two.stride(), own)


@pytest.mark.usual_algorithms
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_any_number_of_threads(dtype, library):
    # rows and features for several blocks of rows, none of them a whole number of vectors
    layer = nacre.LayerNorm(193, dtype=dtype)
    torch.nn.init.normal_(layer.weight)
    input = torch.randn(3001, 193, dtype=dtype, requires_grad=True)
    results = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        with record_choices() as choices:
            results.append(run(layer, (input,), {}))
        assert {choice.implementation for choice in choices} == {"C++ kernel"}
    for result in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(tensors(results[0]), tensors(result), strict=True))


@pytest.mark.parametrize("found", [None, ROOT / "README.md"], ids=["not built", "not loadable"])
def test_without_the_library_the_formulas_serve(found, monkeypatch):
    monkeypatch.setattr(native, "find", lambda: found)
    native.unavailable.cache_clear()
    try:
        with record_choices() as choices:
            output, _ = run(nacre.LayerNorm(4), (torch.tensor([[1.0, 1.0, 3.0, 3.0]]),), {})
    finally:
        native.unavailable.cache_clear()
    assert {choice.implementation for choice in choices} == {"formula"}
    assert ("could not be loaded" if found else "were not built") in choices[0].reason
    # eps = 1e-5 makes the values a little smaller than 1
    torch.testing.assert_close(output, torch.tensor([[-1.0, -1.0, 1.0, 1.0]]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("half", TESTS_OF_KERNELS)
@pytest.mark.parametrize(
    "capability", CAPABILITIES.get(torch.backends.cpu.get_cpu_capability(), ["default"])[:-1] or ["default"]
)
def test_lesser_instruction_sets(capability, half, library):
    """The kernels for older processors pass the same tests: torch, and nacre with it, is told that this is one."""
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider"]
        + [f"tests/{name}.py" for name in TESTS_OF_KERNELS[half]]
        + ["-k", "not lesser_instruction_sets and not compile"],
        cwd=ROOT,
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert " passed" in process.stdout
