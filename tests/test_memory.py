"""The memory pool: what it keeps, what it gives back, and that it is whole in threads and forked processes."""

import os
import resource
import subprocess
import sys
import threading

import pytest
import torch

import nacre
from nacre.core import native
from nacre.functional import layer_norm

MEBIBYTE = 2**20

pytestmark = pytest.mark.skipif(bool(native.unavailable()), reason="without kernels nothing uses the pool")


@pytest.fixture(autouse=True)
def as_it_was():
    limit = nacre.memory.stats().limit
    nacre.memory.empty_cache()
    yield
    nacre.memory.set_limit(limit)
    nacre.memory.empty_cache()


def result(mebibytes, features=256):
    """A kernel's output of that size; the statistics beside it are too small for the pool."""
    return layer_norm(torch.randn(mebibytes * MEBIBYTE // 4 // features, features), (features,))


def test_a_freed_block_serves_the_next_request_of_its_size():
    before = nacre.memory.stats()
    first = result(4)
    assert nacre.memory.stats().used - before.used == 4 * MEBIBYTE
    address = first.data_ptr()
    del first
    waiting = nacre.memory.stats()
    assert (waiting.used, waiting.cached) == (before.used, before.cached + 4 * MEBIBYTE)
    second = result(4)
    assert second.data_ptr() == address
    assert nacre.memory.stats().reused == waiting.reused + 1
    assert nacre.memory.stats().mapped == waiting.mapped


def test_live_tensors_keep_their_memory():
    kept = result(4)
    values = kept.clone()
    nacre.memory.empty_cache()
    others = [result(4) for _ in range(3)]
    assert torch.equal(kept, values)
    assert len({tensor.data_ptr() for tensor in [kept, *others]}) == 4


def test_a_view_keeps_the_memory_of_its_base():
    view = result(4)[3]
    values, used = view.clone(), nacre.memory.stats().used
    other = result(4)
    assert torch.equal(view, values)
    assert nacre.memory.stats().used == used + 4 * MEBIBYTE
    del view, other
    assert nacre.memory.stats().used == used - 4 * MEBIBYTE


def test_the_cache_is_emptied():
    del_me = [result(4) for _ in range(3)]
    del del_me
    assert nacre.memory.stats().cached == 12 * MEBIBYTE
    nacre.memory.empty_cache()
    assert nacre.memory.stats().cached == 0


def test_the_limit_bounds_what_waits():
    kept = result(4)
    nacre.memory.set_limit(nacre.memory.stats().used + 6 * MEBIBYTE)
    freed = [result(4) for _ in range(4)]  # beyond the limit, and served all the same
    del freed
    found = nacre.memory.stats()
    assert found.used + found.cached <= found.limit
    assert found.cached == 4 * MEBIBYTE
    nacre.memory.set_limit(0)
    assert nacre.memory.stats().cached == 0
    assert kept.isfinite().all()
    with pytest.raises(ValueError, match="number of bytes; got -1"):
        nacre.memory.set_limit(-1)


def test_the_peak_is_the_most_used_at_once():
    nacre.memory.reset_peak()
    used = nacre.memory.stats().used
    both = result(4), result(8)
    del both
    result(4)
    assert nacre.memory.stats().peak == used + 12 * MEBIBYTE
    nacre.memory.reset_peak()
    assert nacre.memory.stats().peak == used


@pytest.mark.parametrize("size", [MEBIBYTE // 8, 3 * MEBIBYTE // 2, 5 * MEBIBYTE, 33 * MEBIBYTE, 70 * MEBIBYTE + 4096])
def test_a_block_is_at_most_a_quarter_larger_or_fills_a_huge_page(size):
    before = nacre.memory.stats().used
    kept = layer_norm(torch.zeros(size // 4096, 1024), (1024,))
    taken = nacre.memory.stats().used - before
    assert size <= taken <= max(1.25 * size, -(-size // (2 * MEBIBYTE)) * 2 * MEBIBYTE)
    assert kept.data_ptr() % (2 * MEBIBYTE if size >= 2 * MEBIBYTE else 64) == 0


@pytest.mark.parametrize("sizes", [(64, 64), (512, 768), (4096, 1024)])
def test_a_steady_step_faults_no_page(sizes):
    layer = nacre.LayerNorm(sizes[-1])
    input, grad = torch.randn(sizes, requires_grad=True), torch.randn(sizes)

    def step():
        input.grad = None
        layer.zero_grad()
        layer(input).backward(grad)

    for _ in range(3):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        step()
    # a fresh output and gradient would be 8,192 faults a step at the largest size; the interpreter itself has some
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10 < 50


def test_threads_share_the_pool():
    failures = []

    def work(number):
        for turn in range(20):
            x = torch.full((512, 256), float(number + turn))
            x[:, 0] += 1
            found, expected = layer_norm(x, (256,)), torch.nn.functional.layer_norm(x, (256,))
            if not torch.allclose(found, expected, atol=1e-4):
                failures.append((number, turn))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


IN_A_FORK = """
import os, threading, torch, nacre
from nacre.functional import layer_norm
x = torch.randn(4096, 256)
torch.set_num_threads(1)
expected = layer_norm(x, (256,))
stop = False
def churn():
    while not stop:
        layer_norm(x, (256,))
thread = threading.Thread(target=churn)
thread.start()
children = []
for _ in range(10):
    child = os.fork()
    if child == 0:
        right = torch.equal(layer_norm(x, (256,)), expected)
        nacre.memory.empty_cache()
        os._exit(0 if right else 1)
    children.append(child)
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
stop = True
thread.join()
assert codes == [0] * 10, codes
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_fork_finds_the_pool_whole_while_another_thread_uses_it():
    process = subprocess.run([sys.executable, "-c", IN_A_FORK], capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr


def test_workers_of_a_data_loader_use_it():
    loader = torch.utils.data.DataLoader(range(8), batch_size=4, num_workers=2, collate_fn=collate)
    batches = list(loader)
    assert [tuple(batch.shape) for batch in batches] == [(4, 512, 256)] * 2
    assert all(batch.isfinite().all() for batch in batches)


def collate(indices):
    return torch.stack([layer_norm(torch.full((512, 256), float(index)), (256,)) for index in indices])


def test_results_can_be_saved_and_shared_like_others(tmp_path):
    tensor = result(4)
    values = tensor.clone()
    torch.save(tensor, tmp_path / "tensor.pt")
    assert torch.equal(torch.load(tmp_path / "tensor.pt", weights_only=True), values)
    assert (tensor.numpy() == values.numpy()).all()
    shared = tensor.share_memory_()
    assert shared.is_shared() and torch.equal(shared, values)


KEEP_EVERYWHERE = """
import resource, torch, nacre
assert nacre.memory.keep_everywhere()
x = torch.zeros(2**23)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        y = x + 1
        del y
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
found = faults()
assert found < 50, found
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_the_whole_process_keeps_its_memory_where_asked():
    process = subprocess.run([sys.executable, "-c", KEEP_EVERYWHERE], capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr


def test_importing_nacre_maps_nothing():
    program = "import nacre; print(nacre.memory.stats().mapped, nacre.memory.stats().cached)"
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert process.stdout.split() == ["0", "0"], process.stderr
