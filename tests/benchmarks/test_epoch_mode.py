"""What leaving dropped samples out of the epoch saves: images decoded and CPU time, beside batch granularity.

Run: ``OMP_NUM_THREADS=1 pytest tests/benchmarks/test_epoch_mode.py -m benchmark -s``.

The quickstart's setting (digits, half of the labels wrong, PRISM told so) for 8 epochs, at both
granularities in one process. In epoch mode a dropped sample is neither decoded nor forwarded until
its embedding is ``max_age`` = 5 epochs old. Process CPU time of the whole fit without evaluation.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from helpers import digits, module, trainer
from lightning.pytorch import Callback

from lightning_nrml.callbacks import PRISM

EPOCHS = 8


class Count(Callback):
    """Images that were served for training."""

    images = 0

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count a batch."""
        self.images += len(batch["index"])


def fit(folder: Path, granularity: str) -> tuple[int, float, float]:
    counter, filter = (
        Count(),
        PRISM(noise_rate=0.5, warmup_steps=40, granularity=granularity, save_ledger=False),
    )
    kwargs: dict[str, Any] = {"widths": [32, 64, 128], "strides": [1, 2, 2], "input_size": 8}
    net = module(backbone_kwargs=kwargs, embedding_dim=64, memory_size=1280)
    data = digits(batch_size=64, m_per_class=8, epoch_length=None)
    run = trainer(folder, EPOCHS, [counter, filter], limit_val_batches=0)
    start = time.process_time()
    run.fit(net, data)
    return counter.images, time.process_time() - start, float(run.callback_metrics["noise/precision"])


@pytest.mark.benchmark
@pytest.mark.timeout(1200)
def test_images_and_time_saved(tmp_path):
    found = {name: fit(tmp_path / name, name) for name in ("batch", "epoch")}
    print(f"\n{EPOCHS} epochs of digits, half of the labels wrong")
    batch, seconds, _ = found["batch"]
    for name, (images, own, precision) in found.items():
        print(f"{name:6s} {images:7d} images, {images / batch:.2f}; CPU {own / seconds:.2f} of batch")
        print(f"       keep precision of the last epoch {precision:.3f}")
    assert found["epoch"][0] < 0.9 * batch
