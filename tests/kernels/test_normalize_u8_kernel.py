"""uint8 -> floats has the reference's bits in every pair of memory formats."""

from __future__ import annotations

import pytest
import torch
from fastrunner.kernels.normalize_u8 import normalize_u8, normalize_u8_reference

FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("given", FORMATS)
@pytest.mark.parametrize("wanted", FORMATS)
# One pixel; a tail; below, at and above one block; several blocks; no images.
@pytest.mark.parametrize(
    "shape", [(2, 3, 1, 1), (2, 3, 7, 5), (1, 1, 3, 21), (2, 3, 8, 8), (1, 4, 5, 13), (0, 3, 4, 4)]
)
def test_same_bits(
    device: torch.device, shape: tuple[int, ...], given: torch.memory_format, wanted: torch.memory_format
) -> None:
    x = torch.randint(0, 256, shape, dtype=torch.uint8, device=device).contiguous(memory_format=given)
    mean, inv_std = torch.rand(shape[1], device=device) * 255, torch.rand(shape[1], device=device)
    found = normalize_u8(x, mean, inv_std, dtype=torch.float32, memory_format=wanted, block=64)
    assert torch.equal(found, normalize_u8_reference(x, mean, inv_std, dtype=torch.float32))
    assert found.is_contiguous(memory_format=wanted)


@pytest.mark.parametrize(("dtype", "ulp"), [(torch.bfloat16, 2.0**-7), (torch.float16, 2.0**-10)])
def test_16_bits(device: torch.device, dtype: torch.dtype, ulp: float) -> None:
    x = torch.randint(0, 256, (2, 3, 9, 11), dtype=torch.uint8, device=device)
    mean, inv_std = torch.tensor([123.675, 116.28, 103.53], device=device), torch.full((3,), 1 / 58.0, device=device)
    found = normalize_u8(x, mean, inv_std, dtype=dtype, block=64)
    exact = normalize_u8_reference(x, mean, inv_std, dtype=torch.float64)
    assert found.dtype == dtype
    # Triton's interpreter truncates where a GPU rounds: off by one unit in the last place.
    torch.testing.assert_close(found.double(), exact, rtol=ulp, atol=1e-6)


def test_a_view_of_hwc_images(device: torch.device) -> None:
    hwc = torch.randint(0, 256, (2, 6, 5, 3), dtype=torch.uint8, device=device)
    zero, one = torch.zeros(3, device=device), torch.ones(3, device=device)
    found = normalize_u8(hwc.permute(0, 3, 1, 2), zero, one, dtype=torch.float32, block=64)
    assert torch.equal(found, hwc.permute(0, 3, 1, 2).float())


def test_bad_input() -> None:
    x, mean = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(3)
    with pytest.raises(TypeError, match="must be uint8"):
        normalize_u8(x.float(), mean, mean)
    for other in (x[0], x[..., ::2], x.permute(0, 2, 3, 1)[..., :2]):
        with pytest.raises(ValueError, match="contiguous or channels_last"):
            normalize_u8(other, mean, mean)
    for bad in (torch.zeros(4), torch.zeros(3, dtype=torch.float64), torch.zeros(3, device="meta")):
        with pytest.raises(ValueError, match="inv_std must be float32"):
            normalize_u8(x, mean, bad)
