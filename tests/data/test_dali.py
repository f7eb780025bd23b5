"""DaliLoader: which samples, in which order, from any place; what is made ahead; memory and threads."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("nvidia.dali", reason="DALI is not installed")

from nvidia.dali import pipeline_def

from fastrunner import DaliLoader, IterLoader, sample_input
from fastrunner.data.dali.pipelines import ClassificationEval, ClassificationTrain
from fastrunner.data.order import epoch_indices

N, SIZE = 23, (24, 32)
TRAIN = ClassificationTrain(SIZE)
EVAL = ClassificationEval(SIZE)


def make(folder, **kwargs) -> DaliLoader:
    arguments = {"pipeline": TRAIN, "batch_size": 4, "num_threads": 1, "seed": 5}
    return DaliLoader(folder, **{**arguments, **kwargs})


def take(loader: DaliLoader, count: int) -> list[dict[str, Tensor]]:
    return list(islice(loader, count))


def epochs(loader: DaliLoader, count: int) -> list[dict[str, Tensor]]:
    return [batch for _ in range(count) for batch in loader]


def assert_same(got: list[dict[str, Tensor]], wanted: list[dict[str, Tensor]]) -> None:
    assert len(got) == len(wanted) > 0
    for one, other in zip(got, wanted, strict=True):
        assert one["gt_label"].tolist() == other["gt_label"].tolist()
        assert torch.equal(one["img"], other["img"])


@pytest.fixture(scope="module")
def three_epochs(folder) -> list[dict[str, Tensor]]:
    return epochs(make(folder), 3)


# The order.


@pytest.mark.parametrize("batch_size", [1, 4])
def test_order_is_epoch_indices(folder, batch_size):
    loader = make(folder, batch_size=batch_size)
    for epoch in range(3):
        seen = torch.cat([batch["gt_label"] for batch in loader]).tolist()
        assert seen == epoch_indices(N, seed=5, epoch=epoch).tolist()


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 7}, {"num_threads": 3}, {"prefetch": 5}])
def test_an_image_depends_on_seed_epoch_and_index_only(folder, three_epochs, options):
    wanted = torch.cat([batch["img"] for batch in three_epochs])
    assert torch.equal(torch.cat([batch["img"] for batch in epochs(make(folder, **options), 3)]), wanted)


def test_images_differ_between_epochs_and_seeds(folder, three_epochs):
    def by_label(batches: list[dict[str, Tensor]]) -> dict[int, Tensor]:
        return {int(label): img for b in batches for label, img in zip(b["gt_label"], b["img"], strict=True)}

    first = by_label(three_epochs[:6])
    for other in (by_label(three_epochs[6:12]), by_label(epochs(make(folder, seed=6), 1))):
        assert all(not torch.equal(first[label], other[label]) for label in first)


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({}, [4, 4, 4, 4, 4, 3]),
        ({"drop_last": True}, [4, 4, 4, 4, 4]),
        ({"rank": 1, "world_size": 2}, [4, 4, 4]),  # 24 with DistributedSampler's padding
        ({"batch_size": 100}, [23]),
    ],
)
@pytest.mark.parametrize("over_end", [True, False])
def test_batch_sizes_and_length(folder, options, sizes, over_end):
    loader = make(folder, **options)
    loader.prefetch_over_epoch_end = over_end
    for _ in range(2):  # the incomplete batch stands between two epochs
        assert [len(batch["img"]) for batch in loader] == sizes
    assert len(loader) == len(sizes)


def test_ranks_share_an_epoch(folder):
    seen = [torch.cat([b["gt_label"] for b in make(folder, rank=rank, world_size=3)]).tolist() for rank in range(3)]
    assert len({len(ids) for ids in seen}) == 1
    assert set().union(*seen) == set(range(N))


# Going anywhere.


@pytest.mark.parametrize(("epoch", "position"), [(0, 4), (1, 0), (1, 3), (2, 5)])
def test_a_resumed_loader_continues_with_the_same_bytes(folder, three_epochs, epoch, position):
    interrupted = make(folder)
    for _ in range(epoch):
        list(interrupted)
    take(interrupted, position)
    state = interrupted.state_at(epoch, position)
    loader = make(folder, seed=99, num_threads=2)  # the seed comes with the state
    loader.load_state_dict(state)
    assert_same(epochs(loader, 3 - epoch), three_epochs[6 * epoch + position :])


def test_a_running_loader_takes_a_state_of_batches_of_another_size(folder):
    order = [i for batch in make(folder, batch_size=2) for i in batch["gt_label"].tolist()]
    loader = make(folder, batch_size=4)
    take(loader, 2)
    loader.load_state_dict(make(folder, batch_size=3).state_at(0, 3))  # 9 samples: position 2 as well
    assert [i for batch in loader for i in batch["gt_label"].tolist()] == order[9:]


def test_seek_back_and_forth_on_a_running_loader(folder, three_epochs):
    loader = make(folder)
    loader.prefetch_over_epoch_end = True
    take(loader, 3)
    for epoch, position in ((1, 4), (0, 0), (0, 4), (1, 1)):
        loader.seek(epoch, position)
        assert_same(take(loader, 2), three_epochs[6 * epoch + position :][:2])


def test_seek_decodes_nothing_that_it_skips(folder):
    loader = make(folder, prefetch=2)
    loader.seek(0, 3)
    assert loader.samples_fed == 0
    assert sum(len(batch["img"]) for batch in loader) == 11
    assert loader.samples_fed == 11


def test_a_seek_into_a_hundred_million_samples_makes_only_what_is_asked():
    class Huge:
        """One picture a hundred million times; the file names exist only when they are asked for."""

        files = property(lambda self: self)

        def __init__(self, file: str) -> None:
            self.file = file

        def __len__(self) -> int:
            return 100_000_000

        def __getitem__(self, index: int) -> str:
            return self.file

    from PIL import Image

    Image.new("RGB", (16, 16), (200, 100, 50)).save("one.png")
    loader = make(Huge("one.png"), pipeline=EVAL, batch_size=10, prefetch=2)
    loader.seek(3, 1_000_000)
    (batch,) = take(loader, 1)
    assert batch["img"].shape == (10, 3, *SIZE)
    loader.close()
    assert loader.samples_fed <= 10 * (1 + 2)


def test_seed_can_be_set(folder):
    loader = make(folder, seed=1)
    take(loader, 2)
    loader.seed = 5
    loader.seek(0, 0)
    assert_same(epochs(loader, 1), epochs(make(folder, seed=5), 1))


def test_only_the_newest_iterator_is_valid(folder):
    loader = make(folder)
    old = iter(loader)
    next(old)
    new = iter(loader)
    with pytest.raises(RuntimeError, match="no longer valid"):
        next(old)
    assert next(new)["gt_label"].tolist() == epoch_indices(N, seed=5, epoch=1)[:4].tolist()


# What is made ahead.


def test_the_next_epoch_is_made_ahead_where_that_is_allowed(folder):
    loader = make(folder, prefetch=3)
    loader.prefetch_over_epoch_end = True
    epochs(loader, 4)
    wait_until(lambda: loader.samples_fed == 4 * N + 3 * 4)
    loader.seek(4, 0)  # where it is anyway: the runners seek at every epoch
    epochs(loader, 1)
    wait_until(lambda: loader.samples_fed == 5 * N + 3 * 4)  # nothing was made twice


def test_the_next_epoch_is_ready_before_the_last_batch_is_used(folder):
    loader = make(folder, prefetch=2)
    loader.prefetch_over_epoch_end = True
    batches = iter(loader)
    for fed in (12, 16, 20, 23, 27):  # two batches ahead; the sixth has three samples
        next(batches)
        wait_until(lambda fed=fed: loader.samples_fed == fed)  # whoever takes batches that fast makes them, too
        threading.Event().wait(0.001)  # longer than it takes to hand over: a step
    wait_until(lambda: loader.num_ready == 2)  # the last of this epoch, the first of the next


def test_the_next_epoch_is_not_made_ahead_otherwise(folder):
    loader = make(folder, prefetch=3)
    assert loader.prefetch_over_epoch_end is False
    for epoch in range(3):
        assert len(list(loader)) == 6
        assert loader.samples_fed == (epoch + 1) * N


def test_it_can_be_forbidden_in_the_middle_of_an_epoch(folder):
    loader = make(folder, prefetch=2)
    loader.prefetch_over_epoch_end = True
    batches = iter(loader)
    next(batches)
    loader.prefetch_over_epoch_end = False
    assert len(list(batches)) == 5
    assert loader.samples_fed == N


def wait_until(condition, seconds: float = 20.0) -> None:
    """Give another thread time; fails by the final assertion."""
    tick = threading.Event()
    for _ in range(int(seconds / 0.005)):
        if condition():
            break
        tick.wait(0.005)
    assert condition()


# Memory and threads.


def test_batches_live_as_long_as_someone_holds_them(folder):
    loader = make(folder)
    held = [(batch["img"], batch["img"].clone()) for batch in epochs(loader, 3)]
    loader.close()
    del loader
    gc.collect()
    assert len({image.data_ptr() for image, _ in held}) == len(held)
    assert all(torch.equal(image, copy) for image, copy in held)


def test_writing_into_a_batch_changes_no_other(folder, three_epochs):
    loader = make(folder)
    seen = []
    for batch in loader:
        seen.append({name: value.clone() for name, value in batch.items()})
        batch["img"].fill_(7)
        batch["gt_label"].fill_(-1)
    assert_same(seen, three_epochs[:6])
    assert folder.labels.tolist() == list(range(N))


@pipeline_def
def passes_inputs_on():
    return sample_input("index"), sample_input("uniform", count=3), sample_input("label")


def test_inputs_that_come_out_unchanged_are_no_shared_memory(folder):
    options = {"pipeline": passes_inputs_on, "outputs": ("index", "noise", "gt_label")}
    held, copies = [], []
    for batch in epochs(make(folder, **options), 2):
        held.append(batch)
        copies.append({name: value.clone() for name, value in batch.items()})
        batch["index"][0] = -5
        copies[-1]["index"][0] = -5
    gc.collect()
    for batch, copy in zip(held, copies, strict=True):
        assert all(torch.equal(batch[name], copy[name]) for name in copy)
    again = torch.cat([batch["index"] for batch in epochs(make(folder, **options), 1)])
    assert again.tolist() == epoch_indices(N, seed=5, epoch=0).tolist()


def old_executor(**kwargs):
    """DALI's executor that keeps outputs only until the next run."""
    return passes_inputs_on(exec_dynamic=False, **kwargs)


def test_another_executor_s_batches_are_copied(folder):
    options = {"outputs": ("index", "noise", "gt_label")}
    wanted = epochs(make(folder, pipeline=passes_inputs_on, **options), 2)
    got = epochs(make(folder, pipeline=old_executor, **options), 2)
    for one, other in zip(got, wanted, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in other)


def num_threads() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.mark.parametrize("end", ["close", "forget", "leave", "error"])
def test_threads_end(folder, end):
    take(make(folder), 1)  # whatever DALI starts once a process
    gc.collect()
    before = num_threads()
    loader = make(folder, num_threads=2)
    batches = iter(loader)
    next(batches)
    assert num_threads() > before
    if end == "close":
        loader.close()
        loader.close()
        assert num_threads() == before
        assert len(list(loader)) == 6  # closed is not broken: the next epoch
    elif end == "leave":
        batches.close()
    elif end == "error":
        loader._producer._finish = None  # not callable: whatever goes wrong in the thread
        with pytest.raises(TypeError):
            list(batches)
        assert num_threads() == before
    del loader, batches
    gc.collect()
    assert num_threads() == before


def test_memory_is_steady(folder):
    page = os.sysconf("SC_PAGE_SIZE")

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * page

    loader = make(folder, prefetch=3)
    loader.prefetch_over_epoch_end = True
    for epoch in range(45):
        for _ in loader:
            pass
        loader.seek(epoch + 1, epoch % 2)  # every second time what was made ahead is dropped
        if epoch == 14:
            gc.collect()
            before = resident()
    gc.collect()
    # 30 epochs' images are 1.6 MB, their inputs 0.1: a leak of either would be seen; allocators keep less than that
    assert resident() - before < 1_000_000


def test_a_batch_is_freed_by_the_thread_that_makes_them(folder):
    """And not kept: behind the batch in use there is at most the one before, until the next is made."""
    loader = make(folder, prefetch=2)
    loader.prefetch_over_epoch_end = True
    batches = IterLoader(loader)
    for _ in range(12):
        batch = next(batches)
        wait_until(lambda: loader.num_ready == 2)
        lent = list(loader._producer._lent)
        assert len(lent) <= 2 + 2
        assert batch["img"].data_ptr() in [alias.data_ptr() for aliases in lent for alias in aliases]
    batches.close()


@pytest.mark.parametrize("what", ["nothing", "close", "collect", "iterate"])
def test_a_forked_child_ends(folder, what):
    """DALI's threads are the parent's: a DataLoader's workers must not wait for them."""
    loader = make(folder)
    batches = iter(loader)
    next(batches)
    if what == "collect":
        cycle: list = [loader, batches]
        cycle.append(cycle)
        del cycle, loader, batches
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if what == "close":
                loader.close()
            elif what == "collect":
                gc.collect()
            elif what == "iterate":
                with pytest.raises(RuntimeError, match="only in the process that started it"):
                    next(iter(loader))
            code = 0
        finally:
            os._exit(code)
    wait_until(lambda: os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None)
    assert os.waitpid(child, 0) == (child, 0)


def test_a_process_that_is_not_told_to_close_ends(folder):
    code = (
        "from fastrunner import DaliLoader\n"
        "class Files:\n"
        f"    files = {folder.files!r}\n"
        "    def __len__(self): return len(self.files)\n"
        "loader = DaliLoader(Files(), pipeline=dict(type='ClassificationTrain', size=16), batch_size=4)\n"
        "loader.prefetch_over_epoch_end = True\n"
        "batch = next(iter(loader))\n"
        "print(*batch['img'].shape)\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "4 3 16 16\n", "")


def test_importing_the_module_does_not_import_dali():
    code = "import sys, fastrunner.data.dali; print([m for m in sys.modules if m.startswith(('nvidia', 'numba'))])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


ROOT = Path(__file__).parents[2]
