"""LogBuffer against numpy's weighted mean and MMCV's contract."""

from __future__ import annotations

from collections import OrderedDict, defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastrunner import LogBuffer
from fastrunner.log.history import History, last_means

VALUES = st.lists(st.tuples(st.floats(-1e6, 1e6, width=32), st.integers(1, 512)), min_size=1, max_size=60)


@given(VALUES, st.integers(0, 70), st.booleans())
def test_average_is_the_weighted_mean_of_the_last_n(rows, n, as_tensors):
    buffer = LogBuffer()
    for value, count in rows:
        buffer.update({"loss": torch.tensor(value) if as_tensors else value}, count)
    buffer.average(n)
    last = rows[-n:] if n else rows
    expected = np.average([v for v, _ in last], weights=[c for _, c in last])
    # both sum float64, in another order: 60 terms of up to 1e6 * 512
    assert buffer.output["loss"] == pytest.approx(expected, rel=1e-12, abs=1e-9)
    assert buffer.ready


def test_keys_average_their_own_entries_and_keep_their_order():
    buffer = LogBuffer()
    buffer.update({"b": 1.0, "a": 10.0})
    buffer.update({"a": 20.0})
    buffer.update({"c": 5.0})
    buffer.average(1)
    assert list(buffer.output.items()) == [("b", 1.0), ("a", 20.0), ("c", 5.0)]


def test_histories_are_floats_whatever_was_logged():
    buffer = LogBuffer()
    weight = torch.ones(2, requires_grad=True)
    buffer.update({"loss": (weight * 2).sum(), "acc": torch.tensor([0.5]), "n": np.float32(3), "bf": torch.tensor(1.5).bfloat16()}, 4)  # fmt: skip # noqa: E501
    assert buffer.val_history == {"loss": [4.0], "acc": [0.5], "n": [3.0], "bf": [1.5]}
    assert buffer.n_history["loss"] == [4]
    assert all(type(v) is float for history in buffer.val_history.values() for v in history)


def test_a_logged_loss_does_not_keep_its_graph():
    buffer = LogBuffer()
    weight = torch.ones(2, requires_grad=True)
    loss = (weight * 2).sum()
    buffer.update({"loss": loss})
    assert buffer._rows[0][1]["loss"].grad_fn is None
    assert loss.grad_fn is not None


def test_a_dict_that_is_reused_by_the_model_is_not_aliased():
    buffer, log_vars = LogBuffer(), {"loss": 1.0}
    buffer.update(log_vars)
    log_vars["loss"] = 2.0
    buffer.update(log_vars)
    assert buffer.val_history["loss"] == [1.0, 2.0]


def test_window_bounds_memory_and_keeps_what_is_averaged():
    buffer = LogBuffer()
    buffer.window = 50
    for i in range(10_000):
        buffer.update({"i": float(i)})
    assert 50 <= len(buffer.val_history["i"]) < 50 + 2 * 1024
    buffer.average(50)
    assert buffer.output["i"] == np.mean(range(9_950, 10_000))


def test_memory_is_bounded_even_if_nobody_looks():
    buffer = LogBuffer()
    buffer.window = 10
    for _ in range(5_000):
        buffer.update({"loss": torch.tensor(1.0)})
    assert len(buffer.val_history["loss"]) < 1_100


def test_total_weight_zero_is_nan_not_an_error():
    buffer = LogBuffer()
    buffer.update({"loss": 1.0}, 0)
    buffer.average()
    assert np.isnan(buffer.output["loss"])


def test_clear_output_keeps_histories_and_clear_does_not():
    buffer = LogBuffer()
    buffer.update({"loss": 1.0})
    buffer.average()
    buffer.clear_output()
    assert (dict(buffer.output), buffer.ready, dict(buffer.val_history)) == ({}, False, {"loss": [1.0]})
    buffer.clear()
    assert not buffer.val_history


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda b: b.update([("loss", 1.0)]), TypeError, "log_vars must be a dict"),
        (lambda b: b.average(-1), ValueError, "n must be >= 0"),
        (
            lambda b: (b.update({"masks": torch.ones(3)}), b.average()),
            ValueError,
            r"log_vars\['masks'\] has shape \(3,\)",
        ),
    ],
)
def test_bad_input(call, error, says):
    with pytest.raises(error, match=says):
        call(LogBuffer())


@given(
    st.lists(st.tuples(st.sets(st.sampled_from("abc"), min_size=1), st.integers(1, 3)), max_size=40), st.integers(0, 9)
)
def test_keys_that_come_and_go_keep_their_order(rows, every):
    buffer, expected = LogBuffer(), {}
    for i, (keys, count) in enumerate(rows):
        buffer.update({key: torch.tensor(float(i)) if key == "a" else i for key in sorted(keys)}, count)
        for key in keys:
            expected.setdefault(key, []).append((float(i), count))
        if every and i % every == 0:
            assert buffer.val_history.keys() == expected.keys()
    got = {k: list(zip(v, buffer.n_history[k], strict=True)) for k, v in buffer.val_history.items()}
    assert got == expected


def whole(buffer, i):
    """A row of a whole iteration, as the plan appends it."""
    buffer.append((4, {"loss": torch.tensor(float(i))}, 0.5, 1.5, torch.tensor(2.0 * i)))


def test_rows_of_whole_iterations_equal_single_updates():
    mixed, single = LogBuffer(), LogBuffer()
    for i in range(9):
        if i % 4:
            whole(mixed, i)
        for buffer in (single,) if i % 4 else (mixed, single):
            buffer.update({"data_time": 0.5})
            buffer.update({"loss": torch.tensor(float(i))}, 4)
            buffer.update({"grad_norm": torch.tensor(2.0 * i)}, 4)
            buffer.update({"time": 1.5})
    assert list(mixed.val_history.items()) == list(single.val_history.items())
    assert mixed.n_history == single.n_history


def test_a_tensor_that_changes_in_place_is_copied_from_the_start_if_that_shows():
    buffer, total = LogBuffer(), torch.zeros(())
    for i in range(5):
        total.add_(i)
        buffer.update({"total": total, "loss": torch.tensor(float(i))})
    assert buffer.val_history["total"] == [0.0, 1.0, 3.0, 6.0, 10.0]


def test_a_tensor_that_changes_later_is_named_and_copied_from_then_on():
    buffer, loss = LogBuffer(), torch.ones(())
    buffer.update({"loss": loss})
    loss.mul_(2)
    with pytest.warns(UserWarning, match=r"log_vars\['loss'\] was changed in place"):
        assert buffer.val_history["loss"] == [2.0]
    buffer.update({"loss": loss})
    loss.mul_(2)
    assert buffer.val_history["loss"] == [2.0, 2.0]


def test_a_value_that_needs_a_gradient_only_later_is_detached_from_the_next_look_on():
    buffer, weight = LogBuffer(), torch.ones((), requires_grad=True)
    buffer.update({"loss": torch.ones(())})
    buffer.update({"loss": weight * 3})
    assert buffer.val_history["loss"] == [1.0, 3.0]
    buffer.update({"loss": weight * 3})
    assert buffer._rows[0][1]["loss"].grad_fn is None


@given(VALUES, st.integers(0, 70))
def test_averages_on_another_device_equal_those_on_the_host(rows, n):
    """No device here: its part of the histories is filled by hand, as ``extend`` would fill it."""
    host, device = History("x"), History("x")
    values, counts = [torch.tensor(v) for v, _ in rows], [c for _, c in rows]
    host.extend(values, counts)
    device.counts.extend(counts)
    device._tail.append(torch.stack(values).double())
    expected, mean = last_means([host], n), last_means([device], n)
    assert mean[0] == pytest.approx(expected[0], rel=1e-12, abs=1e-9)  # float64, summed in another order
    assert device.floats() == host.floats()


@given(st.lists(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=300), min_size=1, max_size=4))
def test_averages_of_several_keys_have_the_bits_of_one_by_one(columns):
    length = min(map(len, columns))
    histories = []
    for column in columns:
        histories.append(History("x"))
        histories[-1].extend(column[:length], range(1, length + 1))
    counts = np.arange(1, length + 1)
    each = [np.sum(np.array(c[:length]) * counts) / np.sum(counts) for c in columns]
    assert last_means(histories, 0) == each


@given(st.integers(0, 1500), st.integers(1, 5), st.booleans())
def test_iterations_of_one_call_equal_their_rows(before, length, clips):
    many, single = LogBuffer(), LogBuffer()
    many.window = single.window = 10
    for buffer in (many, single):
        for i in range(before):
            whole(buffer, i)
    values = [0.1 * i for i in range(length)]
    many.append_many(4, {"loss": values, "b": values}, 0.5, 1.5, values if clips else None)
    for value in values:
        row = (4, {"loss": value, "b": value}, 0.5, 1.5)
        single.append((*row, value) if clips else row)
    for buffer in (many, single):
        buffer.average(length)
    assert list(many.output.items()) == list(single.output.items())
    assert many.val_history == single.val_history
    assert many.n_history == single.n_history


def test_keys_that_iterations_have_anyway_cannot_be_columns():
    with pytest.raises(ValueError, match="cannot be columns"):
        LogBuffer().append_many(1, {"time": [1.0]}, 0.5, 1.5, None)


class Lower(dict):
    """Not one of Python's own kinds."""


KINDS = (dict, OrderedDict, lambda items: defaultdict(float, items), Lower)


@given(
    st.lists(
        st.tuples(st.sampled_from(KINDS), st.permutations("abc"), st.integers(1, 3), st.integers(1, 9), st.booleans()),
        max_size=12,
    )
)
def test_rows_of_any_kind_of_dict_equal_single_updates(rows):
    """Keys in another order, keys that are missing, whole iterations among single values."""
    mixed, single = LogBuffer(), LogBuffer()
    for i, (kind, keys, length, count, is_whole) in enumerate(rows):
        vars = {key: torch.tensor(float(i)) if key == "a" else 0.1 * i for key in keys[:length]}
        if is_whole:
            mixed.append((count, kind(vars.items()), 0.5, 1.5, 2.0 * i))
        else:
            mixed.update(kind(vars.items()), count)
        single.update({"data_time": 0.5}) if is_whole else None
        for key, value in vars.items():
            single.update({key: value}, count)
        if is_whole:
            single.update({"grad_norm": 2.0 * i}, count)
            single.update({"time": 1.5})
    assert list(mixed.val_history.items()) == list(single.val_history.items())
    assert mixed.n_history == single.n_history


@given(
    st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=300),
    st.one_of(st.integers(0, 1000), st.just(0.3)),
    st.integers(0, 9),
)
def test_one_weight_throughout_gives_the_bits_of_many(values, weight, other_at):
    """The mean as mmcv takes it, whether its weights were written out or not."""
    counts = [weight] * len(values)
    if other_at < len(values) // 2:
        counts[other_at] = 7
    history = History("x")
    history.extend(values, counts)
    with np.errstate(invalid="ignore", divide="ignore"):
        expected = np.sum(np.array(values) * np.array(counts)) / np.sum(counts)
    np.testing.assert_equal(last_means([history], 0)[0], expected)


@pytest.mark.parametrize("key", ["grad_norm", "time", "data_time"])
def test_a_key_that_the_model_logs_too_keeps_the_order_it_came_in(key):
    whole_rows, single = LogBuffer(), LogBuffer()
    for i in range(5):
        whole_rows.append((2, {key: 100.0 + i, "loss": 1.0}, 0.5, 1.5, 2.0 * i))
        for vars, count in (({"data_time": 0.5}, 1), ({key: 100.0 + i, "loss": 1.0}, 2), ({"grad_norm": 2.0 * i}, 2), ({"time": 1.5}, 1)):  # fmt: skip # noqa: E501
            single.update(vars, count)
    assert whole_rows.val_history == single.val_history
    assert whole_rows.n_history == single.n_history


def test_counts_need_not_be_whole():
    buffer = LogBuffer()
    buffer.update({"loss": 1.0}, 0.5)
    buffer.update({"loss": 4.0}, 1.0)
    buffer.average()
    assert buffer.output["loss"] == 3.0
