"""Heights and widths of images, read from their headers once: random crops are worked out in pixels.

DALI reads them (40 us a file, without holding the interpreter), so that every format and EXIF orientation counts as it
does when the image is decoded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .inputs import Ids, encoded_bytes, file_names
from .runtime import forks_safely, import_dali

_BATCH = 256

Sizes = Callable[[Ids], NDArray[np.int32]]  # ids -> (n, 2): height and width


def sizes_of(dataset: Any, num_threads: int) -> Sizes:
    """How large the images of a data set are; see :class:`~fastrunner.data.dali.DaliLoader` for what it may have."""
    if hasattr(dataset, "images"):
        size = np.array([dataset.images.shape[1:3]], dtype=np.int32)
        return lambda ids: np.broadcast_to(size, (len(ids), 2))
    return HeaderSizes(dataset, num_threads)


class HeaderSizes:
    """ids -> sizes of a data set's ``files`` or ``encoded(index)``; 8 bytes are kept for each.

    What has no readable header counts as 1 x 1: when it is decoded it fails, and is named.
    """

    def __init__(self, dataset: Any, num_threads: int) -> None:
        self._dataset, self._num_threads = dataset, num_threads
        self._sizes: NDArray[np.int32] | None = None
        self._pipe: Any = None

    def __call__(self, ids: Ids) -> NDArray[np.int32]:
        if self._sizes is None:
            self._sizes = np.zeros((len(self._dataset), 2), dtype=np.int32)  # pages that are not touched take no memory
        unknown = ids[self._sizes[ids, 0] == 0]
        for start in range(0, len(unknown), _BATCH):
            chunk = unknown[start : start + _BATCH]
            self._sizes[chunk] = self._read(chunk)
        return self._sizes[ids]

    def close(self) -> None:
        """End the threads; the next call starts them again. Sizes are kept."""
        self._pipe = None

    def _read(self, ids: Ids) -> NDArray[np.int32]:
        if self._pipe is None:
            self._pipe = self._build()
        files = hasattr(self._dataset, "files")
        rows: Any = file_names(self._dataset.files, ids) if files else encoded_bytes(self._dataset.encoded, ids)
        try:
            (shapes,) = self._pipe.run(rows=rows)
        except RuntimeError:
            self._pipe = None  # a pipeline that has failed cannot go on
            if len(ids) == 1:
                return np.ones((1, 2), dtype=np.int32)
            middle = len(ids) // 2
            return np.concatenate([self._read(ids[:middle]), self._read(ids[middle:])])
        sizes: NDArray[np.int32] = np.array(shapes.as_array()[:, :2])
        return sizes

    def _build(self) -> Any:
        Pipeline, fn, types = import_dali()
        pipe = Pipeline(batch_size=_BATCH, num_threads=self._num_threads, device_id=None, prefetch_queue_depth=1)
        with pipe:
            rows = fn.external_source(name="rows", ndim=1, dtype=types.UINT8)
            encoded = fn.io.file.read(rows) if hasattr(self._dataset, "files") else rows
            pipe.set_outputs(fn.peek_image_shape(encoded, dtype=types.INT32))
        pipe.build()
        return forks_safely(pipe)
