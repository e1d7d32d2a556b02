"""The examples run, and what they show is true."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
CUSTOM_LAYER = ROOT / "examples" / "custom_layer.py"


def test_custom_layer_runs_as_a_script():
    paths = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    finished = subprocess.run(
        [sys.executable, "-W", "error", str(CUSTOM_LAYER)],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert "HandWrittenLayerNorm: ok, right gradients of input 0, weight, bias, second order too" in finished.stdout
    assert "off by a factor of 2.0" in finished.stdout


def test_custom_layers_are_right_and_the_planted_mistakes_are_found():
    example = runpy.run_path(str(CUSTOM_LAYER))
    right = example["check_right_layers"]()
    assert [report.name for report in right] == [
        f"{kind}{layer}" for layer in ("Linear", "LayerNorm", "Dropout") for kind in ("Plain", "HandWritten")
    ]
    assert all(right), [str(report) for report in right if not report]
    compared = [{result.comparison for result in report.results} for report in right]
    assert compared == [{"finite differences"}, {"finite differences", "reference"}] * 3

    doubled, forgetful = example["check_wrong_layers"]()
    (weight,) = doubled.failures
    assert (weight.name, weight.hint) == ("weight", "off by a factor of 2.0")
    (x,) = forgetful.failures
    assert x.name == "input 0"
    assert "the same all along dimension 1: a mean or a sum over it is forgotten" in x.hint
