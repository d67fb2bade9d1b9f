"""The audit of multi-label data: every label of every sample is judged, in tables, report and W&B."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import trainer
from sklearn.metrics import roc_auc_score

from lightning_nrml.audit import (
    AuditData,
    AuditOptions,
    apply_review,
    audit,
    audit_label_scores,
    audit_scores,
)
from lightning_nrml.audit.labels import corrected_samples, label_entries
from lightning_nrml.callbacks import MultiLabelPRISM, NoiseReport
from lightning_nrml.data.multilabel_noise import multilabel
from lightning_nrml.data.multilabel_tables import read_multilabel_table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "modules"))
from test_multilabel import LABELS, data, module

spec = importlib.util.spec_from_file_location("audit_browser", Path(__file__).with_name("browser.py"))
browser = importlib.util.module_from_spec(spec)
spec.loader.exec_module(browser)
PROGRAM = browser.find_browser()
NAMES = ["tree", "car", "ship", "dock"]
N, L = 300, 4


@pytest.fixture(scope="module")
def scene():
    """Embeddings that add up the labels' directions, clean and noisy labels."""
    g = torch.Generator().manual_seed(0)
    clean = (torch.rand(N, L, generator=g) < torch.tensor([0.5, 0.3, 0.3, 0.15])).long()
    z = clean.float() @ torch.eye(L, 16) + 0.25 * torch.randn(N, 16, generator=g) + 0.2
    given = torch.from_numpy(multilabel(clean, 0.2, 0.2, seed=1).label)
    return z, given, clean


@pytest.fixture(scope="module")
def found(scene, tmp_path_factory):
    z, given, clean = scene
    pixels = np.zeros((N, 3, 48, 48), np.uint8)
    for c, (y, x) in enumerate(((0, 0), (0, 24), (24, 0), (24, 24))):
        bright = clean[:, c].numpy() == 1
        pixels[bright, c % 3, y : y + 24, x : x + 24] = 200
    paths = [f"scene{i:03d}.png" for i in range(N)]
    described = AuditData(given, L, NAMES, paths, clean, lambda rows: pixels[rows])
    folder = tmp_path_factory.mktemp("labels")
    options = AuditOptions(rule="relabel", confident=0.8, gallery=40)
    return audit(z, described, folder, options), described


def test_scores_of_one_label_are_those_of_two_classes(scene):
    z, given, clean = scene
    whole = audit_label_scores(z, given)
    sharpness = []
    for c in range(L):
        alone, one = audit_scores(z, given[:, c], 2), audit_label_scores(z, given[:, c : c + 1])
        torch.testing.assert_close(one.log_p_clean, alone.log_p_clean)
        assert torch.equal(one.suggested, alone.suggested)
        sharpness.append(alone.parameters)
    for name in ("centres", "neighbours"):  # of all labels together: the (lower) median
        wanted = sorted(s[name] for s in sharpness)[(L - 1) // 2]
        assert whole.parameters[name] == pytest.approx(wanted, rel=1e-4)
    wanted = sum(s["rate"] for s in sharpness) / L
    assert whole.parameters["rate"] == pytest.approx(wanted, rel=1e-4)
    wrong = given != clean
    for value in (0, 1):
        own = given == value
        assert roc_auc_score(~wrong[own], whole.log_p_clean.view(N, L)[own]) > 0.9
    same = audit_label_scores(z, torch.cat([given[:, :1], torch.zeros(N, 1).long()], dim=1))
    assert (same.log_p_clean.view(N, 2)[:, 1] == 0).all()
    with pytest.raises(ValueError, match=r"label must be \(300, L\) of 0 and 1"):
        audit_label_scores(z, given * 2)


def test_table_names_extra_and_missing_labels(found, scene):
    result, _ = found
    _, given, clean = scene
    table = result.table
    assert len(table) == N * L
    sample, c = table["sample"].to_numpy(), table["position"].to_numpy()
    assert (table["index"] == sample * L + c).all()
    value = given.numpy()[sample, c]
    names = np.asarray(NAMES, dtype=object)[c]
    assert table["label_name"].tolist() == [n if v else f"no {n}" for n, v in zip(names, value, strict=True)]
    assert table["path"].tolist() == [f"scene{i:03d}.png#{n}" for i, n in zip(sample, names, strict=True)]
    assert ((table["clean_label"] != table["label"]) == (given != clean).numpy()[sample, c]).all()
    assert (table["suggested_label"] // 2 == c).all()
    head = table.head(60)
    assert (head["clean_label"] != head["label"]).mean() > 0.9
    assert {"no tree", "tree"} <= set(head["label_name"])


def test_corrected_table_is_one_the_datamodule_reads(found, scene):
    result, described = found
    _, given, clean = scene
    table = read_multilabel_table(result.files["corrected"].with_suffix(".csv"), "path", NAMES, "split")
    assert table.images == described.paths
    turned = result.corrected.sort_values("index")["action"].to_numpy().reshape(N, L) == "relabelled"
    assert np.array_equal(table.label != given.numpy(), turned)
    assert turned.sum() > 20
    before, after = (given != clean).sum().item(), (torch.from_numpy(table.label) != clean).sum().item()
    assert after < 0.7 * before
    wide = pd.read_csv(result.files["corrected"], keep_default_na=False)
    doubted = result.corrected[result.corrected["action"] == "dropped"]["index"].to_numpy()
    named = {(i, NAMES[c]) for i, c in zip(*np.divmod(doubted, L), strict=True)}
    assert {(i, n) for i, text in enumerate(wide["doubted"]) for n in text.split(";") if n} == named


def test_marks_of_a_person_win(found, tmp_path):
    result, described = found
    kept = result.corrected[result.corrected["action"] == "kept"].iloc[0]
    other = int(kept["label"]) ^ 1
    review = pd.DataFrame({"index": [kept["index"]], "label": [other], "keep": [True], "mark": ["wrong"]})
    review.to_csv(tmp_path / "review.csv", index=False)
    wide = corrected_samples(apply_review(result.corrected, tmp_path / "review.csv"), described)
    plain = corrected_samples(result.corrected, described)
    i, c = divmod(int(kept["index"]), L)
    assert wide.loc[i, NAMES[c]] == other % 2 != plain.loc[i, NAMES[c]]
    assert (wide[NAMES] != plain[NAMES]).to_numpy().sum() == 1


def embedded(page: Path) -> dict:
    text = page.read_text(encoding="utf-8")
    return json.loads(
        re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)[1]
    )


def test_report_tells_of_each_label_what_is_extra_and_missing(found, scene):
    result, _ = found
    _, given, clean = scene
    page = embedded(result.files["report"])
    assert page["tiles"][:2] == [["samples", "300"], ["labels of each", "4"]]
    assert page["names"] == ["no tree", "tree", "no car", "car", "no ship", "ship", "no dock", "dock"]
    rates = {c: truth for c, _, _, truth in page["classes"]}
    for c in range(L):
        for value in (0, 1):
            own = given[:, c] == value
            want = float((clean[own, c] != value).float().mean())
            assert rates[2 * c + value] == pytest.approx(want, abs=1e-3)
    assert page["pr"]["auroc"] > 0.9
    assert all(str(r["index"]) in page["thumbs"] for r in page["rows"][:40])


def test_at_the_end_of_a_fit_with_the_filters_ledger(tmp_path):
    report = NoiseReport(history=2, options=AuditOptions(gallery=5))
    net, source = module("bce"), data()
    run = trainer(tmp_path, 4, [MultiLabelPRISM(warmup_steps=9), report], limit_val_batches=0)
    run.fit(net, source)
    table = pd.read_parquet(tmp_path / "audit" / "audit.parquet").sort_values("index")
    assert len(table) == 96 * LABELS
    assert (table["times_seen"] == 4).all()
    assert table["times_dropped"].tolist() == net.noise_ledger.label_dropped.flatten().tolist()
    last = net.noise_ledger.label_last_score.flatten().float().numpy()
    np.testing.assert_allclose(table["epoch_3"], last)
    assert "epoch_1" not in table
    summary = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert summary["samples"] == 96 * LABELS


def test_entries_hide_nothing_of_unnamed_data():
    described = label_entries(AuditData(torch.tensor([[0, 1], [1, 1]]), 2))
    assert described.label.tolist() == [0, 3, 1, 3]
    assert described.class_names == ["no 0", "0", "no 1", "1"]
    assert described.images is described.paths is described.clean_label is None


@pytest.mark.skipif(
    PROGRAM is None, reason="no Chromium found (set CHROMIUM to its path, or apt install chromium)"
)
@pytest.mark.timeout(600)
def test_in_a_browser(found, tmp_path):
    result, _ = found
    cards = "[...document.querySelectorAll('.card')].map(c => +c.dataset.index)"
    with browser.Browser(PROGRAM, tmp_path) as page:
        for name, size in (("laptop", (1366, 768)), ("phone", (390, 844))):
            page.size(*size, phone=name == "phone")
            page.open(result.files["report"])
            assert page.run(cards) == result.table["index"].head(24).tolist()
            assert page.run("document.documentElement.scrollWidth <= innerWidth")
            assert page.run("document.images.length >= 24")
            page.screenshot(tmp_path / f"{name}.png")
        first = result.table.iloc[0]
        shown = page.run("document.querySelector('.card .what').textContent")
        assert first["label_name"] in shown
        assert first["suggested_name"] in shown
        assert first["path"] in shown
        code = int(first["label"])
        page.run(
            f"(() => {{ const s = document.getElementById('fg'); s.value = '{code}'; "
            "s.dispatchEvent(new Event('input')); })()"
        )
        same = result.table.head(1000)
        assert page.run(cards) == same[same["label"] == code]["index"].head(24).tolist()
        assert not page.problems
