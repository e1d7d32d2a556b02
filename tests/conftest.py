"""What holds for every test: fresh memory is NaN, random numbers start from the same seed, settings are put back."""

import functools
import getpass
import hashlib
import os
import random
import tempfile
from pathlib import Path

import pytest
import torch

from nacre.core import native
from nacre.core.choice import kernels_at_any_size
from nacre.core.op import OPS


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kernels", type=Path, metavar="FOLDER", help="test the compiled libraries of this folder (make sanitize)"
    )


def pytest_configure(config: pytest.Config) -> None:
    # torch's cache of compiled graphs does not see that an operator's arguments have changed since
    schemas = [str(each._schema) for op in OPS.values() for each in (op.operator, op.backward_operator)]
    name = f"nacre_tests_{getpass.getuser()}_{hashlib.sha256(repr(schemas).encode()).hexdigest()[:16]}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / name))
    if folder := config.getoption("--kernels"):
        native.find = functools.partial(native.find, folder)
        assert not native.unavailable(), native.unavailable()


@pytest.fixture(autouse=True)
def fresh_memory_is_nan(request: pytest.FixtureRequest):
    """Fills what ``torch.empty`` and the kernels' own allocations return with NaN, so that an unwritten element shows.

    torch does this only where deterministic algorithms are asked for, which also makes torch's own functions run in
    other ways (a sorted index_add, for one). A test of nacre's own determinism says ``@pytest.mark.usual_algorithms``.
    """
    usual = request.node.get_closest_marker("usual_algorithms") is not None
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(not usual, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    if library := native.library():
        library.nacre_memory_fill_with_nan(True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(autouse=True)
def kernels_run_at_any_size(request: pytest.FixtureRequest):
    """Small cases test nacre's own kernels. A test of the calls left to torch says ``@pytest.mark.usual_sizes``."""
    if request.node.get_closest_marker("usual_sizes") is not None:
        yield
        return
    with kernels_at_any_size():
        yield


@pytest.fixture(autouse=True)
def same_start():
    """The same seeds before every test; threads, default dtype and the state of autograd as they were after it."""
    threads, dtype, gradients = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
    random.seed(0)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(gradients)
