"""Products that must not be rounded."""

import pytest
import torch

from lightning_nrml.precision import exact_products

BACKENDS = {"cpu": torch.backends.mkldnn.matmul, "cuda": torch.backends.cuda.matmul}


@pytest.mark.parametrize("device", BACKENDS)
@pytest.mark.parametrize("wish", ["high", "medium"])
def test_global_wish_is_overruled_inside_and_restored(device, wish):
    torch.set_float32_matmul_precision(wish)
    try:
        before = BACKENDS[device].fp32_precision
        assert before != "ieee"
        with exact_products(device):
            assert BACKENDS[device].fp32_precision == "ieee"
        assert BACKENDS[device].fp32_precision == before
        assert torch.get_float32_matmul_precision() == wish
    finally:
        torch.set_float32_matmul_precision("highest")


def test_wish_for_one_backend_is_overruled_and_restored():
    backend = BACKENDS["cuda"]
    before = backend.fp32_precision
    backend.fp32_precision = "tf32"
    try:
        with pytest.raises(RuntimeError, match="mix"):
            torch.get_float32_matmul_precision()  # why the global setting is not used
        with exact_products("cuda"):
            assert backend.fp32_precision == "ieee"
        assert backend.fp32_precision == "tf32"
    finally:
        backend.fp32_precision = before


def test_autocast_is_off_inside():
    x = torch.randn(4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x @ x).dtype is torch.bfloat16
        with exact_products("cpu"):
            assert (x @ x).dtype is torch.float32
        assert (x @ x).dtype is torch.bfloat16
