"""The self-test of an engine: does this machine, with this library and this build, give the model's answers?

`self-test.json`, beside the manifest, has a few small pictures, what the float32 model in PyTorch answered to them in
few steps (of an engine in 8 bits: the engine itself), and how far each precision may be from that.
`export/selftest.py` writes it.
"""

import base64
import binascii
import contextlib
import hashlib
import json
import math
import platform
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ..engine.atomic import replacing
from ..engine.codec import decode, encode
from ..engine.manifest import MANIFEST, EngineDirectory, Manifest, open_engine
from ..engine.schedule import Kind
from ..engine.seal import state_folder
from ..errors import BackendError, EngineError, ImageError, first_line
from .backends import Backend
from .images import DEFAULT_MAX_PIXELS, Image, read_for
from .inductor import cpu_target
from .results import Options, Score
from .scorer import Scorer, load

SELF_TEST = "self-test.json"
SCHEMA = 1
MAX_BYTES = 2**20
MAX_PIXELS = 2**21
# The first picture is always scored. Others are left out once this time has passed: a run must start soon.
SECONDS = 5.0
_LOW = re.compile(r"\b(fp16|bf16|int8|fp8)\b")


@dataclass(frozen=True)
class Picture:
    """A picture, as a PNG file in base64, and what the model answers to it."""

    png: str
    answers: dict[str, float]


@dataclass(frozen=True)
class SelfTest:
    """What `self-test.json` holds."""

    schema: int
    engine: str  # the id of the engine that it tests
    steps: int | None  # that pictures are restored in; None: the engine restores nothing
    span: float  # the range of scores, which the tolerances of scores are shares of
    tolerances: dict[str, float]  # by precision
    pictures: tuple[Picture, ...]

    @property
    def options(self) -> Options:
        """How its pictures are scored."""
        return Options(crops=1, steps=self.steps)


@dataclass(frozen=True)
class Answer:
    """One number of one picture: what the model answers, and what came out here."""

    picture: int
    name: str  # score, vcg, vda; or a kind of restoration: how far it is from the picture, as a share of white
    expected: float
    found: float
    allowed: float

    @property
    def within(self) -> bool:
        """Whether they agree."""
        return self.share <= 1

    @property
    def share(self) -> float:
        """Their difference, as a share of what is allowed; infinite if there is no number."""
        return abs(self.found - self.expected) / self.allowed if math.isfinite(self.found) else math.inf


@dataclass(frozen=True)
class Tested:
    """What a self-test found."""

    engine: str
    backend: str
    precision: str  # whose tolerance applied
    answers: tuple[Answer, ...]
    left_out: int  # pictures, because the first ones took so long
    seconds: float

    @property
    def within(self) -> bool:
        """Whether every answer is the model's."""
        return all(answer.within for answer in self.answers)

    @property
    def worst(self) -> Answer:
        """The answer that is furthest from the model's, beside what is allowed."""
        return max(self.answers, key=lambda answer: answer.share)


def self_test(engine: str | Path, backend: Backend | Sequence[Backend] | None = None) -> Tested:
    """Test an engine on this machine, run by a backend as `diffiqa.load` takes it.

    Raises EngineError if the engine has no self-test: it is from an earlier version.
    """
    directory = open_engine(Path(engine))
    test = read_self_test(directory)
    if test is None:
        raise EngineError(f"{directory.path} was made before engines had self-tests; export it again")
    with load(directory, backend) as scorer:
        return run_self_test(test, scorer, seconds=math.inf)


@contextlib.contextmanager
def load_tested(
    engine: str | Path | EngineDirectory,
    backend: Backend | Sequence[Backend] | None = None,
    *,
    max_pixels: int | None = DEFAULT_MAX_PIXELS,
    wanted: bool = True,
    say: Callable[[str], None] = lambda _text: None,
) -> Iterator[Scorer]:
    """Load an engine and, once for each build and machine, test it. What passed is remembered in the state folder.

    An engine without a self-test is only loaded, and one whose test is not `wanted`. Raises BackendError if answers are
    not the model's.
    """
    directory = engine if isinstance(engine, EngineDirectory) else open_engine(Path(engine))
    with load(directory, backend, max_pixels=max_pixels) as scorer:
        if wanted and (test := read_self_test(directory)) and not _is_remembered(note := _note(directory, scorer)):
            say("self-test: once for this engine, library and machine")
            tested = run_self_test(test, scorer)
            if not tested.within:
                worst = tested.worst
                raise BackendError(
                    f"{directory.path} does not give the model's answers here: the self-test expects "
                    f"{worst.expected:.6g} as {worst.name} of picture {worst.picture}, {tested.backend} gives "
                    f"{worst.found:.6g}; look with iqa-verify --engine {directory.path} --self-test, try another "
                    f"--backend, or score all the same with --no-self-test"
                )
            _remember(note, tested)
        yield scorer


def read_self_test(directory: EngineDirectory) -> SelfTest | None:
    """Return the self-test of an engine; None if it was made before there were any. Raises EngineError."""
    file = directory.path / SELF_TEST
    try:
        with file.open("rb") as stream:
            test = parse_self_test(stream.read(MAX_BYTES + 1), file)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise EngineError(f"cannot read {file}: {exc.strerror or exc}") from exc
    if test.engine != directory.manifest.engine_id:
        raise _damaged(file, f"it is of engine {test.engine}, and this is {directory.manifest.engine_id}")
    return test


def parse_self_test(data: bytes, file: Path) -> SelfTest:
    """Return the self-test that the bytes of a file hold. Raises EngineError."""
    if len(data) > MAX_BYTES:
        raise _damaged(file, f"it is larger than {MAX_BYTES} bytes")
    try:
        test = decode(SelfTest, json.loads(data), "self-test", partial(_damaged, file))
    except (ValueError, RecursionError) as exc:
        raise _damaged(file, first_line(exc)) from exc
    if test.schema != SCHEMA:
        raise EngineError(f"{file} has schema version {test.schema}; this diffiqa reads version {SCHEMA}")
    usable = test.span > 0 and test.tolerances.get("fp32", 0) > 0 and min(test.tolerances.values()) > 0
    if not usable or not test.pictures or not all(picture.answers for picture in test.pictures):
        raise _damaged(file, "it has no pictures, answers or tolerances")
    return test


def _damaged(file: Path, message: str) -> EngineError:
    return EngineError(f"{file} is damaged: {message}; export the engine again, or remove the file")


def run_self_test(test: SelfTest, scorer: Scorer, *, seconds: float = SECONDS) -> Tested:
    """Score the pictures of a self-test. After so many seconds no other picture is begun."""
    # A backend says in its name what it computes in; where it says nothing, that is float32.
    low = _LOW.search(scorer.info.backend)
    precision = low[1] if low else "fp32"
    tolerance = test.tolerances.get(precision, max(test.tolerances.values()))
    start, answers, done = time.monotonic(), [], 0
    for number, picture in enumerate(test.pictures, 1):
        found = answer(scorer, read_picture(picture.png, scorer.manifest), test.options)
        if found.keys() != picture.answers.keys():
            raise EngineError(f"the self-test names {', '.join(picture.answers)}, the engine {', '.join(found)}")
        for name, expected in picture.answers.items():
            allowed = tolerance * max(_span(name, test.span), abs(expected))
            answers.append(Answer(number, name, expected, found[name], allowed))
        done = number
        if time.monotonic() - start > seconds:
            break
    spent = time.monotonic() - start
    info = scorer.info
    return Tested(info.engine, info.backend, precision, tuple(answers), len(test.pictures) - done, spent)


def read_picture(png: str, manifest: Manifest) -> Image:
    """Return a picture of a self-test, prepared for an engine. Raises EngineError."""
    try:
        return read_for(base64.b64decode(png, validate=True), manifest, max_pixels=MAX_PIXELS)
    except (binascii.Error, ImageError) as exc:
        raise EngineError(
            f"a picture of the self-test is damaged ({first_line(exc)}); export the engine again"
        ) from exc


def answer(scorer: Scorer, image: Image, options: Options) -> dict[str, float]:
    """Return what an engine answers to a picture, by name."""
    (score,) = scorer.score_read([(image, "a picture of the self-test")], options, pictures=True)
    scores = {"score": score.score, "vcg": score.vcg, "vda": score.vda}
    return {name: value for name, value in scores.items() if value is not None} | _changes(score)


def _changes(score: Score) -> dict[str, float]:
    """Return how far restorations are from the picture: heads may not feel a small fault of the U-Net."""
    if score.pictures is None:
        return {}
    planes = {kind: plane.astype(np.float64) / 255 for kind, plane in score.pictures.planes.items()}
    seen = planes.pop(Kind.DIS)
    return {kind.value: float(np.sqrt(np.mean((plane - seen) ** 2))) for kind, plane in planes.items()}


def _span(name: str, span: float) -> float:
    return span if name in {"score", "vcg", "vda"} else 1.0


def _note(directory: EngineDirectory, scorer: Scorer) -> Path | None:
    """Return the file that remembers a test which passed; None where there is no place for one."""
    digest = hashlib.sha256()
    for name in (MANIFEST, SELF_TEST):  # the manifest has the hash of every file of every build
        digest.update(hashlib.sha256((directory.path / name).read_bytes()).digest())
    digest.update("\n".join([scorer.info.backend, np.__version__, platform.node(), cpu_target()]).encode())
    try:
        return state_folder() / "self-tests" / digest.hexdigest()[:32]
    except RuntimeError:  # no home folder
        return None


def _is_remembered(note: Path | None) -> bool:
    try:
        return note is not None and note.is_file()
    except OSError:
        return False


def _remember(note: Path | None, tested: Tested) -> None:
    if note is None:
        return
    with contextlib.suppress(OSError):  # where nothing can be written, every run tests again
        note.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with replacing(note) as stream:
            stream.write((json.dumps(encode(tested)) + "\n").encode())
