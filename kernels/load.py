"""Loads compiled kernels onto the current GPU, through `cuda.core` or as a guest in a PyCUDA program.

Both give a function `enqueue(launch, stream)`. Its first launch of a source loads the code, which a capture does not
allow. The function keeps the code alive; a captured graph does not.
"""

import functools
from collections.abc import Callable
from typing import Any

from .compile import SOURCES, KernelError, cubin
from .launch import Launch

Enqueue = Callable[[Launch, Any], None]


def device_arch() -> str:
    """Return the architecture of the current GPU, such as "sm_90"."""
    core = _import_cuda_core()
    return f"sm_{core.Device().arch}"


def compiled(arch: str) -> dict[str, bytes]:
    """Return the cubin of every source for `arch`."""
    return {source: cubin(source, arch) for source in SOURCES}


def with_cuda_core(cubins: dict[str, bytes]) -> Enqueue:
    """Load `cubins` into the current device's context. Streams are cuda.core's, or its graph builders'."""
    core = _import_cuda_core()
    modules = {source: core.ObjectCode.from_cubin(code, name=source) for source, code in cubins.items()}

    @functools.cache
    def kernel(source: str, name: str) -> Any:
        return modules[source].get_kernel(name)

    def enqueue(launch: Launch, stream: Any) -> None:
        config = core.LaunchConfig(grid=launch.grid, block=launch.block)
        core.launch(stream, config, kernel(launch.source, launch.kernel), *launch.arguments)

    return enqueue


def with_pycuda(cubins: dict[str, bytes]) -> Enqueue:
    """Load `cubins` into PyCUDA's current context. Streams are `pycuda.driver.Stream`s."""
    try:
        from pycuda import driver
    except ImportError as exc:
        raise KernelError(f"PyCUDA is not there: pip install pycuda ({exc})") from exc

    @functools.cache
    def module(source: str) -> Any:
        return driver.module_from_buffer(cubins[source])

    @functools.cache
    def kernel(source: str, name: str) -> Any:
        return module(source).get_function(name)

    def enqueue(launch: Launch, stream: Any) -> None:
        function = kernel(launch.source, launch.kernel)
        function(*launch.arguments, grid=launch.grid, block=(launch.block, 1, 1), stream=stream)

    return enqueue


def _import_cuda_core() -> Any:
    try:
        import cuda.core
    except ImportError as exc:
        raise KernelError(f"cuda.core is not there: pip install cuda-core cuda-bindings ({exc})") from exc
    return cuda.core
