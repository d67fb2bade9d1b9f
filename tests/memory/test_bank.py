"""FeatureBank: newest row per sample."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_nrml.memory import FeatureBank


def test_equals_a_loop_with_repeats_and_bad_rows():
    generator = torch.Generator().manual_seed(1)
    bank = FeatureBank(6, 3)
    want, epochs = torch.zeros(6, 3), [-1] * 6
    for epoch in range(8):
        index = torch.randint(0, 5, (9,), generator=generator)
        z = torch.randn(9, 3, generator=generator)
        z[torch.rand(9, generator=generator) < 0.3, 1] = math.nan
        keep = None if epoch == 0 else (torch.rand(9, generator=generator) - 0.3).clamp(min=0)  # weights
        bank.write(index, z, epoch, keep)
        for i, row, kept in zip(index.tolist(), z, [1.0] * 9 if keep is None else keep, strict=True):
            if row.isfinite().all() and kept:
                want[i], epochs[i] = row, epoch
    assert torch.equal(bank.embedding, want)
    assert bank.epoch_seen.tolist() == epochs
    assert bank.filled.tolist() == [e >= 0 for e in epochs]
    assert not bank.filled[5]


def test_sample_with_only_bad_rows_keeps_the_older_feature():
    bank = FeatureBank(2, 1)
    bank.write(torch.tensor([0]), torch.tensor([[3.0]]), 0)
    bank.write(torch.tensor([0, 0]), torch.tensor([[math.inf], [math.nan]]), 4)
    assert bank.embedding.tolist() == [[3.0], [0.0]]
    assert bank.epoch_seen.tolist() == [0, -1]
    assert bank.filled.tolist() == [True, False]


def test_half_precision_is_widened_and_gradient_dropped():
    bank = FeatureBank(2, 1)
    bank.write(torch.tensor([1]), torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True), 0)
    assert bank.embedding.dtype is torch.float32
    assert not bank.embedding.requires_grad
    assert bank.embedding[1] == 1


def test_state_round_trip_in_place():
    bank, other = FeatureBank(3, 2), FeatureBank(3, 2)
    pointers = {k: v.data_ptr() for k, v in bank.state_dict().items()}
    bank.write(torch.tensor([2]), torch.ones(1, 2), 1)
    assert {k: v.data_ptr() for k, v in bank.state_dict().items()} == pointers
    other.load_state_dict(bank.state_dict())
    assert torch.equal(bank.embedding, other.embedding)
    assert torch.equal(bank.epoch_seen, other.epoch_seen)


def test_errors_say_what_is_wrong():
    with pytest.raises(ValueError, match="'dim'"):
        FeatureBank(3, 0)
    bank = FeatureBank(3, 2)
    with pytest.raises(IndexError, match="3 samples, but got dataset index 7"):
        bank.write(torch.tensor([7]), torch.ones(1, 2), 0)
    with pytest.raises(ValueError, match="rows of 2 values"):
        bank.write(torch.tensor([0]), torch.ones(1, 3), 0)
    with pytest.raises(ValueError, match=r"'index' must have shape \(1,\)"):
        bank.write(torch.tensor([0, 1]), torch.ones(1, 2), 0)
    with pytest.raises(ValueError, match=r"'keep' must have shape \(1,\)"):
        bank.write(torch.tensor([0]), torch.ones(1, 2), 0, torch.ones(2))
