"""The pool itself: results in rank order, failures reported, and the pool usable afterwards."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from pool import WorkerError
from torch import Tensor

from lightning_nrml import distributed


def gather_scaled(x: Tensor) -> Tensor:
    return distributed.gather(x * (distributed.rank() + 1))


def fail_on(rank: int) -> int:
    if dist.get_rank() == rank:
        raise KeyError("on purpose")
    dist.barrier()
    return os.getpid()


def fail_on_both() -> None:
    raise KeyError("on purpose")


def hang() -> None:
    if dist.get_rank() == 0:
        dist.barrier()


def pid() -> int:
    return os.getpid()


def test_results_come_in_rank_order(gloo_pool):
    for got in gloo_pool.run(gather_scaled, torch.tensor([1.0, 2.0])):
        torch.testing.assert_close(got, torch.tensor([1.0, 2.0, 2.0, 4.0]))


def test_workers_are_reused_also_after_a_failure_on_both_ranks(gloo_pool):
    before = gloo_pool.run(pid)
    assert len({*before, os.getpid()}) == 3
    with pytest.raises(WorkerError, match="on purpose"):
        gloo_pool.run(fail_on_both)
    assert gloo_pool.run(pid) == before


def test_failure_on_one_rank_is_reported_and_the_pool_goes_on(gloo_pool, monkeypatch):
    monkeypatch.setattr("pool.GRACE", 0.2)
    with pytest.raises(WorkerError, match=r"rank 1:\n.*Traceback(.|\n)*on purpose"):
        gloo_pool.run(fail_on, 1)
    assert len(gloo_pool.run(fail_on, -1)) == 2


def test_hanging_function_times_out_and_the_pool_goes_on(gloo_pool):
    with pytest.raises(WorkerError, match="rank 0:\nno result in time"):
        gloo_pool.run(hang, timeout=0.5)
    assert len(gloo_pool.run(pid)) == 2


def test_only_named_functions_are_accepted(gloo_pool):
    with pytest.raises(ValueError, match="top level"):
        gloo_pool.run(lambda: 1)
