"""`diffiqa.bench`: what `iqa-bench` does, as one function."""

import contextlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import DiffiqaError, UsageError
from ..runtime.backends import Backend, OnnxRuntime, OpenVino
from ..runtime.inputs import Images, find_images, names_of
from ..runtime.results import Options
from .contenders import peers_for
from .results import Results
from .run import Run
from .workload import Size, Workload, generate, in_batches, sort_by_size


def bench(
    engine: str | Path,
    images: Images = (),
    backend: Backend | None = None,
    *,
    sizes: Sequence[Size] = (),
    count: int | None = None,
    crops: Sequence[int] = (),
    steps: Sequence[int] = (),
    fast: bool = False,
    workers: Sequence[int] = (1,),
    batches: Sequence[int] = (1,),
    rounds: int = 10,
    starts: int = 3,
    soak: int = 0,
    seed: int = 0,
    peers: bool | Sequence[str] = False,
    ckpt: str | Path | None = None,
    peer_timeout: float = 900.0,
    say: Callable[[str], None] = lambda _text: None,
    keep: Callable[[Results], object] = lambda _results: None,
) -> Results:
    """Measure how fast this machine scores images with an engine.

        results = diffiqa.bench("engine/", backend=diffiqa.OnnxRuntime(threads=2), crops=[1, 9], rounds=5)

    Without `images` it makes seeded pictures: `count` of each of `sizes`, which are pairs of height and width. The
    default is two pictures of 224×224. Every combination of size, `crops`, `steps`, `workers` and `batches` is a case;
    empty `crops` and `steps` are the engine's own. `fast` adds cases with the engine's fast sampling. After the cases
    it scores `soak` images in a row. `peers` adds other ways to score the same images: True for all of them, or their
    names. Those in PyTorch need `ckpt`, the weights that the engine was exported from.

    `say` is told what is being done. `keep` receives the results once. If Ctrl-C or one of our errors ends the run
    after something was measured, `keep` receives that much before the exception goes on.
    """
    backend = backend or OnnxRuntime()
    if images and (sizes or count):
        raise UsageError("sizes and count are of generated images; leave them out, or the images")
    names = names_of(images)
    ckpt = Path(ckpt) if ckpt else None
    if not all(names):
        raise UsageError("an image name is empty: an unset variable?")
    if ckpt and not ckpt.is_file():
        raise UsageError(f"the checkpoint {ckpt} is not a file")
    if tuple(batches) != (1,) and not backend.on_gpu:
        raise UsageError(f"batches are for a GPU: {backend.key} scores crops one at a time")
    contenders = peers_for(backend.key, () if isinstance(peers, bool) else peers) if peers else ()
    _refuse_unlike(backend, fast=fast, steps=bool(steps), peers=bool(peers))

    sizes, count = tuple(sizes) or ((224, 224),), count or 2
    options = {
        "engine": Path(engine),
        "images": tuple(names),
        "sizes": sizes,
        "count": count,
        "crops": tuple(crops),
        "steps": tuple(steps),
        "fast": fast or None,
        "workers": tuple(workers),
        "batches": tuple(batches),
        "rounds": rounds,
        "starts": starts,
        "soak": soak,
        "seed": seed,
        "backend": backend,
        "contenders": [contender.name for contender in contenders],
        "ckpt": ckpt,
        "timeout": peer_timeout,
    }
    shown = {name: str(value) for name, value in options.items() if value not in (None, (), [])}
    run = Run(Path(engine), backend, shown, say)
    m, crop = run.directory.manifest, run.directory.manifest.crop.size
    ways = [Options(seed=seed, steps=n) for n in steps or (None,)] + [Options(seed=seed, fast=True)] * fast
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.closing(run):
            if images:
                say("reading images")
                found = sort_by_size(find_images(names), m)
            elif small := next((size for size in sizes if min(size) < crop), None):
                raise UsageError(
                    f"images of {small[1]}×{small[0]} are smaller than a crop of this engine, {crop}×{crop}"
                )
            else:
                found = generate(Path(folder), sizes, count, seed)
            workloads = [
                Workload(
                    images=in_batches(files, batch) if backend.on_gpu else tuple(files),
                    height=height,
                    width=width,
                    options=replace(way, crops=crops_),
                    workers=workers_,
                    batch=batch,
                )
                for (height, width), files in found.by_size.items()
                for crops_ in crops or (m.crop.count,)
                for way in ways
                for workers_ in workers
                for batch in batches
            ]
            run.prepare(workloads, found.left_out)
            run.measure_starts(starts)
            run.measure_cases(rounds)
            if soak:
                run.measure_soak(soak)
            if contenders:
                run.measure_peers(contenders, ckpt, rounds, peer_timeout)
    except (KeyboardInterrupt, DiffiqaError) as exc:
        results = run.results(interrupted=True)
        if results.measured or isinstance(exc, KeyboardInterrupt):
            keep(results)
        raise
    results = run.results()
    keep(results)
    return results


def _refuse_unlike(backend: Backend, *, fast: bool, steps: bool, peers: bool) -> None:
    """Refuse to measure side by side what does not compute the same."""
    if fast and (steps or peers):
        raise UsageError("fast has steps of its own, which no peer takes: leave out steps and peers")
    if peers and isinstance(backend, OpenVino) and backend.precision != "fp32":
        raise UsageError("peers are compared with float32 scores: measure OpenVINO in fp32, or leave out the peers")
