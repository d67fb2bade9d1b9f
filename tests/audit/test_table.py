"""Audit table, corrected labels, reviews, and the way back into training."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from lightning_nrml.audit import (
    AuditData,
    AuditOptions,
    apply_review,
    audit,
    audit_ledger,
    audit_table,
    corrected_labels,
    from_ledger,
)
from lightning_nrml.audit.table import class_noise, read_review, write_both
from lightning_nrml.callbacks.ledger_file import ledger_frame, write_ledger
from lightning_nrml.data import DigitsDataModule, NoiseConfig, TableDataModule
from lightning_nrml.data.tables import read_label_table
from lightning_nrml.memory import SampleLedger


def table(**kwargs) -> pd.DataFrame:
    return audit_table(
        np.array([0, 1, 2, 1]),
        np.log([0.9, 0.1, 0.4, np.nan]),
        np.array([0, 2, 1, -1]),
        confidence=np.array([0.9, 0.95, 0.6, np.nan]),
        class_names=["ant", "bee", "cat"],
        path=["a.png", "b.png", "c.png", "d.png"],
        **kwargs,
    )


def test_order_names_and_columns():
    frame = table(clean_label=np.array([0, 2, 2, 1]), extra={"times_seen": np.array([4, 3, 2, 1])})
    assert frame["index"].tolist() == [1, 2, 0, 3]  # the one that was never judged goes last
    assert frame["rank"].tolist() == [1, 2, 3, 4]
    assert frame["label_name"].tolist() == ["bee", "cat", "ant", "bee"]
    assert frame["suggested_name"].tolist() == ["cat", "bee", "ant", ""]
    assert frame["clean_label"].tolist() == [2, 2, 0, 1]
    assert frame["times_seen"].tolist() == [3, 2, 4, 1]


def test_rules():
    drop = corrected_labels(table(), "drop")
    assert drop["index"].tolist() == [0, 1, 2, 3]
    assert drop["keep"].tolist() == [True, False, False, True]
    assert drop["label"].tolist() == [0, 1, 2, 1]
    relabel = corrected_labels(table(), "relabel")
    assert relabel["action"].tolist() == ["kept", "relabelled", "dropped", "kept"]
    assert relabel["label"].tolist() == [0, 2, 2, 1]
    assert relabel["label_name"].tolist() == ["ant", "cat", "cat", "bee"]
    assert corrected_labels(table(), "drop", below=0.2)["keep"].tolist() == [True, False, True, True]
    with pytest.raises(ValueError, match="rule is 'guess': choose one of drop, relabel"):
        corrected_labels(table(), "guess")
    with pytest.raises(ValueError, match=r"below is a probability in \[0, 1\], got 2"):
        corrected_labels(table(), below=2)


def test_review_wins(tmp_path):
    review = tmp_path / "labels_reviewed.csv"
    review.write_text(
        "index,label,keep,given_label,mark\n0,0,true,0,\n1,1,true,1,right\n2,1,true,2,wrong\n3,1,false,1,wrong\n"
    )
    out = apply_review(corrected_labels(table()), review)
    assert out["label"].tolist() == [0, 1, 1, 1]
    assert out["keep"].tolist() == [True, True, True, False]
    assert out["action"].tolist() == ["kept", "kept", "relabelled", "dropped"]
    assert out["label_name"].tolist() == ["ant", "bee", "bee", "bee"]
    review.write_text("index,label,keep,mark\n0,2,true,wrong\n2,1,true,wrong\n3,2,false,wrong\n")
    out = apply_review(corrected_labels(table(), "relabel"), review)
    assert out["label_name"].tolist() == ["cat", "cat", "bee", "cat"]
    with pytest.raises(ValueError, match="index 0: label 2 is none of the 2 classes"):
        read_review(review, range(4), num_classes=2)
    review.write_text("index,label,keep,mark\n9,0,true,right\n")
    with pytest.raises(ValueError, match="names index 9, which the table has not"):
        apply_review(corrected_labels(table()), review)
    review.write_text("index,path,label,keep,mark\n0,b.png,2,true,wrong\n")
    moved = read_review(review, range(4), path=["a.png", "c.png", "b.png", "d.png"])
    assert moved["index"].tolist() == [2]  # by name where both have names: positions move
    assert read_review(review, range(4))["index"].tolist() == [0]
    with pytest.raises(ValueError, match=r"names 'b\.png', which the data lack; it is of another run"):
        read_review(review, range(1), path=["a.png"])
    review.write_text("index,label\n0,0\n")
    with pytest.raises(ValueError, match="has no column 'keep'; give the CSV that the report saved"):
        apply_review(corrected_labels(table()), review)


def test_table_datamodule_reads_the_corrected_table(tmp_path):
    """As its own table of paths, and as a label table over the first one."""
    for name in "abcd":
        Image.new("RGB", (8, 8), (ord(name), 0, 0)).save(tmp_path / f"{name}.png")
    corrected = write_both(tmp_path, "labels_corrected", corrected_labels(table(), "relabel"))
    (tmp_path / "train.csv").write_text("path,label\na.png,0\nb.png,1\nc.png,2\nd.png,1\n")
    own = TableDataModule(str(corrected), image_size=8, label_column="label_name", batch_size=1)
    over = TableDataModule(str(tmp_path / "train.csv"), image_size=8, noise=str(corrected), batch_size=1)
    for data in (own, over):
        assert data.train_label.tolist() == [0, 2, 2, 1]
        assert data.train_keep.tolist() == [True, True, False, True]
        drawn = sorted(int(i) for batch in data.train_dataloader() for i in batch["index"])
        assert drawn == [0, 1, 3]
    assert own.class_names == ["ant", "bee", "cat"]


def test_an_image_in_two_rows_is_audited_like_any_other(tmp_path):
    """In its run nothing is lost, and its corrected labels are a set of their own."""
    rng = np.random.default_rng(0)
    for i in range(12):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i}.png")
    paths = [*(f"{i}.png" for i in range(12)), "0.png"]
    label = torch.arange(13) % 2
    data = AuditData(label, 2, ["a", "b"], paths)
    embedding = torch.from_numpy(rng.normal(size=(13, 4)).astype(np.float32)) + 3 * label[:, None]
    result = audit(embedding, data, tmp_path / "audit", AuditOptions(k=3, gallery=2))
    for name in ("table", "corrected"):
        for suffix in (".csv", ".parquet"):
            back = read_label_table(result.files[name].with_suffix(suffix)).sort_values("index")
            assert back["path"].tolist() == paths
    (tmp_path / "set.csv").write_text("path,label\n" + "".join(f"{p},{i % 2}\n" for i, p in enumerate(paths)))
    for noise in (None, str(result.files["corrected"])):
        with pytest.warns(UserWarning, match="1 rows have the image of an earlier row, 0 of them"):
            again = TableDataModule(str(tmp_path / "set.csv"), noise=noise, image_size=8).train_label
        assert again.tolist() == label.tolist()


def test_corrected_table_replaces_injected_noise_and_measures_what_is_kept(tmp_path):
    noisy = DigitsDataModule(noise=NoiseConfig("symmetric", 0.5, 0))
    label, clean = noisy.train_label.numpy(), noisy.train_clean_label.numpy()
    log_p = np.where(label == clean, -0.1, -5.0)
    frame = audit_table(label, log_p, clean, confidence=np.ones(len(label)), clean_label=clean)
    for rule, rows in (("drop", int((label == clean).sum())), ("relabel", len(label))):
        path = write_both(tmp_path, rule, corrected_labels(frame, rule))
        data = DigitsDataModule(noise=str(path))
        assert int(data.train_keep.sum()) == rows
        assert data.noise_summary["rate_realised"] == 0.0
    assert noisy.noise_summary["rate_realised"] > 0.4


def test_ledger(tmp_path):
    data = DigitsDataModule(noise=NoiseConfig("symmetric", 0.5))
    write_ledger(SampleLedger(data.num_train_samples), data, tmp_path)
    frame = from_ledger(tmp_path / "noise_ledger.parquet")
    assert len(frame) == 1297
    assert frame["rank"].tolist() == list(range(1, 1298))
    assert corrected_labels(frame)["keep"].all()
    with pytest.raises(ValueError, match="'relabel' needs the confidence"):
        corrected_labels(frame, "relabel")
    (tmp_path / "x.csv").write_text("index,label\n0,1\n")
    with pytest.raises(ValueError, match="has no column 'mean_log_p_clean'"):
        from_ledger(tmp_path / "x.csv")


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_ledger_has_the_names_of_classes_and_gives_them_back(tmp_path, suffix):
    ledger = SampleLedger(4)
    suggested = torch.tensor([2, -1, 0, -1])
    ledger.record(torch.arange(4), torch.tensor([0.0, 1.0, 0.0, 1.0]), -torch.arange(4.0), suggested)
    names = ["ant", "NA", "cat", "dog"]  # nothing is given or suggested as the last
    data = SimpleNamespace(train_label=torch.tensor([0, 1, 2, 1]), class_names=names)
    frame = ledger_frame(ledger, data).set_index("index").sort_index()
    assert frame["label_name"].tolist() == ["ant", "NA", "cat", "NA"]
    assert frame["suggested_name"].tolist() == ["cat", "", "ant", ""]
    write_ledger(ledger, data, tmp_path)
    found = audit_ledger(tmp_path / f"noise_ledger.{suffix}", tmp_path / "out")
    assert found.corrected["label_name"].tolist() == ["ant", "NA", "cat", "NA"]
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert '"names":["ant","NA","cat"]' in page
    data.class_names = None
    assert "label_name" not in ledger_frame(ledger, data)


def test_noise_by_class_with_and_without_the_truth():
    p_clean = np.array([0.9, 0.5, 0.2, 1.0])
    label, clean = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
    known = audit_table(label, np.log(p_clean), label, clean_label=clean)
    noise = class_noise(known, calibrated=True)
    assert noise["count"].tolist() == [2, 2]
    np.testing.assert_allclose(noise["wrong"], [0.3, 0.4], atol=1e-6)
    assert noise["truth"].tolist() == [0.5, 0.5]
    # a ledger's scores are no probabilities: what it did not keep counts
    keep = {"keep": np.array([True, False, True, True])}
    ledger = class_noise(audit_table(label, np.log(p_clean), label, extra=keep), calibrated=False)
    assert ledger["wrong"].tolist() == [0.5, 0.0]
    assert ledger["truth"].isna().all()
