"""What do images through DALI cost over DALI itself, and what do they save over Pillow and a DataLoader?

- jpeg: photographs (500 x 320, quality 90) -> random crop, 224 x 224, mirrored, uint8. Floor: `pipe.run()` of the
  fastest pipeline that a user would write, with DALI's own reader, shuffling and randomness. Bar: 0.97 of its speed.
  And the same pipeline with our resize in it, which no user would write: the hand-over alone.
- pillow: the same by Pillow (full decode) in a torch DataLoader with two workers. Bar: at least 1.4 times as fast.
- tiny: four samples of eight numbers. Floor: `pipe.run()`, with and without an input that is fed. Bar: 40 us over it.
- wait: a step of 1.5 times the loading time. Bar: data wait at most 1 % of the iteration; no iteration, next to an
  epoch's end or not, more than 1 ms over the median.
- seek: batch 1,000,000 of 100,000,000 samples. Bar: the first batch at most 50 ms later than from the beginning, and
  nothing more decoded.
Gate: tests/data/test_dali*.py must be green first.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice, pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from fastrunner import ClassificationTrain, DaliLoader, ImageFolder, IterLoader, sample_input
from fastrunner.bench import machine
from fastrunner.bench.measure import interleaved
from fastrunner.data.builtin import _photographs
from fastrunner.data.crops import NUM_UNIFORMS, random_resized_crop
from fastrunner.data.dali.resize import resize

RECORDS = Path(__file__).resolve().parent / "records"
BATCH, SIZE, THREADS = 32, 224, 2


def make_files(root: Path, count: int = 256) -> None:
    """``count`` crops of real photographs, 500 x 320, in two folders."""
    photographs = [Image.fromarray(read()) for name, read in _photographs().items() if name != "galaxies"]
    random = np.random.default_rng(0)
    for number in range(count):
        photograph = photographs[number % len(photographs)]
        width = int(min(photograph.width, photograph.height * 500 / 320) * random.uniform(0.5, 1))
        height = int(width * 320 / 500)
        x, y = (int(random.integers(0, most + 1)) for most in (photograph.width - width, photograph.height - height))
        file = root / str(number % 2) / f"{number:03d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        crop = photograph.crop((x, y, x + width, y + height)).resize((500, 320), Image.Resampling.LANCZOS)
        crop.save(file, quality=90)


def endless(loader: DaliLoader) -> Callable[[], Any]:
    """A function that gives the next batch, over epoch ends, and does not keep it."""
    loader.prefetch_over_epoch_end = True
    return IterLoader(loader).__next__


def timed(give: Callable[[], Any], batches: int, warm: int = 4) -> Callable[[], float]:
    """A case for ``interleaved``: seconds a batch, after ``warm`` batches."""

    def sample() -> float:
        for _ in range(warm):
            give()
        begin = time.perf_counter()
        for _ in range(batches):
            give()
        return (time.perf_counter() - begin) / batches

    return sample


def bare_jpeg(root: Path, *, core: bool) -> Callable[[], Any]:
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=BATCH, num_threads=THREADS, device_id=None, prefetch_queue_depth=2)
    def pipeline() -> Any:
        encoded, labels = fn.readers.file(file_root=str(root), random_shuffle=True)
        image, mirror = fn.decoders.image_random_crop(encoded), fn.random.coin_flip()
        if core:
            return resize(image, (SIZE, SIZE), mirror, planar=True), labels
        image = fn.resize(image, size=(SIZE, SIZE))
        image = fn.crop_mirror_normalize(
            image, dtype=types.UINT8, output_layout="CHW", mean=[0.0], std=[1.0], mirror=mirror
        )
        return image, labels

    pipe = pipeline()
    pipe.build()
    return pipe.run  # type: ignore[no-any-return]


class Pillow(Dataset[Any]):
    """What ImageFolder and torchvision's transforms do, without them."""

    def __init__(self, files: list[str]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        with Image.open(self.files[index]) as file:
            image = file.convert("RGB")
        uniform = torch.rand(1, NUM_UNIFORMS + 1, dtype=torch.float64).numpy()
        window = random_resized_crop(uniform[:, 1:], np.array([[image.height, image.width]]))
        top, left, height, width = window[0].tolist()
        box = (left, top, left + width, top + height)
        pixels = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box))
        pixels = pixels[:, ::-1] if uniform[0, 0] < 0.5 else pixels
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def jpeg(root: Path, rounds: int) -> dict[str, Any]:
    folder = ImageFolder(root, pipeline=ClassificationTrain(SIZE))
    ours = folder.make_loader(batch_size=BATCH, num_workers=THREADS, seed=0)
    workers = DataLoader(Pillow(folder.files * 200), BATCH, shuffle=True, num_workers=THREADS)
    pillow = iter(workers)
    samples = interleaved({
        "ours": timed(endless(ours), 16, warm=8),
        "bare": timed(bare_jpeg(root, core=False), 16, warm=8),
        "core": timed(bare_jpeg(root, core=True), 16, warm=8),
        "pillow": timed(lambda: next(pillow), 16, warm=8),
    }, rounds)  # fmt: skip
    ours.close()
    speed = {name: BATCH / median(values) for name, values in samples.items()}
    print("jpeg    " + ", ".join(f"{name} {value:,.0f} images/s" for name, value in speed.items()))
    result: dict[str, Any] = {f"of_{name}": paired(samples, name) for name in ("bare", "core", "pillow")}
    result["samples_s"] = samples
    print(f"jpeg    {result['of_bare']:.3f} of bare pipe.run(): {verdict(result['of_bare'] >= 0.97)} (0.97)")
    print(f"jpeg    {result['of_core']:.3f} of that with our resize")
    print(f"jpeg    {result['of_pillow']:.2f} times Pillow and workers: {verdict(result['of_pillow'] >= 1.4)} (1.4)")
    return result


def paired(samples: dict[str, list[float]], other: str) -> float:
    """How many times as fast as ``other`` ours is: the median of the rounds' ratios."""
    return median(b / a for a, b in zip(samples["ours"], samples[other], strict=True))


class Numbers:
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count


def tiny(rounds: int) -> dict[str, Any]:
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=4, num_threads=1, device_id=None, prefetch_queue_depth=2)
    def alone() -> Any:
        return fn.random.uniform(range=[0.0, 1.0], shape=[8])

    @pipeline_def(batch_size=4, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def fed() -> Any:
        return fn.external_source(name="numbers", ndim=1, dtype=types.FLOAT)

    @pipeline_def
    def ours() -> Any:
        return sample_input("uniform", count=8)

    run_alone, pipe, numbers = alone(), fed(), np.zeros((4, 8), np.float32)
    run_alone.build()
    pipe.build()

    def run_fed() -> None:
        pipe.feed_input("numbers", numbers)
        pipe.run()

    loader = DaliLoader(Numbers(100_000), pipeline=ours, batch_size=4, num_threads=1)
    samples = interleaved({
        "ours": timed(endless(loader), 500, warm=50),
        "alone": timed(run_alone.run, 500, warm=50),
        "fed": timed(run_fed, 500, warm=50),
    }, rounds)  # fmt: skip
    loader.close()
    over = {
        name: 1e6 * median(a - b for a, b in zip(samples["ours"], samples[name], strict=True))
        for name in ("alone", "fed")
    }
    print(
        f"tiny    {over['alone']:.0f} us over pipe.run(), {over['fed']:.0f} us with its input: "
        f"{verdict(over['alone'] <= 40)} (40)"
    )
    return {"samples_s": samples, "over_us": over}


def wait(root: Path, num_iters: int) -> dict[str, Any]:
    """The step waits as one for a GPU does: the interpreter is free, and so are the cores."""
    loader = ImageFolder(root, pipeline=ClassificationTrain(SIZE)).make_loader(batch_size=BATCH, num_workers=THREADS)
    give = endless(loader)
    loading = median(timed(give, 8)() for _ in range(3))
    asked, given = [], []
    for _ in range(num_iters + len(loader)):
        asked.append(time.perf_counter())
        batch = give()
        given.append(time.perf_counter())
        time.sleep(1.5 * loading)
        del batch  # as the runners do: a step holds its batch, and lets go of it before it asks for the next
    stats = loader.stats()
    loader.close()
    waits = [b - a for a, b in zip(asked, given, strict=True)][len(loader) :]
    iters = [b - a for a, b in pairwise(asked)][len(loader) :]
    share = sum(waits) / (sum(iters) + 1.5 * loading)
    late = 1e3 * (max(iters) - median(iters))
    print(
        f"wait    {share:.2%} of an iteration of {1e3 * median(iters):.1f} ms, median {1e6 * median(waits):.0f} us: "
        f"{verdict(share <= 0.01)} (1 %)"
    )
    print(f"wait    slowest iteration {late:.2f} ms over the median: {verdict(late <= 1)} (1 ms)")
    return {"waits_s": waits, "iters_s": iters, "share": share, "late_ms": late, "stats": stats}


class Repeated:
    """The files of a folder, over and over."""

    def __init__(self, files: list[str], count: int) -> None:
        self.paths, self.count = files, count

    @property
    def files(self) -> Repeated:
        return self

    def __getitem__(self, index: int) -> str:
        return self.paths[index % len(self.paths)]

    def __len__(self) -> int:
        return self.count


def seek(root: Path, rounds: int) -> dict[str, Any]:
    dataset = Repeated(ImageFolder(root).files, 100_000_000)

    def first_batch(position: int) -> Callable[[], float]:
        def sample() -> float:
            loader = DaliLoader(dataset, pipeline=ClassificationTrain(SIZE), batch_size=BATCH, num_threads=THREADS)
            begin = time.perf_counter()
            loader.seek(2, position)
            list(islice(loader, 1))
            took = time.perf_counter() - begin
            loader.close()
            assert loader.samples_fed <= BATCH * (1 + loader.prefetch), loader.samples_fed
            return took

        return sample

    samples = interleaved({"fresh": first_batch(0), "sought": first_batch(1_000_000)}, rounds)
    later = 1e3 * median(b - a for a, b in zip(samples["fresh"], samples["sought"], strict=True))
    fresh = 1e3 * median(samples["fresh"])
    print(f"seek    first batch {later:+.1f} ms against a fresh start's {fresh:.1f}: {verdict(later <= 50)} (50)")
    return {"samples_s": samples, "later_ms": later}


def verdict(held: bool) -> str:
    RESULTS.append(held)
    return "held" if held else "NOT HELD"


RESULTS: list[bool] = []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--record", action="store_true", help="write benchmarks/records/<date>_dali.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    facts = machine.facts(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_files(root)
        result = {
            "machine": facts,
            "jpeg": jpeg(root, options.rounds),
            "tiny": tiny(options.rounds),
            "wait": wait(root, 64),
            "seek": seek(root, options.rounds),
        }
        gc.collect()
    if options.record:
        RECORDS.mkdir(exist_ok=True)
        file = RECORDS / f"{time.strftime('%Y-%m-%d')}_dali.json"
        file.write_text(json.dumps(result) + "\n")
    return 0 if all(RESULTS) else 1


if __name__ == "__main__":
    sys.exit(main())
