"""What every stateful part promises: casts of the model do not reach its buffers."""

import pytest
import torch

from lightning_nrml.filters import PRISM, FixedFilter, NoiseFilter
from lightning_nrml.memory import FeatureBank, FeatureQueue, SampleLedger
from lightning_nrml.state import StateModule

PARTS = {
    "PRISM": lambda: PRISM(3, 4, memory_size=8),
    "FixedFilter": lambda: FixedFilter([True, False, True]),
    "FeatureQueue": lambda: FeatureQueue(8, 4),
    "FeatureBank": lambda: FeatureBank(8, 4),
    "SampleLedger": lambda: SampleLedger(8),
}


@pytest.mark.parametrize("name", PARTS)
def test_casting_the_model_keeps_the_dtypes_and_the_values(name):
    part = PARTS[name]()
    for buffer in part.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.1, 0.9)
    before = {k: v.clone() for k, v in part.named_buffers()}
    model = torch.nn.ModuleDict({"part": part, "layer": torch.nn.Linear(2, 2)})
    model.bfloat16().half().to(torch.bfloat16).double()
    assert model["layer"].weight.dtype is torch.float64
    assert len(before) > 0
    for key, value in part.named_buffers():
        assert value.dtype is before[key].dtype, key
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", PARTS)
def test_moving_the_model_moves_the_state(name):
    part = PARTS[name]()
    part.to("meta", torch.bfloat16)
    assert all(buffer.device.type == "meta" for buffer in part.buffers())
    assert not any(buffer.dtype is torch.bfloat16 for buffer in part.buffers())


def test_all_state_is_declared_equal_on_all_ranks():
    assert issubclass(NoiseFilter, StateModule)
    assert all(make().equal_on_all_ranks for make in PARTS.values())
