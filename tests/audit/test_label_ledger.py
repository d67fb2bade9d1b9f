"""Multi-label data, from ledger or audit to a corrected table and back into the datamodule."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import trainer
from PIL import Image

from lightning_nrml.__main__ import main
from lightning_nrml.audit import AuditOptions, audit, from_label_ledger
from lightning_nrml.callbacks import MultiLabelPRISM
from lightning_nrml.callbacks.ledger_file import write_ledger
from lightning_nrml.callbacks.noise_report import audit_data
from lightning_nrml.data import MultiLabelRSDataModule, NoiseConfig
from lightning_nrml.data.multilabel_tables import read_multilabel_table
from lightning_nrml.data.sources import MemorySource, cached
from lightning_nrml.memory import LabelLedger

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "modules"))
from test_multilabel import LABELS, data, module

N = 96


class Named:
    """What a ledger needs of a datamodule; a name with a comma, and a label that no sample has."""

    class_names = ("no road", "tree, tall", "car")
    train_paths = tuple(f"im{i:02d}" for i in range(N))

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(3)
        self.train_clean_label = (torch.rand(N, 3, generator=g) < 0.4).long()
        self.train_clean_label[:, 2] = 0
        self.wrong = torch.rand(N, 3, generator=g) < 0.2
        self.wrong[:, 2] = False
        self.train_label = self.train_clean_label ^ self.wrong.long()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder whose filter dropped the wrong labels (but five), and the datamodule."""
    folder, source, ledger = tmp_path_factory.mktemp("run"), Named(), LabelLedger(N, 3)
    dropped = source.wrong.clone()
    dropped[source.wrong.nonzero()[:5, 0]] = False
    g = torch.Generator().manual_seed(0)
    for _ in range(3):
        score = torch.where(dropped, -3.0, -0.1) + 0.05 * torch.randn(N, 3, generator=g)
        ledger.record(torch.arange(N), (~dropped).float(), score)
    write_ledger(ledger, source, folder)
    for name in source.train_paths:
        (folder / "images" / name[-1]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (10, 200, int(name[2:]))).save(
            folder / "images" / name[-1] / f"{name}.png"
        )
    return folder, source, dropped


@pytest.mark.parametrize(
    "given",
    [
        "",
        "noise_ledger.csv",
        "noise_ledger.parquet",
        "noise_ledger_labels.csv",
        "noise_ledger_labels.parquet",
    ],
)
def test_any_file_of_the_run_means_its_label_ledger(run, given, tmp_path, capsys):
    folder, source, dropped = run
    assert main(["audit", "--ledger", str(folder / given), "--out", str(tmp_path)]) == 0
    assert f"rates      {tmp_path}/audit_rates.csv" in capsys.readouterr().out
    table = pd.read_parquet(tmp_path / "audit.parquet")
    assert len(table) == N * 3
    sample, c = table["sample"].to_numpy(), table["position"].to_numpy()
    value = source.train_label.numpy()[sample, c]
    assert (table["kind"] == np.where(value == 1, "extra", "missing")).all()
    named = np.asarray(source.class_names, dtype=object)[c]
    assert table["label_name"].tolist() == [n if v else f"no {n}" for n, v in zip(named, value, strict=True)]
    assert table["path"].tolist() == [f"im{i:02d}#{n}" for i, n in zip(sample, named, strict=True)]
    assert (table["suggested_label"] != table["label"]).tolist() == dropped.numpy()[sample, c].tolist()
    assert ((table["clean_label"] != table["label"]) == source.wrong.numpy()[sample, c]).all()
    assert dropped.numpy()[sample, c][: int(dropped.sum())].all(), "what was dropped most comes first"
    assert (table["times_seen"] == 3).all()
    shown = pd.read_csv(tmp_path / "audit.csv")
    assert shown["index"].tolist() == table["index"].head(int(dropped.sum())).tolist(), "suspected ones only"
    summary = json.loads((tmp_path / "audit.json").read_text())
    assert summary["ledger"].endswith("noise_ledger_labels.parquet")
    assert summary["noise_rate"] == pytest.approx(float(dropped.float().mean()), abs=0.01)
    rates = pd.read_csv(tmp_path / "audit_rates.csv")
    assert rates["label_name"].tolist() == list(source.class_names)
    for which, v in (("extra", 1), ("missing", 0)):
        own = source.train_label == v
        assert rates[f"suspected_{which}"].tolist() == (dropped & own).sum(0).tolist()
        share = (dropped & own).sum(0) / own.sum(0)
        np.testing.assert_allclose(rates[which], share)
        np.testing.assert_allclose(rates[f"true_{which}"], (source.wrong & own).sum(0) / own.sum(0))
    assert np.isnan(rates["extra"][2]), "of no samples there is no share"


@pytest.mark.parametrize("rule", ["drop", "relabel"])
def test_corrected_table_of_a_ledger(run, rule, tmp_path):
    folder, source, dropped = run
    args = ["audit", "--ledger", str(folder), "--out", str(tmp_path), "--rule", rule]
    assert main([*args, "--images", str(folder / "images"), "--gallery", "7"]) == 0
    for suffix in ("csv", "parquet"):
        read = read_multilabel_table(tmp_path / f"labels_corrected.{suffix}")
        assert (read.images, read.names) == (list(source.train_paths), list(source.class_names))
        turned = dropped if rule == "relabel" else torch.zeros_like(dropped)
        assert np.array_equal(read.label, (source.train_label ^ turned.long()).numpy())
    doubted = pd.read_csv(tmp_path / "labels_corrected.csv", keep_default_na=False)["doubted"]
    want = [";".join(source.class_names[c] for c in row.nonzero().flatten()) for row in dropped & ~turned]
    assert doubted.tolist() == want
    pictured = pd.read_parquet(tmp_path / "audit.parquet")["sample"].head(7).nunique()
    assert (tmp_path / "report.html").read_text().count("data:image/jpeg") == pictured


@pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
@pytest.mark.parametrize("bands", [1, 4])
def test_pictures_of_a_ledger_may_be_rasters(run, bands, tmp_path):
    rasterio = pytest.importorskip("rasterio", reason="pip install 'lightning-nrml[rs]'")
    folder, source, _ = run
    (tmp_path / "images").mkdir()
    size = {"count": bands, "height": 20, "width": 20, "dtype": "uint16"}
    for name in source.train_paths:
        with rasterio.open(tmp_path / "images" / f"{name}.tif", "w", driver="GTiff", **size) as file:
            file.write(np.random.default_rng(0).integers(0, 9999, (bands, 20, 20)).astype(np.uint16))
    args = ["audit", "--ledger", str(folder), "--out", str(tmp_path), "--images", str(tmp_path / "images")]
    assert main([*args, "--gallery", "7"]) == 0
    pictured = pd.read_parquet(tmp_path / "audit.parquet")["sample"].head(7).nunique()
    assert (tmp_path / "report.html").read_text().count("data:image/jpeg") == pictured


def test_errors_of_one_sentence(run, tmp_path, capsys):
    folder, _, _ = run
    capsys.readouterr()
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("noise_ledger.csv", "noise_ledger_labels.csv"):
        shutil.copy(folder / name, alone / name)
    pd.DataFrame({"a": [1]}).to_csv(alone / "x_labels.csv", index=False)
    (alone / "y_labels.parquet").write_text("no")
    short = pd.read_parquet(folder / "noise_ledger_labels.parquet").iloc[:-1]
    short.to_parquet(alone / "z_labels.parquet")
    short.head(0).to_parquet(alone / "e_labels.parquet")
    for path, message in (
        (alone / "nothing", "finds nothing"),
        (alone / "noise_ledger.csv", "of a multi-label run give noise_ledger_labels.parquet"),
        (alone / "noise_ledger_labels.csv", "not one for each of"),
        (alone / "x_labels.csv", "has no column 'index'"),
        (alone / "y_labels.parquet", "cannot be read"),
        (alone / "z_labels.parquet", f"has {3 * N - 1} rows and not one for each of 3 labels of {N} samples"),
        (alone / "e_labels.parquet", "has no rows"),
    ):
        assert main(["audit", "--ledger", str(path), "--out", str(tmp_path / "out")]) == 2
        told = capsys.readouterr().err.strip().splitlines()
        assert len(told) == 1
        assert told[0].startswith("nrml: ")
        assert message in told[0]
    (alone / "images").mkdir()
    for images in (alone / "images", alone / "nowhere"):
        assert main(["audit", "--ledger", str(folder), "--out", str(tmp_path), "--images", str(images)]) == 2
        told = capsys.readouterr().err.strip().splitlines()
        assert len(told) == 1
        assert str(images) in told[0]


def test_ledger_of_a_real_run(tmp_path):
    net, source = module("bce"), data()
    trainer(tmp_path, 4, [MultiLabelPRISM(warmup_steps=9)], limit_val_batches=0).fit(net, source)
    table, samples = from_label_ledger(tmp_path / "noise_ledger_labels.parquet")
    assert torch.equal(samples.label, source.train_label)
    assert torch.equal(samples.clean_label, source.train_clean_label)
    assert samples.class_names == source.class_names
    assert samples.paths is None
    by_entry = table.sort_values("index")
    ledger = net.noise_ledger
    np.testing.assert_allclose(by_entry["log_p_clean"], ledger.label_mean_score().flatten(), rtol=1e-6)
    assert by_entry["times_dropped"].tolist() == ledger.label_dropped.flatten().tolist()
    turned = (by_entry["suggested_label"] != by_entry["label"]).to_numpy().reshape(-1, LABELS)
    assert np.array_equal(turned, ledger.doubted().numpy())


@pytest.fixture(scope="module")
def merced(shared_data, tmp_path_factory):
    """160 training images of UC Merced with mixed noise, and how to make the datamodule again."""
    root, folder = shared_data("ucmerced_multilabel"), tmp_path_factory.mktemp("merced")
    train = (root / "split_train.txt").read_text().split()[::8]
    (folder / "train.txt").write_text("\n".join(train))

    def make(noise):
        return MultiLabelRSDataModule(
            str(root), splits={"train": str(folder / "train.txt")}, image_size=16, noise=noise,
            statistics_folder=str(folder), normalize=False,
        )  # fmt: skip

    source = make(NoiseConfig("mixed", 0.4, 0))
    return make, source, source.splits.train.images.get(range(len(train))).float().flatten(1)


def test_corrections_of_ucmerced_come_back_exactly(merced, tmp_path):
    make, source, pixels = merced
    options = AuditOptions(rule="relabel", confident=0.8, gallery=3)
    found = audit(pixels - pixels.mean(0), audit_data(source), tmp_path, options)
    rows, labels = source.train_label.shape
    action = found.corrected.sort_values("index")["action"].to_numpy().reshape(rows, labels)
    turned, dropped = torch.from_numpy(action == "relabelled"), action == "dropped"
    assert turned.sum() > 20
    assert dropped.sum() > 20
    for suffix in ("csv", "parquet"):
        again = make(str(tmp_path / f"labels_corrected.{suffix}"))
        assert torch.equal(again.train_label, source.train_label ^ turned.long())
        assert torch.equal(again.train_clean_label, source.train_clean_label)
    table = pd.read_csv(tmp_path / "labels_corrected.csv", keep_default_na=False).set_index("path")
    assert table.index.tolist() == source.train_paths
    for name, row in zip(source.train_paths, dropped, strict=True):
        named = [source.class_names[c] for c in row.nonzero()[0]]
        assert table.loc[name, "doubted"].split(";") == (named or [""])
    assert "data:image/jpeg" in (tmp_path / "report.html").read_text()
    # people see 96 pixels, whatever the net sees and wherever its images are kept
    files = source.splits.train.images
    for images in (files, cached(files.subset(np.arange(3)))):
        assert images.get([2]).shape == (1, 3, 16, 16)
        picture = images.pictures([2])
        assert picture.shape == (1, 3, 96, 96)
        assert torch.equal(picture, files.pictures([2]))


def test_pictures_of_physical_values_are_stretched_band_by_band():
    images = torch.stack([torch.linspace(0, 3000, 100), torch.linspace(-25, -5, 100)]).view(1, 2, 10, 10)
    picture = MemorySource(images).pictures([0])
    assert picture.dtype == torch.uint8
    for band in picture[0]:
        assert (int(band.min()), int(band.max())) == (0, 255)
        assert (band.flatten().int().diff() >= 0).all()
    flat = MemorySource(torch.full((1, 2, 4, 4), torch.nan)).pictures([0])
    assert (flat == 0).all()


def test_marks_saved_by_the_report_win_and_come_back(merced, tmp_path):
    """The file that the page saves (see the browser test) is a label table and a review at once."""
    make, source, pixels = merced
    given = source.train_label.clone()
    saved = tmp_path / "labels_reviewed.csv"
    columns = {"path": source.train_paths}
    columns |= {name: given[:, c].numpy().copy() for c, name in enumerate(source.class_names)}
    frame = pd.DataFrame(columns).assign(doubted="", marks="")
    name = source.class_names
    frame.loc[2, name[5]] ^= 1
    frame.loc[2, "marks"] = "5:wrong 6:right"
    frame.loc[4, ["doubted", "marks"]] = [name[0], "0:wrong"]
    frame.to_csv(saved, index=False)
    want = given.clone()
    want[2, 5] ^= 1
    assert torch.equal(make(str(saved)).train_label, want)
    options = AuditOptions(rule="relabel", confident=0.8, gallery=1)
    features = (pixels - pixels.mean(0))[:, ::8]
    plain = audit(features, audit_data(source), tmp_path / "plain", options)
    options = AuditOptions(rule="relabel", confident=0.8, gallery=1, review=str(saved))
    audit(features, audit_data(source), tmp_path / "out", options)
    one, two = (make(str(tmp_path / f / "labels_corrected.csv")).train_label for f in ("plain", "out"))
    expected = one.clone()
    expected[2, 5], expected[2, 6], expected[4, 0] = want[2, 5], given[2, 6], given[4, 0]
    assert torch.equal(two, expected)
    wide = pd.read_csv(tmp_path / "out" / "labels_corrected.csv", keep_default_na=False)
    assert name[0] in wide["doubted"][4].split(";")
    assert len(plain.table) == given.numel()
    for text in ("5:bad", "99:wrong", "x"):
        frame.assign(marks=text).to_csv(saved, index=False)
        with pytest.raises(ValueError, match=f"row 0: mark '{text}' of image '{source.train_paths[0]}'"):
            audit(torch.empty(0), audit_data(source), tmp_path / "bad", options)  # before any judging
    assert not (tmp_path / "bad").exists()
