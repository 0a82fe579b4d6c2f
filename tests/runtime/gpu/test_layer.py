"""What `CudaLayer` asks of the driver for CUDA graphs: whatever fails, each is destroyed once and no capture stays.

The driver here keeps accounts, no more. What a real one makes of these calls is for test_device_gpu.py.
"""

# ruff: noqa: N802, N815 — the names are the driver's

from collections.abc import Callable
from typing import Any

import pytest

from diffiqa.errors import BackendError
from diffiqa.kernels.launch import Launch
from diffiqa.runtime.gpu.cuda import CudaLayer

cuda = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed", exc_type=ImportError)

OK, REFUSED = cuda.CUresult.CUDA_SUCCESS, cuda.CUresult.CUDA_ERROR_NOT_SUPPORTED
PROGRESS = 4096


class Driver:
    """Structures and constants are the real ones. `refused` names a call that fails; `spoilt` captures end so."""

    def __init__(self, refused: str = "") -> None:
        self.refused, self.spoilt, self.capturing = refused, False, False
        self.alive: list[int] = []  # graphs and executable graphs
        self.made = 0
        self.nodes: list[tuple[str, int, Any]] = []  # kind, graph, and what was added

    def __getattr__(self, name: str) -> Any:
        return getattr(cuda, name)

    def cuStreamBeginCapture(self, stream: Any, mode: Any) -> tuple[Any]:
        assert not self.capturing
        assert mode == cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self.capturing = self.refused != "cuStreamBeginCapture"
        return (OK if self.capturing else REFUSED,)

    def cuStreamEndCapture(self, stream: Any) -> tuple[Any, Any]:
        spoilt, self.spoilt = self.spoilt or not self.capturing, False
        self.capturing = False
        return (REFUSED, None) if spoilt else self._make("cuStreamEndCapture", cuda.CUgraph)

    def cuGraphCreate(self, flags: int) -> tuple[Any, Any]:
        return self._make("cuGraphCreate", cuda.CUgraph)

    def cuGraphInstantiate(self, graph: Any, flags: int) -> tuple[Any, Any]:
        assert int(graph) in self.alive
        return self._make("cuGraphInstantiate", cuda.CUgraphExec)

    def cuGraphDestroy(self, graph: Any) -> tuple[Any]:
        self.alive.remove(int(graph))
        return (OK,)

    cuGraphExecDestroy = cuGraphDestroy

    def cuGraphConditionalHandleCreate(self, graph: Any, context: Any, default: int, flags: int) -> tuple[Any, Any]:
        assert (default, flags) == (1, cuda.CU_GRAPH_COND_ASSIGN_DEFAULT)
        return (REFUSED if self.refused == "cuGraphConditionalHandleCreate" else OK), cuda.CUgraphConditionalHandle(99)

    def cuGraphAddChildGraphNode(self, graph: Any, before: Any, count: int, child: Any) -> tuple[Any, Any]:
        assert int(child) in self.alive
        self.nodes.append(("child", int(graph), int(child)))
        return (REFUSED if self.refused == "cuGraphAddChildGraphNode" else OK), cuda.CUgraphNode(len(self.nodes))

    def cuGraphAddNode(self, graph: Any, before: Any, edges: Any, count: int, node: Any) -> tuple[Any, Any]:
        assert count == len(before)
        self.nodes.append(("while", int(graph), int(node.conditional.handle)))
        assert node.type == cuda.CUgraphNodeType.CU_GRAPH_NODE_TYPE_CONDITIONAL
        assert node.conditional.type == cuda.CUgraphConditionalNodeType.CU_GRAPH_COND_TYPE_WHILE
        assert (node.conditional.size, int(node.conditional.ctx)) == (1, 77)
        return (REFUSED if self.refused == "cuGraphAddNode" else OK), cuda.CUgraphNode(len(self.nodes))

    def _make(self, name: str, kind: Any) -> tuple[Any, Any]:
        if name == self.refused:
            return REFUSED, None
        self.made += 1
        self.alive.append(self.made)
        return OK, kind(self.made)


class Context:
    handle = cuda.CUcontext(77)


class Stream:
    handle, context = cuda.CUstream(1), Context()

    def sync(self) -> None: ...


def layer_on(driver: Driver) -> tuple[CudaLayer, list[tuple[bool, Launch]]]:
    """Return a layer without what needs a GPU, and its launches, each with whether it was captured."""
    layer, launched = object.__new__(CudaLayer), []
    layer.name, layer._capturing = "GPU", False
    layer._driver, layer._stream = driver, Stream()
    layer._enqueue = lambda launch, stream: launched.append((driver.capturing, launch))
    return layer, launched


def nothing() -> None: ...


def test_a_captured_graph_is_one_executable_until_it_is_closed() -> None:
    driver = Driver()
    layer, _ = layer_on(driver)
    layer.begin_capture()
    graph = layer.end_capture()
    assert driver.alive == [2]
    graph.close()
    assert driver.alive == []


def test_a_loop_is_what_begins_it_and_a_node_around_one_step_that_sets_its_condition() -> None:
    driver = Driver()
    layer, launched = layer_on(driver)
    steps: list[bool] = []
    graph = layer.capture_loop(nothing, lambda: steps.append(driver.capturing), PROGRESS)
    assert steps == [True]
    whole, begin, step = 1, 2, 3
    assert [(kind, what) for kind, _, what in driver.nodes] == [("child", begin), ("while", 99), ("child", step)]
    assert [graph for _, graph, _ in driver.nodes[:2]] == [whole, whole]
    # Loaded by a launch that sets nothing, then captured with the condition.
    assert [(captured, *map(int, launch.arguments)) for captured, launch in launched] == [
        (False, PROGRESS, 0),
        (True, PROGRESS, 99),
    ]
    graph.close()
    assert driver.alive == []


@pytest.mark.parametrize(
    "refused",
    [
        "cuGraphCreate",
        "cuGraphConditionalHandleCreate",
        "cuStreamBeginCapture",
        "cuStreamEndCapture",
        "cuGraphAddChildGraphNode",
        "cuGraphAddNode",
        "cuGraphInstantiate",
    ],
)
def test_a_loop_that_is_refused_leaves_nothing_behind(refused: str) -> None:
    driver = Driver(refused)
    layer, _ = layer_on(driver)
    with pytest.raises(BackendError, match="GPU cannot capture"):
        layer.capture_loop(nothing, nothing, PROGRESS)
    layer.abandon_capture()
    assert driver.alive == []
    assert not driver.capturing


@pytest.mark.parametrize("spoils", [False, True], ids=["the capture holds", "the capture is spoilt"])
@pytest.mark.parametrize("where", ["alone", "begin", "step"])
@pytest.mark.parametrize("error", [BackendError("engine unet failed"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_what_fails_while_capturing_leaves_nothing_behind(spoils: bool, where: str, error: BaseException) -> None:
    driver = Driver()
    layer, _ = layer_on(driver)

    def fail() -> None:
        driver.spoilt = spoils
        raise error

    def alone() -> None:
        layer.begin_capture()
        fail()

    captures: dict[str, Callable[[], object]] = {
        "alone": alone,
        "begin": lambda: layer.capture_loop(fail, nothing, PROGRESS),
        "step": lambda: layer.capture_loop(nothing, fail, PROGRESS),
    }
    with pytest.raises(type(error)):
        captures[where]()
    layer.abandon_capture()
    assert driver.alive == []
    assert not driver.capturing
    layer.begin_capture()
    layer.end_capture().close()
    assert driver.alive == []
