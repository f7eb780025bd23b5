"""Real JPEG files for the tests of what reads them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from PIL import Image
from torch import Tensor

NUM_FILES = 23


@dataclass
class Folder:
    files: list[str]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.files)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Crops of a real photograph; sizes and name lengths differ. ``labels[i] == i``, so a batch names its samples."""
    data = pytest.importorskip("skimage.data", reason="scikit-image is not installed")
    photograph = Image.fromarray(data.coffee())
    path = tmp_path_factory.mktemp("jpg")
    files = []
    for i in range(NUM_FILES):
        file = path / f"{'x' * (i % 5)}{i}.jpg"
        photograph.crop((10 * i, 5 * i, 10 * i + 120 + 7 * i, 5 * i + 100 + 3 * i)).save(file, quality=92)
        files.append(str(file))
    return Folder(files, torch.arange(NUM_FILES))
