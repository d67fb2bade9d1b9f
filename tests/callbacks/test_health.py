"""Health callback: logged values are those of the metrics, and a collapse is told once."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from helpers import assert_same_state, digits, module, state_of, trainer

from lightning_nrml.callbacks import RepresentationHealth
from lightning_nrml.data.views import SimCLRViews
from lightning_nrml.metrics import alignment, embedding_std, rankme, uniformity
from lightning_nrml.modules import MetricLearning

VIEWS = {"crop_scale": (0.5, 1.0), "flip": 0.0, "jitter_p": 0.0, "grayscale": 0.0, "blur": 0.0}


class Collapsing(MetricLearning):
    """Embeddings a * e_0 + b * z: b = 0 is a complete collapse."""

    def __init__(self, spread: float, directions: int, **kwargs) -> None:
        super().__init__(**kwargs)
        self.spread, self.directions = spread, directions

    def embed(self, x):
        z = x.flatten(1)[:, :16] * 0
        pattern = torch.arange(len(x)) % self.directions
        z[torch.arange(len(x)), pattern] = self.spread
        z[:, 0] += 1
        return torch.nn.functional.normalize(z, dim=1)


def tiny(cls=MetricLearning, **kwargs):
    return cls(
        backbone="conv4",
        backbone_kwargs={"input_size": 8, "widths": [8, 16], "strides": [1, 2]},
        in_channels=1,
        embedding_dim=16,
        **kwargs,
    )


def test_values_are_those_of_the_metrics_on_the_validation_split(tmp_path: Path) -> None:
    net, data = module(), digits()
    run = trainer(tmp_path, 1, [RepresentationHealth(max_samples=300)])
    run.fit(net, data)
    net.eval()
    with torch.no_grad():
        parts = [data.apply_views(b, training=False)["image"] for b in data.val_dataloader()]
        z = torch.cat([net.embed(part) for part in parts])[:300]
    for name, function in (("std", embedding_std), ("rankme", rankme), ("uniformity", uniformity)):
        assert float(run.callback_metrics[f"health/{name}"]) == pytest.approx(float(function(z)), rel=1e-4)
    assert "health/alignment" not in run.callback_metrics  # one view only


def test_alignment_is_that_of_two_views_in_eval_mode(tmp_path: Path) -> None:
    seen = []

    class Recording(RepresentationHealth):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            seen.append(batch["views"])

    net = module()
    run = trainer(tmp_path, 1, [Recording()])
    run.fit(net, digits(train_view=SimCLRViews(8, num_views=3, **VIEWS)))
    net.eval()
    with torch.no_grad():
        want = alignment(net.embed(seen[-1][0]), net.embed(seen[-1][1]))
    assert 0 < float(want) < 2
    assert float(run.callback_metrics["health/alignment"]) == pytest.approx(float(want), rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_weights_of_another_type(tmp_path: Path, precision: str) -> None:
    run = trainer(tmp_path, 1, [RepresentationHealth()], precision=precision)
    run.fit(module(), digits(epoch_length=160, train_view=SimCLRViews(8, **VIEWS)))
    assert 0 < float(run.callback_metrics["health/alignment"]) < 2


def test_does_not_change_a_bit_of_the_training(tmp_path: Path) -> None:
    states = []
    for callbacks in ([], [RepresentationHealth()]):
        net = module()
        trainer(tmp_path, 2, callbacks).fit(net, digits(train_view=SimCLRViews(8, **VIEWS), epoch_length=96))
        states.append(state_of(net))
    assert_same_state(*states)


@pytest.mark.parametrize(
    ("spread", "directions", "words"),
    [(0.0, 1, "nearly the same embedding"), (1.0, 2, r"about 1\.\d of 16 directions")],
)
def test_collapse_is_told_once(tmp_path: Path, spread: float, directions: int, words: str) -> None:
    net, callback = tiny(Collapsing, spread=spread, directions=directions), RepresentationHealth()
    run = trainer(tmp_path, 1, [callback])
    with pytest.warns(UserWarning, match=f"collapsed: .*{words}"):
        run.validate(net, digits(), verbose=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.validate(net, digits(), verbose=False)
    assert not [w for w in caught if "collapsed" in str(w.message)]


@pytest.mark.parametrize("setting", ["min_spread", "min_rankme"])
def test_thresholds_decide_from_where_on_it_is_a_collapse(tmp_path: Path, setting: str) -> None:
    """Spread is std x sqrt(D), which does not depend on D; neither threshold says anything of the other."""
    net, data = tiny(Collapsing, spread=1.0, directions=2), digits()
    z = torch.cat([net.embed(data.apply_views(b, training=False)["image"]) for b in data.val_dataloader()])
    value = float(embedding_std(z)) * 4 if setting == "min_spread" else float(rankme(z))
    off = {"min_spread": 0.0, "min_rankme": 0.0}
    for limit, warned in ((0.95 * value, False), (1.05 * value, True)):
        callback = RepresentationHealth(**{**off, setting: limit})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer(tmp_path, 1, [callback]).validate(net, data, verbose=False)
        assert callback.warned is warned


def test_few_directions_or_images_cannot_have_a_high_rank(tmp_path: Path) -> None:
    """Two columns, or two images, have a RankMe of 2 at most: no sign of a collapse."""
    callback = RepresentationHealth(min_spread=0.0, min_rankme=3.0)
    for rows in (torch.randn(50, 2), torch.randn(3, 16)):
        callback._warn({"std": 1.0, "rankme": float(rankme(rows))}, *rows.shape)
    assert not callback.warned
    callback._warn({"std": 1.0, "rankme": 2.9}, 4, 16)
    assert callback.warned


def test_one_image_or_one_view_has_no_pairs(tmp_path: Path) -> None:
    callback, net = RepresentationHealth(), module()
    callback.on_train_batch_end(None, net, {}, {"views": [torch.zeros(2, 1, 8, 8)]}, 0)
    run = trainer(tmp_path, 1, [callback], limit_val_batches=1)
    run.validate(net, digits(eval_batch_size=1), verbose=False)
    assert not [key for key in run.callback_metrics if key.startswith("health")]


def test_a_random_or_trained_net_is_no_collapse(tmp_path: Path) -> None:
    callback = RepresentationHealth()
    run = trainer(tmp_path, 2, [callback])
    run.validate(tiny(), digits(), verbose=False)
    run.fit(module(), digits())
    assert not callback.warned
    assert float(run.callback_metrics["health/rankme"]) > 3


def test_schedule_and_sanity_check(tmp_path: Path) -> None:
    epochs = []

    class Counting(RepresentationHealth):
        def _gathered(self, device):
            epochs.append(run.current_epoch)
            return super()._gathered(device)

    run = trainer(tmp_path, 5, [Counting(every_n_epochs=2)], num_sanity_val_steps=1)
    run.fit(module(), digits(epoch_length=64))
    assert epochs == [1, 3, 4]


def test_errors() -> None:
    with pytest.raises(ValueError, match="every_n_epochs is 0"):
        RepresentationHealth(every_n_epochs=0)
    with pytest.raises(ValueError, match="max_samples is 1"):
        RepresentationHealth(max_samples=1)
    with pytest.raises(ValueError, match=r"min_spread is 2"):
        RepresentationHealth(min_spread=2)
