"""The embedding map of small runs over digits: its files, its schedule, and that it changes nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import assert_same_state, digits, module, state_of, trainer
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_nrml.callbacks import PRISM, EmbeddingMap, RetrievalEvaluator
from lightning_nrml.callbacks.balanced_sample import sample_order
from lightning_nrml.callbacks.map_file import class_colours, draw_map
from lightning_nrml.callbacks.plane import pca
from lightning_nrml.modules import MetricLearning

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "modules"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "audit"))
from test_multilabel import data as multilabel_data
from test_multilabel import module as multilabel_module
from test_noise_report import finished_wandb_records

NAMES = ["embedding_map.csv", "embedding_map.png"]


def table(folder: Path, split: str = "") -> pd.DataFrame:
    return pd.read_csv(folder / f"embedding_map{split}.csv")


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if "map" in p.name)


def embedded(net: Any, data: Any, loader: Any) -> Tensor:
    """Unit rows of a whole split, by hand."""
    net.eval()
    with torch.no_grad():
        parts = [net.embed(data.apply_views(b, training=False)["image"]) for b in loader]
    return F.normalize(torch.cat(parts), dim=1)


class Broken(MetricLearning):
    """Embeds dark images as NaN."""

    limit = 0.0

    def embed(self, x: Tensor) -> Tensor:
        z = super().embed(x)
        dark = x.flatten(1).mean(1) < self.limit
        return torch.where(dark[:, None], torch.nan, z)


def broken(limit: float) -> Broken:
    net = Broken(
        backbone="conv4",
        backbone_kwargs={"input_size": 8, "widths": [8, 16], "strides": [1, 2]},
        in_channels=1,
        embedding_dim=16,
    )
    net.limit = limit
    return net


# ---- the files ------------------------------------------------------------------------------------


def test_points_of_the_validation_split_are_the_pca_of_its_embeddings(tmp_path: Path) -> None:
    net, data = module(), digits()
    trainer(tmp_path, 1, [EmbeddingMap(max_samples=90, seed=3)]).fit(net, data)
    assert files(tmp_path) == NAMES
    frame = table(tmp_path)
    assert list(frame.columns) == ["index", "label", "label_name", "x", "y"]
    label = torch.as_tensor(data.splits.test.label)
    want = sample_order(torch.arange(500), label, 5, seed=3)[:90].sort().values
    assert frame["index"].tolist() == want.tolist()
    assert frame["label"].tolist() == label[want].tolist() == frame["label_name"].tolist()
    assert frame["label"].value_counts().tolist() == [9] * 10
    xy = pca(embedded(net, data, data.val_dataloader())[want].numpy())[0]
    np.testing.assert_allclose(frame[["x", "y"]], xy, atol=1e-5)
    assert np.array(Image.open(tmp_path / NAMES[1]).convert("RGB")).std() > 5


def test_train_split_shows_truth_and_decision(tmp_path: Path) -> None:
    net, data = module(), digits()
    run = trainer(tmp_path, 2, [PRISM(0.5, warmup_steps=2), EmbeddingMap(split="train")], limit_val_batches=0)
    run.fit(net, data)  # without a validation
    frame = table(tmp_path, "_train")
    assert files(tmp_path) == [f"embedding_map_train.{suffix}" for suffix in ("csv", "png")]
    assert frame["index"].tolist() == list(range(1297))
    assert frame["label"].tolist() == data.train_label.tolist()
    assert frame["clean_label"].tolist() == data.train_clean_label.tolist()
    assert net.training
    ledger = net.noise_ledger
    assert frame["keep"].tolist() == (ledger.dropped * 2 <= ledger.seen).tolist()
    assert 0.3 < frame["keep"].mean() < 0.9
    # the evaluation view, not the training view
    xy = pca(embedded(net, data, data.embed_dataloader()).numpy())[0]
    np.testing.assert_allclose(frame[["x", "y"]], xy, atol=1e-5)


def test_paths_names_and_what_a_table_leaves_out(tmp_path: Path) -> None:
    data = digits(noise=None)
    for split in (data.splits.train, data.splits.test):
        split.paths = [f"{len(split)}/{i}.png" for i in range(len(split))]
    data.splits.class_names = [f"class {c}" for c in range(10)]
    data.train_keep[3] = False
    trainer(tmp_path, 1, [EmbeddingMap(split="train"), EmbeddingMap()]).validate(
        module(), data, verbose=False
    )
    assert table(tmp_path)["path"].tolist() == [f"500/{i}.png" for i in range(500)]
    frame = table(tmp_path, "_train")
    assert frame["path"].tolist() == [f"1297/{i}.png" for i in range(1297)]
    assert frame["label_name"].tolist() == [data.class_names[c] for c in frame["label"]]
    assert frame.loc[~frame["keep"], "index"].tolist() == [3]
    assert "clean_label" not in frame


def test_test_and_validate_draw_without_training(tmp_path: Path) -> None:
    net, data = module(), digits()
    run = trainer(tmp_path, 1, [EmbeddingMap(every_n_epochs=7)])
    run.test(net, data, verbose=False)
    assert files(tmp_path) == ["embedding_map_test.csv", "embedding_map_test.png"]
    run.validate(net, data, verbose=False)
    pd.testing.assert_frame_equal(table(tmp_path), table(tmp_path, "_test"))  # digits validate on test
    folder = tmp_path / "elsewhere"
    run = trainer(tmp_path, 1, [EmbeddingMap(split="train", folder=str(folder))])
    run.test(net, data, verbose=False)
    assert not folder.exists()
    run.validate(net, data, verbose=False)
    assert len(table(folder, "_train")) == 1297


def test_offline_wandb_run_can_be_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MODE": "offline", "SILENT": "true", "DATA_DIR": str(tmp_path / "staging")}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    logger = WandbLogger(save_dir=tmp_path, offline=True, project="map")
    callbacks = [RetrievalEvaluator(), EmbeddingMap(max_samples=40)]
    trainer(tmp_path, 1, callbacks, logger=logger).fit(module(), digits())
    folder = Path(logger.experiment.dir).parent
    logger.experiment.finish()
    logged, stored, steps = {}, {}, {}
    for record in finished_wandb_records(next(folder.glob("*.wandb"))):
        stored |= {e.path: Path(e.local_path) for e in record.artifact.manifest.contents}
        items = {"/".join(i.nested_key): i.value_json for i in record.history.item}
        if any(key.startswith("embedding_map") for key in items):
            logged |= items
        steps |= dict.fromkeys(items, items.get("trainer/global_step"))
    assert steps["embedding_map/val/filenames"] == steps["val/recall@1"] == "7"  # one place on the axis
    image = folder / "files" / json.loads(logged["embedding_map/val/filenames"])[0]
    assert image.read_bytes() == (tmp_path / "embedding_map.png").read_bytes()
    points = json.loads(stored["embedding_map/val_points.table.json"].read_text())
    frame = pd.DataFrame(points["data"], columns=points["columns"]).astype({"label_name": int})
    pd.testing.assert_frame_equal(frame, table(tmp_path), check_dtype=False)


# ---- when and how often ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "epochs"),
    [({"max_epochs": 5}, [1, 3, 4]), ({"max_epochs": -1, "max_steps": 6}, [1, 2])],
)
@pytest.mark.parametrize("split", ["val", "train"])
def test_schedule(tmp_path: Path, split: Any, options: dict[str, int], epochs: list[int]) -> None:
    drawn = []

    class Counting(EmbeddingMap):
        def _draw(self, trainer, pl_module, collected, split) -> None:
            drawn.append(trainer.current_epoch)

    run = trainer(tmp_path, callbacks=[Counting(2, split=split)], num_sanity_val_steps=1, **options)
    with pytest.warns(UserWarning, match="EmbeddingMap has drawn nothing"):  # as _draw is replaced
        run.fit(module(), digits(epoch_length=64))
    assert drawn == epochs


def test_a_try_run_writes_nothing(tmp_path: Path) -> None:
    run = trainer(tmp_path, callbacks=[EmbeddingMap(), EmbeddingMap(split="train")], fast_dev_run=True)
    run.fit(module(schedule=None), digits())
    assert files(tmp_path) == []


# ---- it changes nothing, and nothing changes it ---------------------------------------------------


def test_does_not_change_a_bit_of_the_training(tmp_path: Path) -> None:
    states, random = [], []
    maps = [EmbeddingMap(1), EmbeddingMap(1, split="train", max_samples=50, method="tsne")]
    for callbacks in ([], maps):
        net = module(backbone="mobilenetv3_small_050", backbone_kwargs={"drop_rate": 0.3})
        np.random.seed(1)  # noqa: NPY002
        trainer(tmp_path, 2, callbacks).fit(net, digits(epoch_length=96, num_workers=1))
        states.append(state_of(net))
        random.append((torch.rand(3), np.random.rand(3).tolist()))  # noqa: NPY002
    assert_same_state(*states)
    assert torch.equal(random[0][0], random[1][0])
    assert random[0][1] == random[1][1]


def test_the_same_again_and_after_a_resume(tmp_path: Path) -> None:
    def fit(folder: Path, resume: Path | None = None) -> list[bytes]:
        saver = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, auto_insert_metric_name=False)
        callbacks = [EmbeddingMap(1), EmbeddingMap(1, split="train", max_samples=40, method="tsne"), saver]
        run = trainer(folder, 2, callbacks)
        run.fit(module(), digits(epoch_length=96), ckpt_path=resume, weights_only=False if resume else None)
        return [(folder / name).read_bytes() for name in (*NAMES, "embedding_map_train.csv")]

    whole = fit(tmp_path / "whole")
    assert fit(tmp_path / "again") == whole
    assert fit(tmp_path / "resumed", tmp_path / "whole" / "0.ckpt") == whole


# ---- hard cases -----------------------------------------------------------------------------------


def test_rows_with_nan_are_left_out_and_said(tmp_path: Path) -> None:
    data = digits()
    images = torch.cat([b["image"] for b in data.val_dataloader()])
    dark = data.apply_views({"image": images}, training=False)["image"].flatten(1).mean(1) < 0.3
    assert 100 < dark.sum() < 400
    run = trainer(tmp_path, 1, [EmbeddingMap()])
    with pytest.warns(UserWarning, match=f"left out {int(dark.sum())} of 500 val images"):
        run.validate(broken(0.3), data, verbose=False)
    assert table(tmp_path)["index"].tolist() == (~dark).nonzero().flatten().tolist()
    assert np.isfinite(table(tmp_path)[["x", "y"]]).all(axis=None)


def test_too_few_rows_are_told_and_nothing_is_written(tmp_path: Path) -> None:
    run = trainer(tmp_path, 1, [EmbeddingMap()])
    with pytest.warns(UserWarning, match="the val split gave 0 usable embeddings, and a map needs 3"):
        run.validate(broken(9.0), digits(), verbose=False)
    assert files(tmp_path) == []


def test_a_run_without_validation_says_that_nothing_was_drawn(tmp_path: Path) -> None:
    run = trainer(tmp_path, 1, [EmbeddingMap()], limit_val_batches=0)
    with pytest.warns(UserWarning, match="EmbeddingMap has drawn nothing.*split='train'"):
        run.fit(module(), digits())


def test_a_module_and_data_of_ones_own(tmp_path: Path) -> None:
    """No splits, names or views; a class of one sample; an embedding of one number."""

    class Own(LightningDataModule):
        def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
            label = torch.tensor([0, 0, 0, 7, 2])
            batch = {"image": torch.rand(5, 1, 2, 2), "label": label, "index": torch.arange(5)}
            return DataLoader([batch], batch_size=None)

    class Net(LightningModule):
        def embed(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :1] - 0.5

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            return None

    trainer(tmp_path, 1, [EmbeddingMap(method="tsne")]).validate(Net(), Own(), verbose=False)
    frame = table(tmp_path)
    assert list(frame.columns) == ["index", "label", "x", "y"]
    assert frame["label"].tolist() == [0, 0, 0, 7, 2]


def test_what_cannot_be_drawn_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="leave it out for multi-label data"):
        trainer(tmp_path, callbacks=[EmbeddingMap()]).fit(multilabel_module("bce"), multilabel_data())
    for options, words in (
        ({"split": "test"}, "split is 'test'"),
        ({"max_samples": 2}, "max_samples is 2"),
        ({"min_per_class": 0}, "min_per_class is 0"),
        ({"method": "lda"}, "method is 'lda': choose one of pca, tsne, umap"),
        ({"every_n_epochs": 0}, "every_n_epochs is 0"),
    ):
        with pytest.raises(ValueError, match=words):
            EmbeddingMap(**options)
    stage = SimpleNamespace(datamodule=object())
    with pytest.raises(TypeError, match="use split='val' with this one"):
        EmbeddingMap(split="train").setup(stage, module(), "fit")


# ---- the picture ----------------------------------------------------------------------------------


def picture(tmp_path: Path, frame: pd.DataFrame) -> np.ndarray:
    draw_map(frame, tmp_path / "map.png", "title", ("a", "b"))
    return np.array(Image.open(tmp_path / "map.png").convert("RGB")).reshape(-1, 3)


def test_colours_are_those_of_the_classes(tmp_path: Path) -> None:
    g = np.random.default_rng(0)
    frame = pd.DataFrame({"label": [0, 1, 3] * 20, "x": g.normal(size=60), "y": g.normal(size=60)})
    colours = class_colours(frame["label"].to_numpy())
    assert colours == class_colours(np.array([0, 1, 3])) | {-1: colours[-1]}
    assert colours[3] == class_colours(np.arange(10))[3]  # maps of several splits agree
    seen = picture(tmp_path, frame)

    def shows(colour: Any) -> int:
        # legend markers are opaque
        return int((np.abs(seen - 255 * np.array(colour[:3])) < 2).all(1).sum())

    assert min(shows(colours[c]) for c in (0, 1, 3)) > 20
    assert shows(class_colours(np.arange(10))[2]) == 0
    many = class_colours(np.arange(50))
    assert len(set(many.values())) == 51
    assert len(set(class_colours(np.arange(100, 120)).values())) == 21


def test_wrong_labels_are_crosses(tmp_path: Path) -> None:
    xy = {"x": np.arange(30.0), "y": np.arange(30.0) % 7}
    right = pd.DataFrame({"label": 0, "clean_label": 0, **xy})
    plain, known, wrong = (
        picture(tmp_path, frame) for frame in (right[["label", "x", "y"]], right, right.assign(clean_label=1))
    )
    assert np.array_equal(plain, known)
    assert (plain != wrong).any(1).sum() > 1000  # the shapes, and an entry of the legend


def test_names_that_mean_something_to_the_drawing_library(tmp_path: Path) -> None:
    names = ["$a", "_b", "$x_{$", "n" * 80, ""]
    frame = pd.DataFrame({"label": [0, 1, 2, 3, -1], "x": range(5), "y": range(5)})
    named = picture(tmp_path, frame.assign(label_name=names))
    assert (named != picture(tmp_path, frame)).any()
