"""`diffiqa.bench`: what `iqa-bench` does, as one function."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import DiffiqaError, UsageError
from ..runtime.backends import Backend, OnnxRuntime, OpenVino
from .contenders import peers_for
from .pictures import Size
from .results import Results
from .run import Run, Wanted


def bench(
    engine: str | Path,
    images: Sequence[str | Path] = (),
    backend: Backend | None = None,
    *,
    sizes: Sequence[Size] = (),
    count: int | None = None,
    crops: Sequence[int] = (),
    steps: Sequence[int] = (),
    workers: Sequence[int] = (1,),
    batches: Sequence[int] = (1,),
    rounds: int = 10,
    starts: int = 3,
    soak: int = 0,
    seed: int = 0,
    peers: bool | Sequence[str] = False,
    ckpt: Path | None = None,
    peer_timeout: float = 900.0,
    say: Callable[[str], None] = lambda _text: None,
    keep: Callable[[Results], object] = lambda _results: None,
) -> Results:
    """Measure how fast this machine scores images with an engine.

        results = diffiqa.bench("engine/", backend=diffiqa.OnnxRuntime(threads=2), crops=[1, 9], rounds=5)

    Without `images`, `count` seeded pictures of each of `sizes` (height, width) are made. Every combination of `sizes`,
    `crops`, `steps`, `workers` and `batches` is a case. `peers` adds what else could score the same images: True for
    all of them, or their names; those in PyTorch need `ckpt`, the weights that the engine was exported from.

    `keep` receives the results once, also where an error or Ctrl-C ends the run early: then before the exception goes
    on, with what was measured until then. `say` is told what is being done.
    """
    backend = backend or OnnxRuntime()
    if images and (sizes or count):
        raise UsageError("sizes and count are of generated images; leave them out, or the images")
    if not all(str(image) for image in images):
        raise UsageError("an image name is empty: an unset variable?")
    if ckpt and not ckpt.is_file():
        raise UsageError(f"the checkpoint {ckpt} is not a file")
    if tuple(batches) != (1,) and not backend.on_gpu:
        raise UsageError(f"batches are for a GPU: {backend.key} scores crops one at a time")
    contenders = peers_for(backend.key, () if isinstance(peers, bool) else peers) if peers else ()
    if contenders and isinstance(backend, OpenVino) and backend.precision != "fp32":
        raise UsageError("peers are compared with float32 scores: measure OpenVINO in fp32, or leave out the peers")
    wanted = Wanted(
        Path(engine),
        tuple(map(str, images)),
        sizes=tuple(sizes) or Wanted.sizes,
        count=count or Wanted.count,
        crops=tuple(crops),
        steps=tuple(steps),
        workers=tuple(workers),
        batches=tuple(batches),
        rounds=rounds,
        starts=starts,
        soak=soak,
        seed=seed,
        backend=backend,
        contenders=contenders,
        ckpt=ckpt,
        timeout=peer_timeout,
    )
    run = Run(wanted, _shown(wanted), progress=say)
    try:
        run.run()
    except (KeyboardInterrupt, DiffiqaError) as exc:
        results = run.results(interrupted=True)
        if results.measured or isinstance(exc, KeyboardInterrupt):
            keep(results)
        raise
    results = run.results()
    keep(results)
    return results


def _shown(wanted: Wanted) -> dict[str, str]:
    """Return what was asked for, as the results record it."""
    shown = {f.name: getattr(wanted, f.name) for f in dataclasses.fields(wanted)}
    shown["contenders"] = [contender.name for contender in wanted.contenders]
    return {name: str(value) for name, value in shown.items() if value not in (None, (), [])}
