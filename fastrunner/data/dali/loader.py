"""Images through a DALI pipeline: read, decode, crop and resize in DALI's threads, ahead of the step.

DALI decides nothing here. Which samples make a batch, and where each is cropped, is worked out in numpy as a pure
function of (seed, epoch, index) and fed to the pipeline:

    ids = order.ids(epoch, position)            window, mirror of sample i = f(hash(seed, epoch, i))

So a seek is an assignment, a resumed run sees the bytes of the uninterrupted one, and neither threads nor the size of
batches change anything.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from ...registry import PIPELINES, build_from_cfg
from ..loader import EpochLoader
from ..order import BatchOrder
from .failures import Failures
from .feed import Batch, Feed
from .inputs import Inputs
from .producer import Producer
from .runtime import forks_safely, import_dali
from .sizes import HeaderSizes, sizes_of

_ALWAYS = 2**62  # an epoch that never comes


class DaliLoader(EpochLoader):
    """Batches out of a DALI pipeline: dict(img=..., gt_label=int64 (N,)); see :class:`EpochLoader` for how it is used.

    Batches are DALI's own memory, handed over without a copy: DALI takes it back when the tensor is gone, not before.

    Args:
        dataset: has a length, and ``files`` (paths), ``images`` (uint8 (N, H, W, C)) or ``encoded(index)`` (bytes of an
            image); where it has ``labels`` (int64, (N,)), ``gt_label`` is in each batch.
        pipeline: a config or name from PIPELINES ("ClassificationTrain", "ClassificationEval"), a function with
            ``@pipeline_def``, or anything that makes a Pipeline from ``batch_size=, num_threads=, device_id=,
            prefetch_queue_depth=``. It gets to know its samples by :func:`sample_input`.
        batch_size, shuffle, seed, rank, world_size, drop_last: see :class:`~fastrunner.data.order.BatchOrder`.
        num_threads: DALI's threads.
        prefetch: batches that are being made ahead.
        outputs: names of the pipeline's outputs in a batch. Samples that differ in shape come as a list of tensors.
        unreadable: what happens with a sample that cannot be made: "raise" an error that names its file, or "skip":
            its place is taken by the epoch's next sample, and the log says so and counts.
        device_id: number of the GPU that the pipeline uses; None: the CPU only.
    Attributes:
        samples_fed: samples that DALI was given since the loader was made.
        unreadable_samples: sample id -> why, of those that were skipped.
    Raises:
        ImportError: DALI is not installed.
        TypeError, ValueError: arguments that make no sense; a pipeline that does not fit, from the first iterator.
        RuntimeError: from the iterator: a sample could not be made, or the pipeline fails.
    Cost on the training thread: some 10 us a batch, whatever the size of the images.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        pipeline: Callable[..., Any] | Mapping[str, Any] | str,
        batch_size: int,
        num_threads: int = 2,
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        prefetch: int = 2,
        outputs: Sequence[str] = ("img",),
        unreadable: str = "raise",
        device_id: int | None = None,
    ) -> None:
        import_dali()
        if len(dataset) == 0:
            raise ValueError(f"data set {type(dataset).__name__} has no samples")
        for name, count in (("num_threads", num_threads), ("prefetch", prefetch)):
            if count < 1:
                raise ValueError(f"{name} must be >= 1, got {count}")
        self.order = BatchOrder(
            len(dataset),
            batch_size,
            seed=seed,
            shuffle=shuffle,
            rank=rank,
            world_size=world_size,
            drop_last=drop_last,
        )
        self.dataset, self.batch_size, self.num_threads, self.prefetch = dataset, batch_size, num_threads, prefetch
        self.pipeline = _as_factory(pipeline)
        if device_id is None and getattr(self.pipeline, "device", "cpu") != "cpu":
            device_id = _current_gpu()
        self.outputs, self.device_id = tuple(outputs), device_id
        self._fed_before = 0
        self._producer: Producer | None = None
        self._finalizer: Any = None
        files = getattr(dataset, "files", None)
        self._sizes = sizes_of(dataset, num_threads)
        self._inputs = Inputs(dataset, seed, self._sizes)
        labels = getattr(dataset, "labels", None)
        self._feed = Feed(self.order, self._inputs, None if labels is None else torch.as_tensor(labels))
        build = _Build(self.pipeline, self._inputs, len(self.outputs), device_id)
        self._build = build
        self._failures = Failures(unreadable, lambda: build(1, 1), self._feed, files)

    @property
    def samples_fed(self) -> int:
        return self._fed_before + (self._producer.samples_fed if self._producer is not None else 0)

    @property
    def num_ready(self) -> int:
        """Batches that can be taken without waiting."""
        return self._producer.ready() if self._producer is not None else 0

    def stats(self) -> dict[str, float]:
        """How well DALI kept up, since the loader was started: see :class:`~fastrunner.data.ring.Stats`."""
        return asdict(self._producer.stats) if self._producer is not None else {}

    @property
    def unreadable_samples(self) -> dict[int, str]:
        return self._feed.unreadable

    def _start(self, epoch: int, position: int) -> None:
        if self._producer is None:
            self._inputs.seed = self.order.seed
            self._producer = self._make_producer()
            self._finalizer = weakref.finalize(self, self._producer.close)
        self._producer.start(epoch, position, self._last_epoch(epoch))

    def _next(self) -> dict[str, Any]:
        assert self._producer is not None  # _start came before
        return self._producer.take(self._last_epoch(self.epoch))

    def _stop(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            self._finalizer.detach()
            producer.close()
            self._fed_before += producer.samples_fed
        if isinstance(self._sizes, HeaderSizes):
            self._sizes.close()

    def _last_epoch(self, epoch: int) -> int:
        """The last epoch whose batches may be made now."""
        return _ALWAYS if self.prefetch_over_epoch_end else epoch

    def _make_producer(self) -> Producer:
        names, channels_last = self.outputs, getattr(self.pipeline, "channels_last", False)

        def finish(tensors: list[Any], batch: Batch) -> dict[str, Any]:
            made = dict(zip(names, tensors, strict=True))
            if channels_last:
                made["img"] = made["img"].permute(0, 3, 1, 2)
            if batch.labels is not None:
                made.setdefault("gt_label", batch.labels)
            return made

        build, batch_size, num_threads = self._build, self.batch_size, self.num_threads
        stream = None if self.device_id is None else torch.cuda.current_stream(self.device_id).cuda_stream
        return Producer(
            lambda: build(batch_size, num_threads),
            self._feed,
            finish,
            self._failures,
            prefetch=self.prefetch,
            stream=stream,
        )


class _Build:
    """Makes pipelines from the user's function, and checks what it gets."""

    def __init__(self, pipeline: Callable[..., Any], inputs: Inputs, num_outputs: int, device_id: int | None) -> None:
        self._pipeline, self._inputs, self._num_outputs = pipeline, inputs, num_outputs
        self._device_id = device_id

    def __call__(self, batch_size: int, num_threads: int) -> Any:
        Pipeline, _, _ = import_dali()
        with self._inputs.declaring():
            # A queue of one: DALI's first call starts as many runs as its queue is deep, and fewer may be fed yet. Runs
            # are started ahead nevertheless, as many as wanted.
            pipe = self._pipeline(
                batch_size=batch_size, num_threads=num_threads, device_id=self._device_id, prefetch_queue_depth=1
            )
            if not isinstance(pipe, Pipeline):
                raise TypeError(
                    f"pipeline must make a nvidia.dali Pipeline, got {type(pipe).__name__}: is @pipeline_def missing?"
                )
            pipe.build()
            pipe.enable_api_check(False)  # it looks whether run() is mixed with outputs(): 7 us a call
            forks_safely(pipe)
        if not self._inputs.declared:
            raise ValueError(
                "the pipeline calls no sample_input(), so it cannot know which samples are next; a DALI reader of its "
                "own would neither follow the order nor resume"
            )
        if pipe.num_outputs != self._num_outputs:
            raise ValueError(
                f"the pipeline has {pipe.num_outputs} outputs, but {self._num_outputs} are named in `outputs`"
            )
        return pipe


def _as_factory(pipeline: Callable[..., Any] | Mapping[str, Any] | str) -> Callable[..., Any]:
    if isinstance(pipeline, str):
        pipeline = {"type": pipeline}
    if isinstance(pipeline, Mapping):
        built: Callable[..., Any] = build_from_cfg(dict(pipeline), PIPELINES)
        return built
    if not callable(pipeline):
        raise TypeError(
            f"pipeline must be a config, a name, or a function that makes a Pipeline, got {type(pipeline).__name__}"
        )
    return pipeline


def _current_gpu() -> int:
    if not torch.cuda.is_available():
        raise ValueError("the pipeline's device needs a GPU, and torch.cuda.is_available() is False")
    return torch.cuda.current_device()
