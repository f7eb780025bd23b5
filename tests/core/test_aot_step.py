"""Compiled steps driven through AOTInductor's C symbols; the library is a small one in C, made in a moment."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fastrunner._core import AotLibrary, AotStep

SOURCE = Path(__file__).parent / "aot_library.c"


def build(folder, *flags):
    path = folder / f"library{''.join(flags)}.so"
    torch_lib = Path(torch.__file__).parent / "lib"
    made_of = [
        *flags,
        str(SOURCE),
        "-o",
        str(path),
        f"-L{torch_lib}",
        "-l:libtorch_cpu.so",
        "-Wl,--allow-shlib-undefined",
    ]
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", *made_of], check=True)
    return str(path)


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    return build(tmp_path_factory.mktemp("aot"))


class Case:
    def __init__(self, path):
        self.p, self.row = torch.nn.Parameter(torch.zeros(3)), torch.zeros(2, dtype=torch.float64)
        self.batch = {"x": torch.tensor([1.0, 2.0, 3.0])}
        self.row[0] = 0.5
        self.step = AotStep(AotLibrary(path), [self.p.detach(), self.row], [self.p], self.row, self.batch)


@pytest.fixture
def case(library):
    return Case(library)


def test_a_call_writes_in_place_and_bumps_versions_once(case):
    before, row = case.p._version, case.row._version
    loss, number, again = case.step(case.batch)
    assert case.p.tolist() == [0.5, 1.0, 1.5]
    assert (loss.item(), loss.dtype, loss.shape) == (3.0, torch.float32, ())
    assert again is loss  # the library gave one handle twice
    assert (number.item(), number.dtype) == (6, torch.int64)  # torch's number of float32
    assert case.p._version == before + 1
    assert case.row._version == row


def test_a_graph_from_before_a_call_is_void(case):
    product = (case.p * case.p).sum()
    case.step(case.batch)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.zeros(2)},
        {"x": torch.zeros(3, 1)},
        {"x": torch.zeros(6)[::2]},
        {"x": torch.zeros(3, dtype=torch.float64)},
        {"x": torch.zeros(3, requires_grad=True)},
        {"x": torch.nn.Parameter(torch.zeros(3), requires_grad=False)},
        {"x": torch.zeros(3, device="meta")},
        {"x": torch.zeros(3).to_sparse()},
        {"x": 1.0},
        {"y": torch.zeros(3)},
        {1: torch.zeros(3)},
        {"x": torch.zeros(3), "y": torch.zeros(3)},
        {},
        [torch.zeros(3)],
        (torch.zeros(3),),
        None,
    ],
    ids=str,
)
def test_another_kind_of_batch_runs_nothing(case, other):
    assert case.step(other) is None
    rows, scalars = torch.zeros(1, 2, dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64)
    assert case.step.burst([other], rows, scalars) == (0, [], "")
    assert case.p.tolist() == [0, 0, 0]
    assert case.p._version == 0


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_sequence_is_a_batch_too(library, kind):
    p, row = torch.zeros(3), torch.ones(1, dtype=torch.float64)
    step = AotStep(AotLibrary(library), [p, row], [], row, kind([torch.ones(3)]))
    assert step(kind([torch.ones(3)]))[0].item() == 3
    assert step({"x": torch.ones(3)}) is None


def test_an_equal_key_that_is_another_object_fits(case):
    assert case.step({"".join(["", "x"]): torch.ones(3)}) is not None


def test_a_failure_is_an_exception_with_the_library_s_words(case):
    with pytest.raises(RuntimeError, match="x is negative"):
        case.step({"x": torch.tensor([-1.0, 0, 0])})
    assert case.step(case.batch) is not None


def burst(case, xs, seconds=10.0, first=0.0):
    batches = [{"x": torch.tensor(x)} for x in xs]
    rows = torch.stack([torch.tensor([i + 1.0, 0], dtype=torch.float64) for i in range(len(xs))])
    scalars = torch.full((len(xs), 3), -1.0, dtype=torch.float64)
    return case.step.burst(batches, rows, scalars, seconds), scalars


def test_a_burst_is_calls_one_after_the_other(case, library):
    xs = torch.rand(7, 3).tolist()
    (done, outputs, why), scalars = burst(case, xs)
    one = Case(library)
    losses = []
    for i, x in enumerate(xs):
        one.row[0] = i + 1
        losses.append(one.step({"x": torch.tensor(x)})[0].item())
    assert (done, why) == (7, "")
    assert torch.equal(case.p, one.p)
    assert scalars.tolist() == [[loss, 6, loss] for loss in losses]
    assert outputs[0].item() == losses[-1]
    assert outputs[2] is outputs[0]
    assert case.p._version == 1


def test_a_burst_stops_at_the_first_failure(case):
    (done, outputs, why), scalars = burst(case, [[1.0, 1, 1], [1.0, 1, 1], [-1.0, 1, 1], [1.0, 1, 1]])
    assert (done, why) == (2, "x is negative")
    assert case.p.tolist() == [3, 3, 3]
    assert outputs[0].item() == 9
    assert scalars[2:].eq(-1).all()
    assert case.row[0] == 3  # of the iteration that failed
    (done, outputs, why), _ = burst(case, [[-1.0, 1, 1]])
    assert (done, outputs, why) == (0, [], "x is negative")


def test_a_burst_stops_before_a_batch_of_another_kind(case):
    rows, scalars = torch.ones(3, 2, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64)
    done, _, why = case.step.burst([case.batch, {"x": torch.zeros(2)}, case.batch], rows, scalars)
    assert (done, why) == (1, "")
    assert scalars[1:].eq(0).all()


def test_a_burst_ends_in_time(case):
    slow = [0.0, 4000, 0]  # 4 ms
    (done, _, why), _ = burst(case, [slow] * 50, seconds=0.02)
    assert 1 <= done <= 5  # fewer where the machine was busy elsewhere
    assert why == ""
    (done, _, _), _ = burst(case, [slow] * 3, seconds=0.0)
    assert done == 1  # one always


def test_an_empty_burst(case):
    rows, scalars = torch.zeros(0, 2, dtype=torch.float64), torch.zeros(0, 3, dtype=torch.float64)
    assert case.step.burst([], rows, scalars) == (0, [], "")


@pytest.mark.parametrize(
    ("rows", "scalars", "name"),
    [
        (torch.zeros(1, 3, dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64), "rows"),
        (torch.zeros(1, 2), torch.zeros(1, 3, dtype=torch.float64), "rows"),
        (torch.zeros(0, 2, dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64), "rows"),
        (torch.zeros(1, 2, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64).t()[:2], "scalars"),
        (torch.zeros(2, dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64), "rows"),
    ],
)
def test_tables_of_another_shape_are_refused(case, rows, scalars, name):
    with pytest.raises(ValueError, match=name):
        case.step.burst([case.batch], rows, scalars)


def test_what_cannot_be_bound_is_refused(library):
    p, row, batch = torch.zeros(3), torch.zeros(2, dtype=torch.float64), [torch.zeros(3)]
    made = AotLibrary(library)
    assert (made.num_inputs, made.num_outputs) == (3, 3)
    for bound, of, given, says in [
        ([p], row, batch, "row is not among"),
        ([p, row, p], row, batch, "takes 3 tensors, not 4"),
        ([p, p], p, batch, "float64"),
        ([p, row], row, torch.zeros(3), "a dict, a list or a tuple"),
        ([p, row], row, [1.0], "tensors only"),
        ([p.to_sparse(), row], row, batch, "strided"),
        ([p.to("meta"), row], row, batch, "on the CPU"),
    ]:
        with pytest.raises(ValueError, match=says):
            AotStep(made, bound, [], of, given)


def test_a_file_that_is_no_such_library_is_refused(tmp_path, library):
    with pytest.raises(RuntimeError, match=r"No such file|cannot open"):
        AotLibrary(str(tmp_path / "none.so"))
    text = tmp_path / "text.so"
    text.write_text("no library")
    with pytest.raises(RuntimeError, match=r"text\.so"):
        AotLibrary(str(text))
    (tmp_path / "empty.c").write_text("int nothing;")
    subprocess.run(["gcc", "-shared", "-fPIC", "empty.c", "-o", "empty.so"], check=True, cwd=tmp_path)
    with pytest.raises(RuntimeError, match="no library of AOTInductor"):
        AotLibrary(str(tmp_path / "empty.so"))
    with pytest.raises(RuntimeError, match="the constants are gone"):
        AotLibrary(build(tmp_path, "-DBROKEN"))
    with pytest.raises(RuntimeError, match="no_torch_has_this"):
        AotLibrary(build(tmp_path, "-DFOREIGN"))


def test_tensors_live_as_long_as_the_step_and_no_longer(case):
    watched = [weakref.ref(case.batch["x"]), weakref.ref(case.p), weakref.ref(case.row)]
    case.step(case.batch)
    burst(case, [[1.0, 1, 1]])
    case.batch = None
    gc.collect()
    assert [ref() is None for ref in watched] == [True, False, False]
    memory = case.p.data_ptr()
    step, case.p, case.row = case.step, None, None
    gc.collect()
    (loss, *_) = step({"x": torch.ones(3)})  # the memory is still there
    assert memory
    assert loss.isfinite()
    del step, case.step
    gc.collect()
    assert all(ref() is None for ref in watched)


@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer keeps what was freed")
def test_handles_do_not_add_up(case):
    """Each iteration makes and drops five handles of 8 to 16 bytes and two tensors: a leak of any shows."""
    rows, scalars = torch.zeros(100, 2, dtype=torch.float64), torch.zeros(100, 3, dtype=torch.float64)
    bad = {"x": torch.tensor([-1.0, 0, 0])}

    def work():
        for _ in range(30):
            case.step.burst([case.batch] * 100, rows, scalars)
            case.step.burst([case.batch, bad], rows, scalars)
            for _ in range(50):
                case.step(case.batch)
                case.step({"x": None})
            with pytest.raises(RuntimeError):
                case.step(bad)

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    for _ in range(3):
        work()
    before = resident()
    for _ in range(10):
        work()
    assert resident() - before < 1_000_000  # 45,000 iterations: a handle each would be 1.4 MB, a tensor 9 MB


def test_one_thread_at_a_time(case):
    case.step({"x": torch.tensor([0.0, 2000, 0])})  # so long that the next one lets go of the GIL
    slow = {"x": torch.tensor([0.0, 200_000, 0])}
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(case.step, slow) for _ in range(2)]
    (error,) = [error for run in runs if (error := run.exception())]
    assert "in another thread" in str(error)
    assert case.step(case.batch) is not None


def test_without_libtorch_s_functions_there_is_no_step(library):
    code = f"import torch; from fastrunner._core import AotLibrary; AotLibrary({library!r})"
    env = {**os.environ, "FASTRUNNER_HANDLES": "off"}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert "this torch lacks functions of AOTInductor's interface" in run.stderr
