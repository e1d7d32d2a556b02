"""Recurrences of many steps, billed in one go: the bill is that of all steps watched one by one."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn

import nacre
from nacre.tools.cost import steps
from nacre.tools.cost.kinds import VIEW


class Reads(nn.Module):
    """A recurrence between other layers; of its results only one is used."""

    def __init__(self, recurrence, result):
        super().__init__()
        self.map, self.recurrence, self.result = nn.Linear(3, 3), recurrence, result

    def forward(self, x):
        found = self.recurrence(self.map(x))[self.result]
        return found[0] if isinstance(found, tuple) else found


def bills(model, x, monkeypatch):
    """The bill in one go, and that of every step."""
    monkeypatch.setattr(steps, "WALKED", 6)  # enough for peaks that lie at the end of these
    steps._known.clear()
    at_once = nacre.cost(model, x)
    assert any(bill is not None for bill in steps._known.values())
    with monkeypatch.context() as patch:
        patch.setattr(steps, "WALKED", 1000)
        return at_once, nacre.cost(model, x)


def work(of):
    """What ran, without views, whose number is autograd's affair, and without how far its tensors lay."""
    found = Counter()
    for one, count in of.items():
        found[replace(one, distances=(), fresh=0)] += count * (one.kind != VIEW)
    return +found


@pytest.mark.parametrize(
    ("recurrence", "result"),
    [
        (nn.GRU(3, 4), 0),
        (nn.GRU(3, 4, num_layers=2, batch_first=True), 1),
        (nn.RNN(3, 4, bidirectional=True), 1),
        (nn.LSTM(3, 4, bias=False).double(), 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_the_bill_in_one_go_is_that_of_every_step(recurrence, result, monkeypatch):
    dtype = next(recurrence.parameters()).dtype
    model = Reads(recurrence, result).to(dtype)
    x = torch.zeros((2, 10, 3) if recurrence.batch_first else (10, 2, 3), dtype=dtype)
    at_once, walked = bills(model, x, monkeypatch)
    assert at_once.total == walked.total
    assert at_once.peak_bytes == walked.peak_bytes
    for one, other in zip(at_once.rows, walked.rows, strict=True):
        assert one.outputs == other.outputs
        assert work(one.forward_work) == work(other.forward_work)
        if not recurrence.batch_first:  # its input's gradient may lie otherwise in memory, and is copied then
            assert work(one.backward_work) == work(other.backward_work)


def test_in_evaluation_and_frozen(monkeypatch):
    model, x = nn.GRU(3, 4).requires_grad_(False), torch.zeros(10, 2, 3)
    at_once, walked = bills(model, x, monkeypatch)
    assert at_once.total == walked.total and at_once.saved_bytes == 0
    asking = x.requires_grad_()
    at_once, walked = bills(model, asking, monkeypatch)
    assert at_once.total == walked.total and at_once.peak_bytes == walked.peak_bytes and at_once.backward_flops > 0


def test_a_recurrence_that_runs_again_in_the_backward(monkeypatch):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.recurrence = nn.RNN(3, 4)

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.recurrence, x, use_reentrant=False)[0]

    at_once, walked = bills(Checkpointed(), torch.zeros(13, 2, 3, requires_grad=True), monkeypatch)
    assert at_once.flops == walked.flops and at_once.backward_flops == walked.backward_flops


def test_steps_that_differ_are_watched():
    """Three bills that do not lie on one line give none for more steps."""
    runs = [steps._Bill({"flops": flops}, Counter({steps.Work(flops=1): count})) for flops, count in ((1, 3), (2, 4))]
    last = steps._Bill({"flops": 3}, Counter({steps.Work(flops=1): 5}))
    found = steps._continued([*runs, last], steps.WALKED + 5)
    assert found is not None and found.numbers == {"flops": 6} and found.work == {steps.Work(flops=1): 8}
    assert steps._continued([*runs, replace(last, numbers={"flops": 4})], 20) is None
    assert steps._continued([*runs, replace(last, kept=(1,))], 20) is None
    assert steps._continued([*runs, replace(last, work=Counter({steps.Work(flops=1): 9}))], 20) is None
    assert steps._continued(runs, 20) is None
