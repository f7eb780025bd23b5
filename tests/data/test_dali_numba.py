"""Augmentations in Python, compiled by numba, inside the pipeline."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

pytest.importorskip("nvidia.dali", reason="DALI is not installed")
pytest.importorskip("numba", reason="numba is not installed")

from fastrunner import ClassificationTrain, DaliLoader
from fastrunner.data.crops import NUM_UNIFORMS
from fastrunner.data.dali import augment
from fastrunner.data.dali.augment import ERRORS
from fastrunner.data.rng import uniforms

NUM_FILES = 23  # of the folder
SEED = 19  # with it one sample of epoch 1 is refused, and none of epoch 0

SIZE = (24, 32)


def cutout(out, image, numbers):
    """A grey square of a quarter of the height, somewhere inside; one image in forty is refused."""
    if numbers[2] > 0.975:
        raise ValueError("this image is too bright")
    side = image.shape[0] // 4
    top = int(numbers[0] * (image.shape[0] - side + 1))
    left = int(numbers[1] * (image.shape[1] - side + 1))
    out[:] = image
    out[top : top + side, left : left + side] = 128


def numbers_of(epoch: int) -> np.ndarray:
    """The three numbers that each sample's augmentation gets: behind those of its window."""
    return uniforms(SEED, epoch, np.arange(NUM_FILES), NUM_UNIFORMS + 3)[:, NUM_UNIFORMS:].astype(np.float32)


def test_cutout_like_numpy_and_an_exception_inside_is_an_error_that_names_the_sample(folder):
    """In one test, because numba takes seconds to compile."""
    assert [(numbers_of(epoch)[:, 2] > 0.975).sum() for epoch in (0, 1)] == [0, 1]
    options = {"batch_size": 4, "seed": SEED, "shuffle": False}
    plain = DaliLoader(folder, pipeline=ClassificationTrain(SIZE, flip=0.0), **options)
    images = torch.cat([batch["img"] for batch in plain]).numpy().transpose(0, 2, 3, 1)
    wanted = np.empty_like(images)
    for out, image, numbers in zip(wanted, images, numbers_of(0), strict=True):
        cutout(out, image, numbers)  # the function itself, uncompiled
    assert (wanted != images).any(axis=(1, 2, 3)).all()

    hook = sys.unraisablehook
    pipeline = ClassificationTrain(SIZE, flip=0.0, augment=cutout, augment_uniforms=3)
    loader = DaliLoader(folder, pipeline=pipeline, num_threads=2, **options)
    got = torch.cat([batch["img"] for batch in loader])
    assert np.array_equal(got.numpy().transpose(0, 2, 3, 1), wanted)

    refused = int(numbers_of(1)[:, 2].argmax())
    says = rf"an augmentation fails on .*\.jpg \(sample {refused}\): this image is too bright"
    with pytest.raises(RuntimeError, match=says) as caught:
        list(loader)
    assert isinstance(caught.value.__cause__, ValueError)
    assert sys.unraisablehook is hook  # and nothing is left behind
    assert ERRORS.take() is None


def does_not_compile(out, image, numbers):
    out[:] = image.no_such_method()


def test_a_function_that_numba_cannot_compile(folder):
    pipeline = ClassificationTrain(SIZE, augment=does_not_compile)
    with pytest.raises(Exception, match="no_such_method") as caught:
        list(DaliLoader(folder, pipeline=pipeline, batch_size=4))
    assert type(caught.value).__module__.startswith("numba")


def test_augment_needs_the_cpu():
    with pytest.raises(ValueError, match="augment runs on the CPU: it needs device \"cpu\", got 'gpu'"):
        ClassificationTrain(SIZE, augment=cutout, device="gpu")


def test_without_numba(folder, monkeypatch):
    augment._operator.cache_clear()
    monkeypatch.setitem(sys.modules, "nvidia.dali.plugin.numba", None)
    with pytest.raises(ImportError, match=r"pip install fastrunner\[numba\]"):
        list(DaliLoader(folder, pipeline=ClassificationTrain(SIZE, augment=cutout), batch_size=4))


def test_other_unraisable_exceptions_are_passed_on(monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)
    ERRORS.watch()
    try:

        class Broken:
            def __del__(self):
                raise KeyError("not numba's")

        Broken()
    finally:
        ERRORS.leave()
    assert [type(one.exc_value) for one in seen] == [KeyError]
    assert ERRORS.take() is None
    assert sys.unraisablehook == seen.append
