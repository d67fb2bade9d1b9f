"""kNN accuracy during a run equals the one computed by hand, and measuring changes nothing."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
from helpers import assert_same_state, digits, module, state_of, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_nrml.callbacks import OnlineKNN, OnlineLinearProbe
from lightning_nrml.data import DigitsDataModule, NoiseConfig
from lightning_nrml.metrics import KNNClassifier
from lightning_nrml.modules.full_pass import evaluating


def embed_all(net, data, loader):
    """Embeddings and batches of a loader, by hand."""
    net.eval()
    parts = [data.apply_views(batch, training=False) for batch in loader]
    with torch.no_grad():
        z = torch.cat([net.embed(part["image"]) for part in parts])
    return z, {key: torch.cat([part[key] for part in parts]) for key in ("label", "index")}


def by_hand(net, data, bank_label, k=20, temperature=0.07):
    bank, _ = embed_all(net, data, data.embed_dataloader())
    query, val = embed_all(net, data, data.val_dataloader())
    shares = KNNClassifier(k, temperature).fit(bank, bank_label).predict_scores(query)[1]
    top = shares.topk(5, dim=1)
    hit = (top.indices == val["label"][:, None]) & (top.values > 0)
    return float(hit[:, 0].float().mean()), float(hit.any(dim=1).float().mean())


@pytest.mark.parametrize("label", ["given", "clean"])
def test_exact_equals_the_classifier_on_the_whole_train_split(tmp_path: Path, label: str) -> None:
    net, data = module(), digits(noise=NoiseConfig("symmetric", 0.3, 1))
    run = trainer(tmp_path, 2, [OnlineKNN(k=7, temperature=0.2, label=label)])
    run.fit(net, data)
    bank_label = data.train_label if label == "given" else data.train_clean_label
    top1, top5 = by_hand(net, data, bank_label, 7, 0.2)
    assert float(run.callback_metrics["val/knn_top1"]) == pytest.approx(top1)
    assert float(run.callback_metrics["val/knn_top5"]) == pytest.approx(top5)
    assert 0.5 < top1 < top5 < 1


def test_images_of_no_class_have_no_vote_and_absent_classes_get_none(tmp_path: Path) -> None:
    """A true label of -1 is "none of the classes"; a class without a voter is not even the fifth answer."""
    net, data = module(), digits()
    clean, classes = data.splits.train.clean_label, torch.tensor([1, 4, 7])
    clean[~torch.isin(torch.as_tensor(clean), classes).numpy()] = -1
    run = trainer(tmp_path, 1, [OnlineKNN(label="clean")])
    run.validate(net, data, verbose=False)
    bank, _ = embed_all(net, data, data.embed_dataloader())
    query, val = embed_all(net, data, data.val_dataloader())
    known = torch.as_tensor(clean) >= 0
    knn = KNNClassifier().fit(bank[known], torch.as_tensor(clean)[known])
    winner, shares = knn.predict_scores(query)
    column = torch.searchsorted(classes, val["label"]).clamp(max=2)
    found = shares.gather(1, column[:, None])[:, 0] > 0
    top5 = float((found & torch.isin(val["label"], classes)).float().mean())
    assert float(run.callback_metrics["val/knn_top1"]) == pytest.approx(
        float((winner == val["label"]).float().mean())
    )
    assert float(run.callback_metrics["val/knn_top5"]) == pytest.approx(top5)
    assert 0.1 < top5 < 0.35


def test_noisy_labels_vote_unless_told_otherwise(tmp_path: Path) -> None:
    net, data = module(), digits()  # half of the labels are wrong
    values = []
    for label in ("given", "clean"):
        run = trainer(tmp_path, 1, [OnlineKNN(k=1, label=label)])
        run.validate(net, data, verbose=False)
        values.append(float(run.callback_metrics["val/knn_top1"]))
    assert values[0] < 0.6 < 0.8 < values[1]


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_weights_of_another_type(tmp_path: Path, precision: str) -> None:
    run = trainer(tmp_path, 1, [OnlineKNN()], precision=precision)
    run.fit(module(), digits(epoch_length=160))
    assert 0.2 < float(run.callback_metrics["val/knn_top1"]) < 2


@pytest.mark.parametrize(("mode", "seeded"), [("exact", False), ("running", True)])
def test_does_not_change_a_bit_of_the_training(tmp_path: Path, monkeypatch, mode: str, seeded: bool) -> None:
    states = []
    for callbacks in ([], [OnlineKNN(mode=mode)]):
        net = module(backbone="mobilenetv3_small_050", backbone_kwargs={"drop_rate": 0.3})
        run = trainer(tmp_path, 2, callbacks)
        if not seeded:  # dropout then depends on everything that draws from the global generator
            monkeypatch.delenv("PL_GLOBAL_SEED")
        run.fit(net, digits(epoch_length=96))
        states.append({k: v for k, v in state_of(net).items() if not k.startswith("knn_bank")})
    assert_same_state(*states)


def test_every_part_gets_back_the_mode_it_had() -> None:
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Sequential(nn.BatchNorm1d(3), nn.Dropout())).train()
    net[1][0].eval()  # frozen on purpose
    draws = torch.random.get_rng_state()
    inside = []

    def work() -> None:
        with evaluating(net):
            inside.extend([any(part.training for part in net.modules()), torch.is_grad_enabled()])
            torch.rand(5)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        work()
    assert inside == [False, False]
    assert [part.training for part in net.modules()] == [True, True, True, False, True]
    assert torch.equal(draws, torch.random.get_rng_state())


class Seen(L.Callback):
    """Newest training embedding of each sample, by epoch."""

    def __init__(self) -> None:
        self.rows: dict[int, dict[int, torch.Tensor]] = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        for i, z in zip(batch["index"].tolist(), outputs["embedding"], strict=True):
            self.rows.setdefault(trainer.current_epoch, {})[i] = z


@pytest.mark.parametrize("label", ["given", "clean"])
def test_running_votes_with_the_embeddings_of_the_newest_epoch_only(tmp_path: Path, label: str) -> None:
    net, data, seen = module(), digits(), Seen()
    run = trainer(tmp_path, 2, [seen, OnlineKNN(k=5, mode="running", label=label)])
    run.fit(net, data)
    assert set(seen.rows[0]) - set(seen.rows[1])  # some samples were drawn in the first epoch only
    index = sorted(seen.rows[1])
    bank = torch.stack([seen.rows[1][i] for i in index])
    query, val = embed_all(net, data, data.val_dataloader())
    bank_label = (data.train_label if label == "given" else data.train_clean_label)[index]
    predicted = KNNClassifier(5, 0.07).fit(bank, bank_label).predict(query)
    want = float((predicted == val["label"]).float().mean())
    assert float(run.callback_metrics["val/knn_top1"]) == pytest.approx(want)


def test_a_second_fit_starts_with_an_empty_bank_and_a_resumed_one_does_not(tmp_path: Path) -> None:
    net, saver = module(), ModelCheckpoint(tmp_path, filename="{epoch}", auto_insert_metric_name=False)
    run = trainer(tmp_path, 3, [OnlineKNN(mode="running"), saver])
    run.fit(net, digits())
    first = state_of(net)
    seen = Seen()  # its first epoch is older than the last one of the first fit, but these rows are newer
    again = trainer(tmp_path, 1, [seen, OnlineKNN(mode="running")], limit_train_batches=5)
    again.fit(net, digits())
    assert sorted(seen.rows[0]) == net.knn_bank.filled.nonzero()[:, 0].tolist()
    # the run is over already, so that what is there now was restored
    run = trainer(tmp_path, 3, [OnlineKNN(mode="running")])
    run.fit(net, digits(), ckpt_path=tmp_path / "2.ckpt")
    assert_same_state(first, state_of(net))


@pytest.mark.parametrize("mode", ["exact", "running"])
def test_validate_on_a_checkpoint_repeats_the_value(tmp_path: Path, mode: str) -> None:
    saver = ModelCheckpoint(tmp_path, filename="end")
    run = trainer(tmp_path, 1, [OnlineKNN(mode=mode), saver])
    run.fit(module(), digits())
    again = trainer(tmp_path, 1, [OnlineKNN(mode=mode)])
    again.validate(module(), digits(), ckpt_path=tmp_path / "end.ckpt", verbose=False)
    assert float(again.callback_metrics["val/knn_top1"]) == float(run.callback_metrics["val/knn_top1"])
    # a module without the callback loads the same file
    plain = trainer(tmp_path, 1)
    plain.validate(module(), digits(), ckpt_path=tmp_path / "end.ckpt", verbose=False)


def test_runs_in_test_too(tmp_path: Path) -> None:
    net, data = module(), digits(noise=None)
    run = trainer(tmp_path, 1, [OnlineKNN()])
    run.test(net, data, verbose=False)
    assert float(run.callback_metrics["test/knn_top1"]) == pytest.approx(
        by_hand(net, data, data.train_label)[0]
    )


def test_schedule_counts_the_last_epoch_and_never_the_sanity_check(tmp_path: Path, monkeypatch) -> None:
    passes: list[int] = []
    original = DigitsDataModule.embed_dataloader

    def counted(self):
        passes.append(self.trainer.current_epoch)
        return original(self)

    monkeypatch.setattr(DigitsDataModule, "embed_dataloader", counted)
    run = trainer(tmp_path, 5, [OnlineKNN(every_n_epochs=2)], num_sanity_val_steps=1)
    run.fit(module(), digits())
    assert passes == [1, 3, 4]


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="k must be at least 1"):
        OnlineKNN(k=0)
    with pytest.raises(ValueError, match="choose 'exact' or 'running'"):
        OnlineKNN(mode="fast")
    with pytest.raises(ValueError, match="choose 'given' or 'clean'"):
        OnlineKNN(label="true")
    with pytest.raises(ValueError, match="every_n_epochs is 0"):
        OnlineKNN(every_n_epochs=0)
    with pytest.raises(ValueError, match="label='given'"):
        trainer(tmp_path, 1, [OnlineKNN(label="clean")]).validate(module(), digits(noise=None))
    zero_shot = digits()
    zero_shot.splits.zero_shot = True
    with pytest.raises(ValueError, match="use RetrievalEvaluator"):
        trainer(tmp_path, 1, [OnlineKNN()]).validate(module(), zero_shot)
    loader = digits().val_dataloader()
    net = module()
    net.num_classes = 10
    with pytest.raises(TypeError, match="mode='running'"):
        trainer(tmp_path, 1, [OnlineKNN()]).validate(net, loader)


class Theirs(L.LightningModule):
    """A module that is not of this package."""

    embedding_dim = 64

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(64, 64)

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x.flatten(1))

    forward = embed

    def training_step(self, batch, batch_idx):
        z = self.embed(batch["image"])
        return {"loss": z.square().mean(), "embedding": z.detach()}

    def validation_step(self, batch, batch_idx):
        return {"embedding": self.embed(batch["image"])}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


@pytest.mark.parametrize("judge", [OnlineKNN, OnlineLinearProbe])
def test_their_checkpoint_may_hold_the_state_of_other_callbacks(tmp_path: Path, judge) -> None:
    saver = ModelCheckpoint(tmp_path, save_last=True)
    run = trainer(tmp_path, 1, [OnlineKNN(mode="running"), OnlineLinearProbe(), saver])
    run.fit(Theirs(), digits(epoch_length=96))
    again = trainer(tmp_path, 1, [judge()])
    (values,) = again.validate(Theirs(), digits(), ckpt_path=saver.last_model_path, verbose=False)
    assert 0.1 < values["val/knn_top1" if judge is OnlineKNN else "val/probe_top1"] <= 1
