"""T-SINT in a run: teacher, checks, logs, resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same_state, digits, module, state_of, trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_nrml.callbacks import PRISM, TSINT
from lightning_nrml.callbacks.tsint import follow
from lightning_nrml.filters.tsint import right_positives
from lightning_nrml.losses import CosineSoftmaxLoss
from lightning_nrml.models import MomentumTeacher
from lightning_nrml.modules import MetricLearning
from lightning_nrml.optim import OptimizerConfig, ScheduleConfig


def small(**kwargs: Any) -> MetricLearning:
    """No memory, and a schedule that fits the shortest of runs."""
    return module(**{"memory_size": 0, "schedule": ScheduleConfig("constant", 0), **kwargs})


def test_the_gap_to_a_constant_student_shrinks_by_the_momentum() -> None:
    student = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    teacher = MomentumTeacher(student)
    with torch.no_grad():
        student[0].weight += 1
        student[1].running_mean += 5
    for _ in range(7):
        follow(teacher, student, 0.9)
    gap = student[0].weight - teacher.module[0].weight
    torch.testing.assert_close(gap, torch.full_like(gap, 0.9**7))
    assert torch.equal(teacher.module[1].running_mean, student[1].running_mean)


class Watch(Callback):
    """Teacher and student after each step."""

    def __init__(self) -> None:
        self.teacher: list[torch.Tensor] = []
        self.student: list[torch.Tensor] = []
        self.start: list[torch.Tensor] = []
        self.training: set[bool] = set()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if not self.start:
            self.start = [pl_module.filter_teacher.module.head.weight.clone(), pl_module.head.weight.clone()]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.teacher.append(pl_module.filter_teacher.module.head.weight.clone())
        self.student.append(pl_module.head.weight.detach().clone())
        self.training.add(pl_module.filter_teacher.module.training)
        assert all(p.grad is None for p in pl_module.filter_teacher.parameters())
        assert outputs["selection"].pair_weight.shape == (32, 32)


def test_teacher_starts_as_the_student_and_follows_once_per_optimiser_step(tmp_path: Path) -> None:
    start = tmp_path / "start.pt"
    first = small()
    torch.save(
        {k: v + 0.01 for k, v in first.state_dict().items() if k.startswith(("backbone", "head"))}, start
    )
    watch, net = Watch(), small(init_weights=str(start))
    options = {"limit_train_batches": 4, "limit_val_batches": 0, "accumulate_grad_batches": 2}
    run = trainer(tmp_path, 1, [TSINT(teacher_momentum=0.8), watch], **options)
    run.fit(net, digits())
    assert torch.equal(watch.start[0], watch.start[1])  # after the start weights were applied
    assert not torch.equal(watch.start[0], first.head.weight)
    assert torch.equal(watch.teacher[0], watch.start[0])  # no optimiser step yet
    torch.testing.assert_close(watch.teacher[1], watch.start[0].lerp(watch.student[1], 0.2))
    assert torch.equal(watch.teacher[2], watch.teacher[1])
    torch.testing.assert_close(watch.teacher[3], watch.teacher[1].lerp(watch.student[3], 0.2))
    assert watch.training == {False}
    logged = run.callback_metrics
    assert 0 < float(logged["tsint/keep_positive"]) < 1
    assert float(logged["tsint/cut_positive"]) > 0
    assert float(logged["train/keep_rate"]) == 1  # samples are all kept


def test_frozen_teacher_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "teacher.pt"
    state = {k: v for k, v in module().state_dict().items() if k.startswith(("backbone", "head"))}
    weights = {k: v + 0.01 if v.is_floating_point() else v for k, v in state.items()}
    torch.save(weights, file)
    net = small()
    callback = TSINT(teacher_weights=str(file))
    trainer(tmp_path, 1, [callback], limit_train_batches=2, limit_val_batches=0).fit(net, digits())
    for key, value in net.filter_teacher.module.state_dict().items():
        assert torch.equal(value, weights[key]), key


def test_kept_pairs_are_cleaner_than_the_arithmetic_says(tmp_path: Path) -> None:
    net = small(optimizer=OptimizerConfig("adam", 3e-3))
    run = trainer(tmp_path, 4, [TSINT(0.5, teacher_momentum=0.9)], limit_val_batches=0)
    run.fit(net, digits(epoch_length=640))
    assert float(run.callback_metrics["noise/pair_precision"]) > right_positives(0.5, 10)


def test_two_halves_equal_the_whole(tmp_path: Path) -> None:
    def run(folder: Path, epochs: int, resume: Path | None = None):
        net = small()
        saver = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, auto_insert_metric_name=False)
        fit = trainer(folder, epochs, [TSINT(teacher_momentum=0.9), saver], limit_val_batches=0)
        fit.fit(net, digits(), ckpt_path=resume, weights_only=False if resume else None)
        return net

    whole = run(tmp_path, 2)
    resumed = run(tmp_path / "again", 2, tmp_path / "0.ckpt")
    assert_same_state(state_of(whole), state_of(resumed))
    keys = state_of(whole).keys()
    assert "filter_teacher.module.head.weight" in keys
    assert "filters.tsint.cuts" in keys
    # without the callback the teacher's state is left out, and nothing else is missing
    plain = trainer(tmp_path, 2, [], limit_val_batches=1)
    plain.validate(small(), digits(), ckpt_path=tmp_path / "0.ckpt", weights_only=False)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    options = {"limit_train_batches": 1, "limit_val_batches": 0}
    with pytest.raises(ValueError, match="set memory_size to 0"):
        trainer(tmp_path, 1, [TSINT()], **options).fit(small(memory_size=100), digits())
    net = small(loss=CosineSoftmaxLoss(10, 16))
    with pytest.raises(TypeError, match="takes no pair weights: use ContrastiveLoss"):
        trainer(tmp_path, 1, [TSINT()], **options).fit(net, digits())
    with pytest.raises(ValueError, match="teacher_momentum must lie in"):
        TSINT(teacher_momentum=1.1)
    with pytest.raises(ValueError, match="selects pairs of a batch"):
        TSINT(granularity="epoch")


def test_it_stacks_with_a_filter_of_samples(tmp_path: Path) -> None:
    net = small()
    trainer(tmp_path, 1, [PRISM(0.5), TSINT(teacher_momentum=0.9)], limit_val_batches=0).fit(net, digits())
    assert 0 < int(net.noise_ledger.dropped.sum()) < 256
    assert net.filters["tsint"].cuts.isfinite().all()
