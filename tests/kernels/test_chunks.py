"""The list of chunks covers every element once, and tensors that cannot be walked over are found."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from fastrunner.kernels.chunks import check_lists, chunk_rows, dense, same_order


@hypothesis.given(st.lists(st.integers(0, 200), max_size=5), st.sampled_from([16, 32, 64]))
def test_chunks_cover_each_element_once(numels: list[int], chunk: int) -> None:
    seen = [[0] * n for n in numels]
    rows = chunk_rows(numels, list(range(len(numels))), chunk=chunk)
    assert rows.shape[1] == 4
    for tensor, group, first, length in rows.tolist():
        assert group == tensor
        assert 0 < length <= chunk
        assert first % chunk == 0
        for i in range(first, first + length):
            seen[tensor][i] += 1
    assert all(count == 1 for counts in seen for count in counts)


def test_chunks_name_the_columns_they_are_given() -> None:
    assert chunk_rows([5, 0, 7], [0, 0, 1], tensors=[8, 6, 3], chunk=16).tolist() == [[8, 0, 0, 5], [3, 1, 0, 7]]


@pytest.mark.parametrize("chunk", [0, -16, 8, 17])
def test_chunks_that_would_be_unaligned_are_refused(chunk: int) -> None:
    with pytest.raises(ValueError, match="positive multiple of 16"):
        chunk_rows([1], [0], chunk=chunk)


def test_which_tensors_are_dense() -> None:
    t = torch.zeros(2, 3, 4, 5)
    for full in (t, t.to(memory_format=torch.channels_last), t.permute(3, 1, 0, 2), t[:1], torch.zeros(()), t[:0]):
        assert dense(full)
    for gaps in (t[:, :2], t[..., ::2], torch.zeros(1).expand(7), t[0, :, 0]):
        assert not dense(gaps)


def test_which_tensors_lie_alike() -> None:
    t = torch.zeros(2, 3, 4, 5)
    assert same_order(t, torch.zeros(2, 3, 4, 5))
    assert same_order(torch.zeros(4, 1), torch.zeros(4).as_strided((4, 1), (1, 77)))  # a dimension of 1 has any stride
    assert not same_order(t, t.to(memory_format=torch.channels_last))
    assert not same_order(t[..., ::2], t[..., ::2])


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        (([torch.zeros(2)], []), "differ in length"),
        (([torch.zeros(2), torch.zeros(2, dtype=torch.float64)],), "tensor 1 is torch.float64"),
        (([torch.zeros(2)], [torch.zeros(3)]), r"tensor 0: shape \(3,\)"),
        (([torch.zeros(4)[::2]],), "must be dense"),
        (([torch.zeros(2), torch.zeros(2, device="meta")],), "tensor 1 is on meta"),
    ],
)
def test_lists_that_do_not_go_together(lists: tuple[list[torch.Tensor], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_lists(*lists)
