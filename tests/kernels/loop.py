"""A restoration loop on a device, step by step."""

from dataclasses import dataclass, field

import numpy as np

from diffiqa.engine.sampling import Rows, Sampling
from diffiqa.engine.schedule import Schedule, Taps
from diffiqa.kernels.launch import PROGRESS, SamplerBuffers, Storage, Window, step_table, window_table

from .devices import Array, Device


@dataclass
class Loop:
    """A restoration on a device, its memory filled with NaN before the first launch."""

    device: Device
    storage: Storage
    windows: list[Window]
    size: tuple[int, int]
    schedule: Schedule = field(default_factory=lambda: Schedule(steps=4))
    taps: tuple[int, ...] = ()  # rows
    walk: Rows | None = None  # the schedule's own
    in_place: bool = False  # y is the state
    planes: int = 3
    given: tuple[Array, Array] | None = (
        None  # what it starts from beside noise, (windows, planes, *size), and its share
    )

    def __post_init__(self) -> None:
        self.rows = self.walk or Sampling.trained(self.schedule).rows(self.schedule, Taps(), ())
        self.shape = (len(self.windows), self.planes, *self.size)
        device, real = self.device, self.storage.dtype
        state = device.like(self.shape, np.float32)
        self.buffers = SamplerBuffers(
            self.storage,
            *(len(self.windows), *self.size, len(self.rows.steps), self.rows.start),
            state=state,
            y=state if self.in_place else device.like(self.shape, real),
            noise=device.like(self.shape, real),
            noise_level=device.like((len(self.windows), 1), np.float32),
            taps=device.like((len(self.taps), *self.shape), np.float32) if self.taps else 0,
            windows=device.put(window_table(self.windows, self.size)),
            table=device.put(step_table(vars(self.rows.factors), self.taps, self.rows.steps)),
            progress=device.like((), PROGRESS),
            given=device.put(self.given[0].astype(real)) if self.given else 0,
            share=device.put(self.given[1].astype(real)) if self.given and not self.rows.image else 0,
            shares=self.rows.image or (0, 1),
            planes=self.planes,
            silent=self.rows.silent,
            clip=self.rows.clip,
        )

    @property
    def state(self) -> Array:
        return self.device.get(self.buffers.state)

    @property
    def y(self) -> Array:
        return self.device.get(self.buffers.y)

    @property
    def progress(self) -> tuple[int, int]:
        step_index, ticket = self.device.get(self.buffers.progress).item()
        return step_index, ticket

    def predict(self, noise: Array) -> None:
        """Let the U-Net have predicted `noise`."""
        self.device.set(self.buffers.noise, noise.astype(self.storage.dtype))

    def begin(self) -> None:
        self.device.run(self.buffers.begin())

    def step(self) -> None:
        self.device.run(self.buffers.step())
