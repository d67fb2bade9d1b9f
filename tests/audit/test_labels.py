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
    ReportFacts,
    apply_review,
    audit,
    audit_label_scores,
    audit_scores,
)
from lightning_nrml.audit.labels import corrected_samples, label_entries, reviewed_entries
from lightning_nrml.audit.report import page_data
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


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
@pytest.mark.parametrize("with_paths", [True, False])
def test_labels_may_be_called_like_columns_of_a_label_table(scene, tmp_path, suffix, with_paths):
    z, given, _ = scene
    names = ["path", "keep", "index", "weight"]
    described = AuditData(given, L, names, [f"{i}.png" for i in range(N)] if with_paths else None)
    result = audit(z, described, tmp_path, AuditOptions(rule="relabel", gallery=3))
    read = read_multilabel_table(
        result.files["corrected"].with_suffix(f".{suffix}"), "file" if with_paths else None
    )
    wanted = result.corrected.sort_values("index")["label"].to_numpy().reshape(N, L) % 2
    assert (read.names, read.label.tolist()) == (names, wanted.tolist())
    assert read.images[1:3] == (["1.png", "2.png"] if with_paths else ["1", "2"])
    # as the report saves it
    frame = pd.read_csv(result.files["corrected"]).assign(marks="")
    frame.loc[7, "marks"] = "1:right 2:unsure"
    frame.to_csv(tmp_path / "review.csv", index=False)
    assert reviewed_entries(tmp_path / "review.csv", described)["index"].tolist() == [7 * L + 1, 7 * L + 2]


def test_samples_of_one_image_are_told_apart_by_index(scene, tmp_path):
    z, given, _ = scene
    described = AuditData(given, L, NAMES, ["0.png"] * 2 + [f"{i}.png" for i in range(2, N)])
    result = audit(z, described, tmp_path, AuditOptions(gallery=3))
    wide = pd.read_csv(result.files["corrected"])
    assert (wide.columns[0], wide["index"].tolist()) == ("index", list(range(N)))
    assert embedded(result.files["report"])["paths"] is None


@pytest.mark.parametrize("names", [["tree", "car", "ship", "marks"], ["tree", "car", "ship", "car"]])
def test_names_that_no_table_can_hold_are_told_before_the_work(scene, names):
    with pytest.raises(ValueError, match=f"would have two columns '{names[3]}'; rename the label"):
        AuditData(scene[1], L, names)


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
    assert all(str(r["index"] // L) in page["thumbs"] for r in page["rows"][:40])


def test_neighbours_are_the_nearest_that_look_like_having_and_like_lacking_the_label(found, scene):
    result, _ = found
    z, given, _ = scene
    row = torch.nn.functional.normalize(z, dim=1)
    by_entry = result.table.sort_values("index")
    trusted = (np.exp(by_entry["log_p_clean"]) >= 0.5) & (by_entry["suggested_label"] == by_entry["label"])
    trusted = torch.from_numpy(trusted.to_numpy(copy=True).reshape(N, L))
    head = result.table.head(40)
    differ = result.table[result.table["suggested_label"] != result.table["label"]]
    company = differ[differ["sample"].isin(head["sample"])]["index"]
    assert set(result.neighbours) == {*head["index"], *company}
    for entry, near in result.neighbours.items():
        i, c = divmod(entry, L)
        cosine = row @ row[i]
        cosine[i] = -9  # not itself
        want = []
        for value in (1, 0):
            own = torch.where(trusted[:, c] & (given[:, c] == value), cosine, -9.0)
            want += [(int(j) * L + c, float(own[j])) for j in own.topk(4).indices]
        assert [n for n, _ in near] == [n for n, _ in want]
        np.testing.assert_allclose([s for _, s in near], [s for _, s in want], atol=1e-5)
    page = embedded(result.files["report"])
    for record in page["rows"][:40]:
        c = record["index"] % L
        assert [n[1] for n in record["near"]] == [2 * c + 1] * 4 + [2 * c] * 4
        assert all(str(n[0] // L) in page["thumbs"] for n in record["near"])


def test_samples_without_an_embedding_have_and_are_no_neighbours(scene, tmp_path):
    z, given, _ = scene
    index = torch.arange(N)[torch.arange(N) % 10 != 3]
    result = audit(z[index], AuditData(given, L, NAMES), tmp_path, AuditOptions(gallery=30), index=index)
    assert {i // L % 10 for near in result.neighbours.values() for i, _ in near} == set(range(10)) - {3}
    assert all(i // L % 10 != 3 for i in result.neighbours)
    last = result.table.tail(N // 10 * L)
    assert (last["sample"] % 10 == 3).all()
    assert last["log_p_clean"].isna().all()


def test_report_has_all_suspected_labels_of_the_images_it_shows(scene, tmp_path):
    z, given, _ = scene
    result = audit(z, AuditData(given, L, NAMES), tmp_path, AuditOptions(gallery=10))
    page = page_data(
        result.table, ReportFacts(labels=L), None, label_entries(AuditData(given, L)).class_names, 10, 10
    )
    held = [r["index"] for r in page["rows"]]
    assert held[:10] == result.table["index"].head(10).tolist()
    differ = result.table[result.table["suggested_label"] != result.table["label"]]
    shown = set(result.table["sample"].head(10))
    assert set(held[10:]) == set(differ[differ["sample"].isin(shown)]["index"]) - set(held[:10])
    assert held[10:]


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
    assert (summary["samples"], summary["labels"]) == (96, 96 * LABELS)


def test_entries_hide_nothing_of_unnamed_data():
    described = label_entries(AuditData(torch.tensor([[0, 1], [1, 1]]), 2))
    assert described.label.tolist() == [0, 3, 1, 3]
    assert described.class_names == ["no 0", "0", "no 1", "1"]
    assert described.images is described.paths is described.clean_label is None


@pytest.mark.skipif(
    PROGRAM is None, reason="no Chromium found (set CHROMIUM to its path, or apt install chromium)"
)
@pytest.mark.timeout(600)
def test_in_a_browser(found, scene, tmp_path):
    result, described = found
    table = result.table
    differ = table[table["suggested_label"] != table["label"]]
    at = "document.querySelector('.card.at').dataset.index"
    with browser.Browser(PROGRAM, tmp_path) as page:
        page.size(1366, 768)
        page.open(result.files["report"])
        assert page.cards() == table["index"].head(24).tolist()
        first = table.iloc[0]
        kind, name, image = first["kind"], NAMES[first["position"]], f"scene{first['sample']:03d}.png"
        shown = page.run("document.querySelector('.card').innerText")
        for text in (f"{kind} {name}", image, f"nearest with {name}", f"nearest without {name}"):
            assert text in shown
        assert page.run("document.querySelector('.card').querySelectorAll('img').length") == 9
        # filter by label and kind, search, sort
        c = int(first["position"])
        both = table[(table["position"] == c) & (table["kind"] == kind)].head(1000)
        page.choose("fg", str(c))
        assert page.choose("fs", str(int(kind == "extra"))) == both["index"].head(24).tolist()
        page.choose("fg", "")
        page.choose("fs", "")
        found_here = page.choose("q", image)
        assert set(found_here) == set(table[table["sample"] == first["sample"]]["index"])
        page.choose("q", "")
        by_image = page.choose("sort", "index")
        assert by_image == sorted(by_image)
        page.choose("sort", "rank")
        # the rates of each label
        rates = page.run("document.getElementById('classes').innerText")
        for _, rate in result.rates.iterrows():
            assert f"{100 * rate['missing']:.1f} %" in rates
        # marks by keyboard: the first wrong, the second right
        for key in ("w", "ArrowRight", "r"):
            page.press(key)
        # image by image, where the second is still chosen; arrows go by image and by label
        page.press("i")
        assert int(page.run(at)) == table["index"][1]
        page.choose("fm", "")
        top = page.run(
            "[...document.querySelectorAll('.group')].map(g => "
            "[...g.querySelectorAll('.card')].map(c => +c.dataset.index))"
        )
        samples = list(dict.fromkeys(differ["sample"]))[:8]
        assert top == [differ[differ["sample"] == s]["index"].tolist() for s in samples]
        several = next(i for i, g in enumerate(top) if len(g) > 1)
        for _ in range(several):
            page.press("ArrowRight")
        page.press("ArrowDown")
        assert int(page.run(at)) == top[several][1]
        page.press("ArrowRight")
        assert int(page.run(at)) == top[several + 1][0]
        page.press("n")
        assert (
            page.cards()[0]
            == differ[differ["sample"] == list(dict.fromkeys(differ["sample"]))[8]]["index"].iloc[0]
        )
        page.press("u")
        third = int(page.run(at))
        page.size(390, 844, phone=True)
        assert page.run("document.documentElement.scrollWidth") <= 390
        page.press("i")
        assert page.run("document.documentElement.scrollWidth") <= 390
        saved = page.save(tmp_path / "labels_reviewed.csv")
        assert page.problems == []
    _, given, _ = scene
    read = read_multilabel_table(saved)
    assert (read.images, read.names, read.clean_known) == (described.paths, NAMES, True)
    one, two = table["index"].head(2).tolist()
    want = given.clone()
    want[one // L, one % L] ^= 1
    assert np.array_equal(read.label, want.numpy())
    marks = reviewed_entries(saved, described).set_index("index")["mark"].to_dict()
    assert marks == {one: "wrong", two: "right", third: "unsure"}


def test_the_covariance_is_worked_out_once_for_all_labels(monkeypatch):
    """It is the same for every label: with thousands of numbers in an embedding it is most of the work."""
    done = []
    for name in ("solve", "lu_factor"):
        real = getattr(torch.linalg, name)
        monkeypatch.setattr(torch.linalg, name, lambda *a, f=real, **k: (done.append(f), f(*a, **k))[1])
    generator = torch.Generator().manual_seed(0)
    label = (torch.rand(60, 6, generator=generator) < 0.4).long()
    audit_label_scores(torch.randn(60, 8, generator=generator), label)
    assert len(done) == 5  # folds
