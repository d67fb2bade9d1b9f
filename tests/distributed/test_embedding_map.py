"""The map of two processes is that of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import digits, module
from test_callbacks import fake_trainer

from lightning_nrml import distributed
from lightning_nrml.callbacks import EmbeddingMap
from lightning_nrml.callbacks.balanced_sample import BalancedSample


def draw(split: Any, folder: str) -> None:
    """Draw each rank's part of the data together."""
    data, net = digits(eval_batch_size=100), module()
    run = fake_trainer(data)
    run.is_global_zero, run.loggers, run.default_root_dir = distributed.rank() == 0, [], folder
    callback = EmbeddingMap(split=split, max_samples=130)
    callback.setup(run, net, "validate")
    callback.on_validation_epoch_start(run, net)
    for batch in data.val_dataloader():
        callback.on_validation_batch_end(run, net, None, run.strategy.batch_to_device(batch), 0)
    callback.on_validation_epoch_end(run, net)


@pytest.mark.parametrize(("split", "name"), [("val", "embedding_map"), ("train", "embedding_map_train")])
def test_two_ranks_draw_what_one_draws(gloo_pool, tmp_path: Path, split: str, name: str) -> None:
    gloo_pool.run(draw, split, str(tmp_path / "two"))
    draw(split, str(tmp_path / "one"))
    two, one = (pd.read_csv(tmp_path / folder / f"{name}.csv") for folder in ("two", "one"))
    place = ["x", "y"]
    pd.testing.assert_frame_equal(two.drop(columns=place), one.drop(columns=place))
    assert len(two) == 130
    # batches of other sizes are rounded otherwise
    np.testing.assert_allclose(two[place], one[place], atol=1e-5)


def uneven() -> tuple[list[int], int, int, Any]:
    """Rank 1 has no rows; of the others one is repeated and one is not finite."""
    sample = BalancedSample(5, 2, 0)
    if distributed.rank() == 0:
        z = torch.arange(16.0).reshape(8, 2)
        z[1] = torch.nan
        sample.add(z, torch.tensor([0, 1, 2, 3, 4, 5, 6, 6]), torch.arange(8) % 3, torch.arange(8) % 2)
    found = sample.gathered(torch.device("cpu"))
    return found.index.tolist(), found.seen, found.not_finite, found.clean_label


def test_a_rank_without_rows(gloo_pool) -> None:
    want = uneven()
    for index, seen, not_finite, clean in gloo_pool.run(uneven):
        assert (index, seen, not_finite) == want[:3]
        assert len(index) == 5
        assert (seen, not_finite) == (8, 1)
        assert torch.equal(clean, want[3])
