"""Ready-made DALI pipelines for classification; each is called as any pipeline of a user's is.

    train:  a window of the image (Inception's crop), resized to ``size``, mirrored half of the time
    eval:   the shorter side resized, the central ``size`` of it

Found by measuring (500 x 320 JPEG of 41 kB -> 224 x 224, one thread, an image): with DALI's operators 1,480 us,
of which decoding the window 500, resizing 900; the core resizes, mirrors and lays out in 150. Normalising: 55.
torch normalises a planar uint8 batch in 54 us an image, but on the thread that trains.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from ...registry import PIPELINES
from ..crops import RATIO, SCALE, check_crop
from .augment import Augment, numba_augment
from .inputs import has_input, sample_input
from .resize import can_resize, resize
from .runtime import import_dali

DEVICES = ("cpu", "gpu", "mixed")


class _Classification(ABC):
    """What both have in common: sizes, normalisation, layout, devices.

    Args:
        size: (height, width) of the images that come out, or one number for both.
        mean, std: a number for each channel, in 0..255 units: the images come out normalised, float32. Without them
            they are uint8.
        channels_last: the batch, still (N, C, H, W), lies in memory as (N, H, W, C); that spares a pass.
        device: "cpu"; "gpu": decoded on the CPU, everything behind it on the GPU; "mixed": decoded there too.
    """

    def __init__(
        self,
        size: int | tuple[int, int],
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        channels_last: bool = False,
        device: str = "cpu",
    ) -> None:
        self.size = (size, size) if isinstance(size, int) else (size[0], size[1])
        if min(self.size) < 1:
            raise ValueError(f"size must be >= 1, got {size}")
        if (mean is None) != (std is None):
            raise ValueError("mean and std go together")
        if std is not None and not all(value > 0 for value in std):
            raise ValueError(f"std must be > 0, got {list(std)}")
        if device not in DEVICES:
            raise ValueError(f"device must be one of {', '.join(DEVICES)}, got {device!r}")
        self.mean, self.std = mean, std
        self.channels_last, self.device = channels_last, device

    def __call__(self, **kwargs: Any) -> Any:
        """A Pipeline, made inside of a DaliLoader.

        Args:
            **kwargs: for DALI's Pipeline: batch_size, num_threads, device_id, prefetch_queue_depth, ...
        """
        Pipeline, _, _ = import_dali()
        pipe = Pipeline(**kwargs)
        with pipe:
            pipe.set_outputs(self._images())
        return pipe

    @abstractmethod
    def _images(self) -> Any:
        """The node of the finished images."""

    def _pixels(self, **window: Any) -> Any:
        """The image, or a window of it, on the device where the rest is done."""
        _, fn, _ = import_dali()
        if has_input("array"):
            image = sample_input("array")
            image = fn.slice(image, **window) if window else image
        else:
            decode = fn.decoders.image_slice if window else fn.decoders.image
            image = decode(sample_input("encoded"), device="mixed" if self.device == "mixed" else "cpu", **window)
            if self.device == "mixed":
                return image
        return image if self.device == "cpu" else image.gpu()

    def _finish(self, image: Any, *, mirror: Any = 0, **crop: Any) -> Any:
        """Mirror, crop, normalise and lay out: one pass."""
        _, fn, types = import_dali()
        layout = "HWC" if self.channels_last else "CHW"
        if self.mean is None:
            mean, std, dtype = [0.0], [1.0], types.UINT8
        else:
            mean, std, dtype = list(self.mean), list(self.std or ()), types.FLOAT
        return fn.crop_mirror_normalize(
            image, dtype=dtype, output_layout=layout, mean=mean, std=std, mirror=mirror, **crop
        )


@PIPELINES.register_module()
class ClassificationTrain(_Classification):
    """A random window, resized, mirrored half of the time; see :class:`_Classification` for the other arguments.

    Args:
        scale: area of the window, as a share of the image's.
        ratio: its width over height.
        flip: how often images are mirrored.
        augment: a function of yours, compiled by numba, called for each resized image; see
            :func:`~fastrunner.data.dali.augment.numba_augment`. Device "cpu" only.
        augment_uniforms: how many numbers in [0, 1) it gets.
    """

    def __init__(
        self,
        size: int | tuple[int, int] = 224,
        *,
        scale: tuple[float, float] = SCALE,
        ratio: tuple[float, float] = RATIO,
        flip: float = 0.5,
        augment: Augment | None = None,
        augment_uniforms: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(size, **kwargs)
        self.scale, self.ratio = (scale[0], scale[1]), (ratio[0], ratio[1])
        check_crop(self.scale, self.ratio)
        if not 0 <= flip <= 1:
            raise ValueError(f"flip must be a probability, got {flip}")
        if augment is not None and self.device != "cpu":
            raise ValueError(f'augment runs on the CPU: it needs device "cpu", got {self.device!r}')
        self.flip, self.augment, self.augment_uniforms = flip, augment, augment_uniforms

    def _images(self) -> Any:
        _, fn, types = import_dali()
        window = sample_input("window", scale=self.scale, ratio=self.ratio)
        image = self._pixels(start=window[0:2], shape=window[2:4], axes=[0, 1])
        core = self.device == "cpu" and can_resize()
        if self.augment is not None:
            numbers = sample_input("uniform", count=self.augment_uniforms)
            image = numba_augment(self.augment, self._resized(image, core), numbers)
        mirror = fn.cast(sample_input("uniform")[0] < self.flip, dtype=types.INT32)
        if self.augment is None:
            if core and self.mean is None:
                return resize(image, self.size, mirror, planar=not self.channels_last)
            image = self._resized(image, core)
        return self._finish(image, mirror=mirror)

    def _resized(self, image: Any, core: bool) -> Any:
        _, fn, types = import_dali()
        if not core:
            return fn.resize(image, size=self.size)
        never = fn.constant(idata=[0], dtype=types.INT32)[0]
        return resize(image, self.size, never, planar=False)


@PIPELINES.register_module()
class ClassificationEval(_Classification):
    """The central part of the image; see :class:`_Classification` for the other arguments.

    Args:
        resize: length of the image's shorter side, before ``size`` is cut out of the middle. Default: 256 / 224 of the
            larger of ``size``.
    """

    def __init__(self, size: int | tuple[int, int] = 224, *, resize: int | None = None, **kwargs: Any) -> None:
        super().__init__(size, **kwargs)
        self.resize = round(max(self.size) * 256 / 224) if resize is None else resize
        if self.resize < max(self.size):
            raise ValueError(
                f"resize must be at least size {self.size}, or nothing would be there to cut, got {resize}"
            )

    def _images(self) -> Any:
        _, fn, _ = import_dali()
        return self._finish(fn.resize(self._pixels(), resize_shorter=self.resize), crop=self.size)
