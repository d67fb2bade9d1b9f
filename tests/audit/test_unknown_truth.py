"""Labels of which nobody knows the truth: what an audit corrects is not noise, and they are not the truth."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from PIL import Image

from lightning_nrml.audit import AuditOptions
from lightning_nrml.audit.data import AuditData
from lightning_nrml.audit.run import audit
from lightning_nrml.callbacks.ledger_file import ledger_frame
from lightning_nrml.callbacks.noise_report import audit_data
from lightning_nrml.callbacks.run_card import _noise
from lightning_nrml.data import FolderDataModule, MultiLabelRSDataModule, NoiseConfig
from lightning_nrml.memory import SampleLedger

EACH, CLASSES = 20, 3


@pytest.fixture
def folder(tmp_path):
    """60 images of 3 classes in folders, two of which hold 4 images of the next class."""
    for i in range(EACH * CLASSES):
        truth, given = i % CLASSES, (i % CLASSES + 1) % CLASSES if i < 8 else i % CLASSES
        file = tmp_path / "own" / "train" / f"class{given}" / f"{i:02d}_{truth}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(file)
    return tmp_path / "own"


def embedding(data):
    """Compact clusters by what the images show, which their names tell."""
    truth = torch.tensor([int(path[-5]) for path in data.train_paths])
    noise = 0.05 * torch.randn(len(truth), 8, generator=torch.Generator().manual_seed(0))
    return torch.eye(8)[truth] + noise


def run(data, folder):
    """The corrected table of an audit that relabels."""
    options = AuditOptions(rule="relabel", gallery=1)
    return audit(embedding(data), audit_data(data), folder, options).files["corrected"]


def test_corrections_are_no_noise(folder, tmp_path):
    first = FolderDataModule(str(folder), image_size=4, batch_size=4)
    table = run(first, tmp_path / "a")
    again = FolderDataModule(str(folder), image_size=4, batch_size=4, noise=str(table))
    truth = [int(path[-5]) for path in again.train_paths]
    assert again.train_label.tolist() == truth
    assert again.train_clean_label is None
    assert again.noise_summary["rate_realised"] is None
    assert "clean_label" not in ledger_frame(SampleLedger(len(truth)), again)
    assert "clean_label" not in next(iter(again.train_dataloader()))
    assert (
        _noise(again)
        == f"label table {table}, which leaves out 0 samples; 8 of 60 labels differ from the data set's own"
    )
    # nor in the second round, whose table was made from the first one's labels
    second = run(again, tmp_path / "b")
    assert "clean_label" not in pd.read_csv(tmp_path / "b" / "audit.csv")
    assert FolderDataModule(str(folder), image_size=4, noise=str(second)).train_clean_label is None


def test_labels_under_injected_noise_stay_the_truth(folder, tmp_path):
    noise = NoiseConfig("symmetric", 0.2, 1)
    noisy = FolderDataModule(str(folder), image_size=4, noise=noise)
    own = noisy.train_clean_label
    for name, made in (("a", noisy), ("b", None)):
        data = made or FolderDataModule(
            str(folder), image_size=4, noise=str(tmp_path / "a/labels_corrected.csv")
        )
        table = run(data, tmp_path / name)
        assert FolderDataModule(str(folder), image_size=4, noise=str(table)).train_clean_label.equal(own)


@pytest.mark.parametrize("known", [False, True])
def test_several_labels(tmp_path, known):
    truth = torch.arange(40).unsqueeze(1) >> torch.arange(3) & 1
    given = truth.clone()
    given[:4, 0] ^= 1
    paths = [f"{i}.png" for i in range(40)]
    for path in paths:
        Image.new("RGB", (4, 4)).save(tmp_path / path)
    names = ["a", "b", "c"]
    own = truth if known else given
    frame = pd.DataFrame({"image": paths, **dict(zip(names, own.T.numpy(), strict=True)), "split": "train"})
    frame.to_csv(tmp_path / "own.csv", index=False)
    data = AuditData(given, 3, names, paths, truth if known else None)
    table = audit(2.0 * truth - 1, data, tmp_path / "a", AuditOptions(rule="relabel", gallery=1)).files[
        "corrected"
    ]
    again = MultiLabelRSDataModule(
        str(tmp_path),
        "own.csv",
        ".",
        image_size=4,
        noise=str(table),
        statistics_folder=str(tmp_path / "kept"),
    )
    assert again.train_label.equal(torch.as_tensor(pd.read_csv(table)[names].to_numpy()))
    if known:
        assert again.train_clean_label.equal(truth)
    else:
        assert again.train_clean_label is None
        assert int((again.train_label != given).sum()) == again.num_changed_labels > 0
