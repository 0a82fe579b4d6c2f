"""`benchmarks/kernel_rates.py`, as far as it goes without a GPU: what is launched, how often, and what that moves."""

import ctypes
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from diffiqa import cli
from diffiqa.errors import BackendError
from diffiqa.runtime.tensorrt import device_capability, gpu_capability

from ..fake_device import FakeLayer

SCRIPT = Path(cli.__file__).parent / "benchmarks" / "kernel_rates.py"


def test_every_kernel_is_timed_as_a_graph_of_many_launches(
    library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    script, layer = importlib.import_module("kernel_rates"), FakeLayer(library)
    rows = {row["kernel"]: row for row in script.measure(layer, 2, 40, 48, crop=32)}
    pixels, cut = 2 * 3 * 40 * 48, 2 * 3 * 32 * 32
    assert {name: row["bytes"] for name, row in rows.items()} == {
        "noise_init_f32": 4 * pixels,
        "sampler_step_f32": 12 * pixels,  # state and noise read, state written
        "normalise_pad_f32": 5 * pixels // 2,  # one image
        "gather_crops_f32": 8 * cut,
        "noise_init_f16": 6 * pixels,
        "sampler_step_f16": 12 * pixels,  # the noise is half as much, and the state is also written as half
        "normalise_pad_f16": 3 * pixels // 2,
        "gather_crops_f16": 6 * cut,
    }
    assert all(len(row["seconds"]) == script.ROUNDS and row["gb_per_second"] > 0 for row in rows.values())
    assert len(layer.graphs) == len(rows)
    assert all(len(graph.work) == script.LAUNCHES for graph in layer.graphs)
    assert layer.alive == 0


def test_without_a_gpu_it_says_what_is_missing() -> None:
    if device_capability() is not None:
        pytest.skip("there is a GPU")
    with pytest.raises(BackendError) as missing:
        gpu_capability(0)
    found = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert found.stderr.strip() == f"error: {missing.value}"
