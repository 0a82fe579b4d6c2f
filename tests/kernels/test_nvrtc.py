"""Every kernel compiles for every GPU we name, with no spills. NVRTC needs no GPU and no driver."""

import io
import re
from typing import Any

import pytest

from diffiqa.kernels.compile import OPTIONS, SOURCES, KernelError, Unit, compile_nvrtc, nvrtc_version, read_unit

from .devices import probes

ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
KERNELS = {
    "images.cu": ["gather_crops_f16", "gather_crops_f32", "normalise_pad_f16", "normalise_pad_f32"],
    "sampler.cu": ["noise_init_f16", "noise_init_f32", "sampler_step_f16", "sampler_step_f32"],
}
# 256 threads of 64 registers: four blocks on any of these GPUs, enough to keep its memory busy.
MAX_REGISTERS = 64


@pytest.fixture(scope="module", autouse=True)
def _compiler() -> None:
    try:
        nvrtc_version()
    except KernelError as reason:
        pytest.skip(str(reason))


def verbose(unit: Unit) -> tuple[bytes, str]:
    """Compile with ptxas' report of resources."""
    options: Any = (*unit.options, ("ptxas_options", "-v"))
    log = io.StringIO()
    return compile_nvrtc(Unit(unit.name, unit.text, unit.arch, options), log), log.getvalue()


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_compiles_without_warnings_spills_or_stack(source: str, arch: str) -> None:
    code, log = verbose(read_unit(source, arch))
    assert code.startswith(b"\x7fELF")
    assert "warning" not in log
    kernels = re.findall(r"Compiling entry function '(\w+)'", log)
    assert sorted(kernels) == KERNELS[source]
    resources = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert resources == [("0", "0", "0")] * len(kernels)
    assert max(int(count) for count in re.findall(r"Used (\d+) registers", log)) <= MAX_REGISTERS


@pytest.mark.parametrize("arch", [ARCHITECTURES[0], ARCHITECTURES[-1]])
def test_probes_of_the_gpu_tests_compile(arch: str) -> None:
    code, log = verbose(probes(arch))
    assert code.startswith(b"\x7fELF")
    assert "warning" not in log


def test_same_input_gives_the_same_cubin() -> None:
    unit = read_unit("sampler.cu", "sm_90")
    assert compile_nvrtc(unit) == compile_nvrtc(unit)


def test_contraction_is_off() -> None:
    text = 'extern "C" __global__ void k(float* x) { x[0] = x[1] * x[2] + x[3]; }'
    by_default, as_ours = (compile_nvrtc(Unit("t.cu", text, "sm_90", options)) for options in ((), OPTIONS))
    assert by_default != as_ours


@pytest.mark.parametrize(
    ("text", "arch", "says"),
    [("int x = ;", "sm_90", r"t\.cu\(1\): error: expected an expression"), ("", "sm_1", "gpu-architecture")],
    ids=["source", "arch"],
)
def test_refusal_is_a_kernel_error_with_the_compilers_words(text: str, arch: str, says: str) -> None:
    with pytest.raises(KernelError, match=says):
        compile_nvrtc(Unit("t.cu", text, arch, ()))
