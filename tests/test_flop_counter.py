"""torch's own FLOP counter finds in nacre's ops what the bills say."""

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import nacre
from nacre.blocks import BLOCKS
from nacre.layers import LAYERS
from tests.support import build, fresh, tensors

CASES = [
    pytest.param(spec, case, id=f"{spec.name}-{case.name}")
    for spec in (*LAYERS.values(), *BLOCKS.values())
    if spec.name in ("linear", "conv2d", "attention", "lstm", "gru", "linear_cross_entropy", "transformer_block")
    for case in spec.cases
    # of a grouped convolution that is left to torch, torch counts the backward as if it had fewer groups
    if not case.bench and not (spec.name == "conv2d" and case.arguments.get("groups", 1) > 1)
]


@pytest.mark.parametrize(("spec", "case"), CASES)
def test_the_bill_and_torchs_counter_agree(spec, case):
    layer = build(spec, case, torch.float32)
    inputs, keywords = case.make(torch.float32)
    inputs, keywords = fresh(inputs), fresh(keywords)
    bill = spec.cost(**spec.sizes(layer, *inputs, **keywords))
    with FlopCounterMode(display=False) as counter:
        output = layer(*inputs, **keywords)
    assert counter.get_total_flops() == bill.flops
    results = [t for t in tensors(output) if t.requires_grad]
    if results:
        wanted = [t for t in tensors((inputs, keywords)) if t.requires_grad]
        wanted += [p for p in layer.parameters() if p.requires_grad]
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(results, wanted, [torch.ones_like(t) for t in results], allow_unused=True)
        assert counter.get_total_flops() == bill.backward_flops


def test_modules_are_told_apart():
    model = torch.nn.Sequential(nacre.Linear(4, 6), nacre.Linear(6, 2))
    with FlopCounterMode(display=False) as counter:
        model(torch.ones(3, 4)).sum().backward()
    counted = {name: sum(flops.values()) for name, flops in counter.get_flop_counts().items()}
    # the first layer's input has no gradient
    assert counted["Sequential.0"] == 2 * 2 * 3 * 4 * 6 and counted["Sequential.1"] == 3 * 2 * 3 * 6 * 2


def test_the_counter_is_imported_afterwards():
    code = """
import sys, torch, nacre
assert "torch.utils.flop_counter" not in sys.modules
import torch.utils.flop_counter
with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
    torch.ops.nacre.linear(torch.ones(3, 4), torch.ones(5, 4), None)
print(counter.get_total_flops())
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(process.stdout) == 2 * 3 * 4 * 5
