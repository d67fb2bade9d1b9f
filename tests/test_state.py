"""What every stateful part promises: casts of the model do not reach its buffers."""

import pytest
import torch
from filter_cases import FILTERS, MULTI_LABEL, stream

from lightning_nrml.filters import NoiseFilter
from lightning_nrml.filters.chain import FilterChain
from lightning_nrml.losses import MultiLabelELRLoss, MultiLabelSATLoss
from lightning_nrml.memory import CandidatePool, FeatureBank, FeatureQueue, LabelLedger, SampleLedger
from lightning_nrml.state import StateModule

CONTEXTS = stream()
PARTS = {
    **{name: make for name, make in {**FILTERS, **MULTI_LABEL}.items() if list(make().buffers())},
    "CandidatePool": lambda: CandidatePool(8, 4),
    "LabelLedger": lambda: LabelLedger(8, 3),
    "MultiLabelELRLoss": lambda: MultiLabelELRLoss(8, 3),
    "MultiLabelSATLoss": lambda: MultiLabelSATLoss(8, 3),
    "FeatureQueue": lambda: FeatureQueue(8, 4),
    "FeatureBank": lambda: FeatureBank(8, 4),
    "SampleLedger": lambda: SampleLedger(8),
}


@pytest.fixture(params=[torch.bfloat16, torch.float64])
def other_default(request):
    """What ``trainer.init_module()`` does in true half precision, or a user for a whole script."""
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", PARTS)
def test_the_type_of_the_state_is_not_that_of_the_default(name, other_default):
    part = PARTS[name]()
    found = {k: v.dtype for k, v in part.state_dict().items()}
    torch.set_default_dtype(torch.float32)
    assert found == {k: v.dtype for k, v in PARTS[name]().state_dict().items()}


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("mode", ["observe", "batch"])
def test_a_chain_decides_and_learns_alike_whatever_the_default(name, mode, other_default):
    def run():
        chain = FilterChain()
        chain["one"] = FILTERS[name]()
        chain.mode["one"] = mode
        for ctx in CONTEXTS:
            weight = chain.select(ctx).weight
            chain.commit()
        return {**chain.state_dict(), "weight": weight}

    got = run()
    torch.set_default_dtype(torch.float32)
    want = run()
    assert got.keys() == want.keys()
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=0, atol=0, equal_nan=True, msg=key)


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
