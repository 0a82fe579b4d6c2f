"""The Python API, and the promise that a score depends on pixels, engine, seed and options alone."""

import concurrent.futures
import contextlib
import dataclasses
import io
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import diffiqa
from diffiqa import Failure, ImageError, Mode, Options, Score, Scorer, UsageError
from diffiqa.engine.manifest import open_engine
from diffiqa.engine.monotone import Monotone
from diffiqa.engine.pixels import to_plane
from diffiqa.engine.sampling import Fast, choose_sampling
from diffiqa.engine.schedule import Kind
from diffiqa.errors import BackendError
from diffiqa.runtime import scorer as scorer_module
from diffiqa.runtime.executor import Cancelled
from diffiqa.runtime.host.onnx_stage import OnnxRuntime
from diffiqa.runtime.results import Picture
from diffiqa.runtime.scorer import load

from ..tiny import photo


def saved(picture: Picture, path: Path) -> Path:
    Image.fromarray(picture).save(path)
    return path


def same(a: Score | Failure, b: Score | Failure) -> bool:
    """Whether two results are bit for bit the same, apart from name and time."""
    assert isinstance(a, Score)
    assert isinstance(b, Score)
    return (a.score, a.vcg, a.vda, a.spread, a.crops, a.digest) == (b.score, b.vcg, b.vda, b.spread, b.crops, b.digest)


def test_scores_a_path_bytes_a_pillow_image_and_an_array_alike(scorer: Scorer, tmp_path: Path) -> None:
    picture = photo(1, 40, 50)
    path = saved(picture, tmp_path / "a.png")
    results = scorer.score([path, str(path), path.read_bytes(), Image.open(path), picture])
    assert all(same(results[0], other) for other in results[1:])
    assert [r.source for r in results[:2]] == [str(path)] * 2
    assert results[2].source == "image 2"


def test_the_score_is_the_weighted_sum_of_the_branches_and_the_mean_over_crops(scorer: Scorer) -> None:
    result = scorer.score(photo(2, 64, 64), Options(crops=4))
    assert result.vcg is not None
    assert result.vda is not None
    assert result.score == pytest.approx(0.5 * result.vcg + 1.5 * result.vda, rel=1e-12)
    assert len(result.crops) == 4
    assert result.score == pytest.approx(statistics.fmean(crop.score for crop in result.crops), rel=1e-12)
    assert len({crop.score for crop in result.crops}) == 4


def test_several_seeds_are_averaged_and_their_spread_is_told(scorer: Scorer) -> None:
    picture = photo(3, 40, 40)
    singles = [scorer.score(picture, Options(seed=seed)) for seed in (5, 6, 7)]
    several = scorer.score(picture, Options(seed=5, seeds=3))
    assert len({single.score for single in singles}) == 3
    assert several.score == pytest.approx(statistics.fmean(single.score for single in singles), rel=1e-12)
    assert several.spread == pytest.approx(statistics.stdev(single.score for single in singles), rel=1e-12)
    assert several.seeds == (5, 6, 7)
    assert singles[0].spread is None


def test_file_formats_that_keep_pixels_give_the_same_score(scorer: Scorer, tmp_path: Path) -> None:
    picture = photo(4, 40, 36)
    results = scorer.score([saved(picture, tmp_path / f"a.{suffix}") for suffix in ("png", "bmp", "tiff")])
    assert all(same(results[0], other) for other in results[1:])


@pytest.mark.parametrize("seed", [11, 12])
def test_neither_order_nor_company_nor_workers_change_a_score(scorer: Scorer, seed: int) -> None:
    shapes = [(32, 32), (40, 52), (33, 70), (40, 52), (64, 64)]
    pictures = [photo(seed * 100 + i, *shape) for i, shape in enumerate(shapes)]
    alone = [scorer.score(picture) for picture in pictures]
    order = list(range(len(pictures)))
    random.Random(seed).shuffle(order)  # noqa: S311 — an order, not a secret
    for workers in (1, 2, 3):
        together = list(scorer.stream((pictures[i] for i in order), workers=workers, ahead=2))
        assert all(same(together[place], alone[i]) for place, i in enumerate(order))


def test_threads_may_share_a_scorer(scorer: Scorer) -> None:
    pictures = [photo(20 + i, 32 + 4 * (i % 3), 48) for i in range(12)]
    alone = [scorer.score(picture) for picture in pictures]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        together = list(pool.map(scorer.score, pictures))
    assert all(same(a, b) for a, b in zip(alone, together, strict=True))


def test_the_number_of_threads_does_not_change_a_score(tiny_engine: Path, scorer: Scorer) -> None:
    picture = photo(31, 64, 80)
    for threads in (1, 2):
        with load(tiny_engine, OnnxRuntime(threads=threads)) as other:
            assert same(other.score(picture), scorer.score(picture))


def test_floats_in_zero_to_one_score_as_the_pixels_they_stand_for(scorer: Scorer) -> None:
    picture = photo(5, 40, 40)
    floats = scorer.score(picture.astype(np.float64) / 255)
    assert floats.score == pytest.approx(scorer.score(picture).score, abs=1e-6)  # /255 in float64, rounded once more


def test_a_bad_image_in_a_stream_is_a_failure_and_the_rest_goes_on(scorer: Scorer, tmp_path: Path) -> None:
    good = saved(photo(6, 32, 32), tmp_path / "good.png")
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"not an image")
    results = list(scorer.stream([good, bad, tmp_path / "missing.png", good]))
    assert [type(r) for r in results] == [Score, Failure, Failure, Score]
    assert isinstance(results[1], Failure)
    assert results[1].source == str(bad)
    assert "bad.png" in results[1].error
    assert same(results[0], results[3])


def test_a_bad_image_raises_when_it_was_asked_for_by_itself(scorer: Scorer, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"missing\.png"):
        scorer.score(tmp_path / "missing.png")


def test_a_stream_holds_no_more_images_than_it_was_told(scorer: Scorer) -> None:
    taken = 0

    def endless() -> Iterator[Picture]:
        nonlocal taken
        while True:
            taken += 1
            yield photo(taken, 32, 32)

    with_two_ahead = scorer.stream(endless(), ahead=2)
    next(with_two_ahead)
    next(with_two_ahead)
    assert taken <= 2 + 2 + 2  # delivered, ahead, in work and the next
    with_two_ahead.close()


def test_pictures_show_planes_and_maps_of_the_whole_image(scorer: Scorer) -> None:
    picture = photo(7, 40, 48)
    result = scorer.score(picture, Options(crops=4), pictures=True)
    assert result.pictures is not None
    np.testing.assert_array_equal(result.pictures.planes[Kind.DIS], picture)
    assert {plane.shape for plane in result.pictures.planes.values()} == {(40, 48, 3)}
    assert list(result.pictures.planes) == [Kind.DIS, Kind.Y0, Kind.T1, Kind.T2]
    covered = np.isfinite(result.pictures.score_map)
    assert covered[:32, :32].all()
    assert (result.pictures.weight_map[covered] > 0).all()
    assert scorer.score(picture).pictures is None


def test_pictures_in_crop_mode_are_grey_where_nothing_was_restored(scorer: Scorer) -> None:
    result = scorer.score(photo(8, 100, 100), Options(crops=4, mode=Mode.CROP), pictures=True)
    assert result.pictures is not None
    assert (result.pictures.planes[Kind.Y0][40:60, 40:60] == 128).all()
    assert np.isnan(result.pictures.score_map[40:60, 40:60]).all()
    assert result.mode is Mode.CROP


def test_info_tells_what_runs_and_what_a_score_means(scorer: Scorer) -> None:
    info = scorer.info
    assert info.model == "tiny"
    assert info.score.higher_is_better
    assert info.score.minimum == 0
    assert (info.steps, info.taps.t1, info.taps.t2) == (6, 1, 3)
    assert info.backend.startswith("onnxruntime ")
    assert len(info.engine) == 16


def test_a_closed_scorer_refuses_to_score(tiny_engine: Path) -> None:
    with diffiqa.load(tiny_engine) as closing:
        closing.score(photo(1, 32, 32))
    with pytest.raises(UsageError, match="is closed"):
        closing.score(photo(1, 32, 32))


def test_one_pillow_image_may_be_in_a_list_twice(scorer: Scorer, tmp_path: Path) -> None:
    """Opened, it is not read yet: whoever asks first reads it, and two at once would read each other's bytes."""
    path, options = saved(photo(5, 200, 300), tmp_path / "a.png"), Options(crops=1, mode=Mode.CROP)
    expected = scorer.score(path, options)
    for _ in range(3):
        image, other = Image.open(path), Image.open(path)
        listed = scorer.score([image, image], options)
        streamed = list(scorer.stream([other] * 4, options))
        assert all(same(result, expected) for result in (*listed, *streamed))


def test_an_image_object_keeps_its_file_name(scorer: Scorer, tmp_path: Path) -> None:
    path = saved(photo(1, 32, 32), tmp_path / "named.png")
    with Image.open(path) as image:
        assert scorer.score(image).source == str(path)
    assert scorer.score(Image.open(io.BytesIO(path.read_bytes()))).source == "image 0"


def test_options_nothing_can_be_done_with_are_refused() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"crops": 0}, "crops must be between"),
        ({"seeds": 0}, "seeds must be between"),
        ({"seed": -1}, "seeds run from 0 to"),
        ({"seed": 2**64 - 1, "seeds": 2}, "seeds run from 0 to"),
        ({"crops": 2.5}, "crops must be a whole number, not 2.5"),
        ({"seed": "1"}, "seed must be a whole number, not '1'"),
        ({"mode": "nonsense"}, "mode must be one of whole, tile, crop, not 'nonsense'"),
        ({"pixel_budget": 5}, "pixel budget must be at least"),
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"steps": 2.5}, "steps must be a whole number, not 2.5"),
        ({"sampler": "euler"}, "a sampler is ancestral, ddim or ddim:ETA"),
        ({"sampler": "ddim:2"}, "eta must lie between 0 and 1, not 2"),
        ({"fast": True, "steps": 4}, "fast has steps and a sampler of its own"),
    ]
    for options, says in cases:
        with pytest.raises(UsageError, match=says):
            Options(**options)


def test_a_provider_that_is_not_installed_is_named(tiny_engine: Path) -> None:
    with pytest.raises(BackendError, match=r"has no MagicExecutionProvider; it has .*CPUExecutionProvider"):
        load(tiny_engine, OnnxRuntime(providers=["MagicExecutionProvider"]))


def test_a_mode_may_be_given_as_text(scorer: Scorer) -> None:
    picture = photo(9, 60, 60)
    as_text = scorer.score(picture, Options(mode="crop"))  # type: ignore[arg-type]
    assert as_text.mode is Mode.CROP
    assert same(as_text, scorer.score(picture, Options(mode=Mode.CROP)))


def test_all_steps_by_name_are_the_engines_own_and_others_say_what_they_are(scorer: Scorer) -> None:
    picture = photo(9, 60, 60)
    own = scorer.score(picture, Options(crops=1))
    assert same(scorer.score(picture, Options(crops=1, steps=6, sampler="ancestral")), own)
    assert own.notes == ()
    seen = {own.score}
    for options, note in (
        ({"steps": 4}, "4 of 6 steps, ancestral"),
        ({"steps": 4, "sampler": "ddim:0.5"}, "4 of 6 steps, ddim:0.5"),
        ({"sampler": "ddim"}, "6 of 6 steps, ddim"),
        ({"steps": 1, "sampler": "ddim"}, "1 of 6 steps, ddim"),
        ({"steps": 1, "sampler": "image+ddim"}, "1 of 6 steps, image+ddim"),
    ):
        score = scorer.score(picture, Options(crops=1, **options))
        assert score.notes == (note,)
        seen.add(score.score)
    assert len(seen) == 6


def test_fast_takes_its_steps_and_corrects_the_score_of_each_seed(tiny_engine: Path, scorer: Scorer) -> None:
    directory = open_engine(tiny_engine)
    plain = choose_sampling(scorer.manifest.schedule, scorer.manifest.taps, scorer.manifest.kinds, 4, None)
    shift = Monotone((0.0, 1.0), (0.5, 2.5), slope_beyond=1)
    manifest = dataclasses.replace(directory.manifest, fast=Fast(plain, shift, 40))
    picture = photo(9, 60, 60)
    with load(dataclasses.replace(directory, manifest=manifest)) as fast:
        quick = fast.score(picture, Options(crops=2, seeds=2, fast=True))
        assert same(fast.score(picture, Options(crops=2, seeds=2)), scorer.score(picture, Options(crops=2, seeds=2)))
    few = [scorer.score(picture, Options(crops=2, seed=seed, steps=4)).score for seed in (0, 1)]
    assert quick.score == pytest.approx(sum(map(shift, few)) / 2, abs=1e-12)
    assert quick.spread == pytest.approx(abs(shift(few[0]) - shift(few[1])) / 2**0.5, abs=1e-12)
    assert quick.notes == ("fast: 4 of 6 steps, the score corrected for it",)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (Options(steps=7), "7 steps are more than the 6"),
        (Options(steps=2), "2 of 6 steps cannot hold the noise levels"),
        (Options(fast=True), "no fast sampling yet; make one with: iqa-calibrate --engine DIR --calib IMAGES --steps"),
    ],
)
def test_steps_that_an_engine_cannot_take_are_refused_before_an_image_is_read(
    scorer: Scorer, options: Options, says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        scorer.stream(iter(["missing.png"]), options)
    with pytest.raises(UsageError, match=says):
        scorer.score(photo(1, 40, 40), options)


@pytest.mark.parametrize("settings", [{"threads": 0}, {"threads": "2"}, {"providers": []}, {"providers": "CPU"}])
def test_settings_onnxruntime_would_misread_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"^{next(iter(settings))} must be "):
        OnnxRuntime(**settings)


def test_one_image_is_no_stream(scorer: Scorer) -> None:
    with pytest.raises(UsageError, match="use score"):
        scorer.stream("photo.jpg")


def test_memory_that_runs_out_costs_one_image_only(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(3))

    def short_of_memory(pixels: Picture) -> Any:
        if next(calls) == 1:
            raise MemoryError
        return to_plane(pixels)

    monkeypatch.setattr(scorer_module, "to_plane", short_of_memory)
    results = list(scorer.stream([photo(i, 32, 32) for i in range(3)], ahead=1))
    assert [type(r) for r in results] == [Score, Failure, Score]
    assert isinstance(results[1], Failure)
    assert "not enough memory for 32×32 pixels" in results[1].error


def test_a_stream_that_is_given_up_ends_what_it_has_begun(scorer: Scorer) -> None:
    """Ctrl-C at a terminal must not wait for the image that is being scored."""
    executor = scorer._executor
    begun, told = threading.Event(), threading.Event()

    class SlowFromTheSecondOn:
        takes_pixels, together, queue_depth, calls = False, 1, 0, 0

        def run_together(self, tasks: Any, plan: Any, cancelled: Callable[[], bool], **more: Any) -> Any:
            assert executor is not None
            self.calls += 1
            if self.calls == 1:
                return executor.run_together(tasks, plan, cancelled, **more)
            begun.set()
            for _ in range(1000):
                if cancelled():
                    told.set()
                    raise Cancelled
                time.sleep(0.01)
            raise AssertionError("nobody said that the result is not wanted any more")

        def close(self) -> None:
            """Nothing to free."""

    slow = Scorer(scorer.manifest, SlowFromTheSecondOn(), backend="test")
    with contextlib.closing(slow.stream([photo(1, 40, 40), photo(2, 40, 40)])) as results:
        assert isinstance(next(results), Score)
        assert begun.wait(10)
    assert told.is_set()
