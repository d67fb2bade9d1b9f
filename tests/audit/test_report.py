"""The report: bounded, safe, complete; and in a real browser: loads, sorts, filters, marks, exports."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_nrml.audit import (
    AuditData,
    AuditOptions,
    ReportFacts,
    audit,
    audit_ledger,
    audit_table,
    write_report,
)
from lightning_nrml.audit.report import page_data, thumbnail
from lightning_nrml.callbacks.ledger_file import write_ledger
from lightning_nrml.data import DigitsDataModule, NoiseConfig
from lightning_nrml.memory import SampleLedger

spec = importlib.util.spec_from_file_location("audit_browser", Path(__file__).with_name("browser.py"))
browser = importlib.util.module_from_spec(spec)
spec.loader.exec_module(browser)


def embedded(page: Path) -> dict:
    text = page.read_text(encoding="utf-8")
    return json.loads(
        re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)[1]
    )


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The audit of digits by their pixels, 20 % wrong."""
    data = DigitsDataModule(noise=NoiseConfig("symmetric", 0.2, 0))
    images = data.splits.train.images
    pixels = images.get(range(len(images))).float().flatten(1)
    folder = tmp_path_factory.mktemp("audit")
    described = AuditData(
        data.train_label,
        10,
        [f"digit {i}" for i in range(10)],
        None,
        data.train_clean_label,
        lambda rows: images.get(rows.tolist()).numpy(),
    )
    extra = {f"epoch_{e}": np.linspace(-3 + e, -1, 1297) for e in range(3)}
    return audit(
        pixels - pixels.mean(1, keepdim=True), described, folder, AuditOptions(gallery=40), None, extra
    )


def test_names_who_is_taken_for_whom(tmp_path):
    """A fourth of the threes is given as eights, and the report says so first."""
    data = DigitsDataModule()
    images = data.splits.train.images
    pixels = images.get(range(len(images))).float().flatten(1)
    label = data.train_label.clone()
    label[(label == 3).nonzero().flatten()[::4]] = 8
    described = AuditData(label, 10, [f"digit {i}" for i in range(10)])
    found = audit(pixels - pixels.mean(1, keepdim=True), described, tmp_path, AuditOptions(gallery=5))
    summary = json.loads(found.files["summary"].read_text())
    first, second, third = summary["most often given as another class"].split(", ")
    assert first.startswith("digit 3 as digit 8 ")
    shares = [float(text.rsplit(" ", 1)[1].rstrip("%")) for text in (first, second, third)]
    assert 10 <= shares[0] <= 30
    assert shares[1] < 10
    assert shares == sorted(shares, reverse=True)


def test_digits_are_ranked_and_counted(digits):
    page = embedded(digits.files["report"])
    assert page["pr"]["auroc"] > 0.99
    assert digits.noise_rate == pytest.approx(0.209, abs=0.03)
    assert page["total"] == 1297
    assert len(page["labels"].split(",")) == 1297
    assert sum(page["hist"]["count"]) == 1297
    wrong = digits.table["label"] != digits.table["clean_label"]
    assert sum(page["hist"]["wrong"]) == int(wrong.sum())
    assert sum(n for _, n, _, _ in page["classes"]) == 1297
    assert sum(map(sum, page["matrix"])) == int(
        (digits.table["suggested_label"] != digits.table["label"]).sum()
    )
    first = page["rows"][0]
    assert first["rank"] == 1
    assert first["truth"] != first["label"]
    assert len(first["near"]) == 4
    assert first["hist"] == [round(float(digits.table[f"epoch_{e}"][0]), 2) for e in range(3)]
    # a trusted neighbour is another sample, and the page has its picture
    for index, label, _ in first["near"]:
        assert index != first["index"]
        assert str(index) in page["thumbs"]
        assert label == int(digits.table.set_index("index").loc[index, "label"])


def test_page_needs_no_network_and_cannot_be_broken_by_names(tmp_path):
    evil = '</script><script>alert("x")</script>'
    frame = audit_table(np.array([0, 1]), np.log([0.5, 0.9]), np.array([1, 1]), class_names=[evil, "b"])
    text = write_report(tmp_path / "r.html", frame, ReportFacts(evil), None, [evil, "b"]).read_text()
    assert text.count("</script>") == 2
    assert embedded(tmp_path / "r.html")["names"] == [evil, "b"]
    assert not re.findall(r"""(?:src|href)=["']?https?:""", text)
    assert "https://" not in text.replace("__DATA__", "")


def test_page_of_a_million_samples_is_small(tmp_path):
    g = np.random.default_rng(0)
    label = g.integers(0, 1000, 1_000_000)
    frame = audit_table(
        label,
        -g.exponential(size=len(label)).astype(np.float32),
        g.integers(0, 1000, len(label)),
        confidence=g.random(len(label)),
        path=[f"images/{i}.jpg" for i in range(len(label))],
        clean_label=label,
    )
    page = write_report(tmp_path / "r.html", frame, ReportFacts())
    assert page.stat().st_size < 6_000_000
    held = embedded(page)
    assert (len(held["rows"]), len(held["classes"]), held["total"]) == (1000, 200, 1_000_000)
    bigger = page_data(frame.assign(index=frame["index"] * 2), ReportFacts(), None, None, 10, 10)
    assert bigger["labels"] is None  # of a part of a set only the marks can be saved


@pytest.mark.parametrize(
    ("bands", "side", "kind"), [(1, 8, "png"), (3, 300, "jpeg"), (13, 64, "jpeg"), (2, 50, "jpeg")]
)
def test_thumbnails(bands, side, kind):
    import base64

    uri = thumbnail(np.full((bands, side, side // 2), 7, dtype=np.uint8))
    assert uri.startswith(f"data:image/{kind};base64,")
    image = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    assert image.size == (min(side, 96) // 2, min(side, 96))


def test_ledger_alone(tmp_path):
    data = DigitsDataModule(noise=NoiseConfig("symmetric", 0.5))
    ledger = SampleLedger(1297)
    wrong = data.train_is_noise
    score = torch.where(wrong, -4.0, -1.0) + 0.3 * torch.randn(
        1297, generator=torch.Generator().manual_seed(0)
    )
    ledger.record(torch.arange(1297), (~wrong).float(), score, data.train_clean_label)
    write_ledger(ledger, data, tmp_path)
    found = audit_ledger(tmp_path / "noise_ledger.csv", tmp_path / "out")
    assert found.noise_rate == pytest.approx(float(wrong.float().mean()), abs=0.02)
    assert found.corrected["keep"].tolist() == (~wrong).tolist()
    page = embedded(found.files["report"])
    assert page["calibrated"] is False
    assert page["pr"]["auroc"] > 0.99
    assert page["rows"][0]["seen"] == 1


def test_images_that_cannot_be_read_are_not_judged(tmp_path):
    data = DigitsDataModule(noise=NoiseConfig("symmetric", 0.2, 0))
    images = data.splits.train.images
    z = images.get(range(1297)).float().flatten(1)
    described = AuditData(data.train_label, 10)
    index = torch.arange(1297)[torch.arange(1297) != 5]
    found = audit(z[index], described, tmp_path, index=index)
    row = found.table.set_index("index").loc[5]
    assert np.isnan(row["log_p_clean"])
    assert row["rank"] == 1297
    assert bool(found.corrected.set_index("index").loc[5, "keep"])
    assert all(r["index"] != 5 for r in embedded(found.files["report"])["rows"])
    whole = audit(z, described, tmp_path)
    for suspect, near in whole.neighbours.items():
        assert suspect not in [i for i, _ in near]


PROGRAM = browser.find_browser()


@pytest.mark.skipif(
    PROGRAM is None, reason="no Chromium found (set CHROMIUM to its path, or apt install chromium)"
)
@pytest.mark.timeout(600)
def test_in_a_browser(digits, tmp_path):
    table = digits.table
    with browser.Browser(PROGRAM, tmp_path) as page:
        page.size(1366, 768)
        page.open(digits.files["report"])
        assert page.cards() == table["index"].head(24).tolist()
        assert page.run(
            "document.images.length > 24 && [...document.images].every(i => i.src.startsWith('data:'))"
        )
        # sort, filter, search
        assert page.choose("sort", "index") == sorted(table["index"].head(1000))[:24]
        page.choose("sort", "rank")
        three = page.choose("fg", "3")
        assert three == table[table["label"] == 3]["index"].head(24).tolist()
        page.choose("fg", "")
        wanted = int(table["index"][2])
        assert wanted in page.choose("q", str(wanted))
        assert page.choose("q", "no such thing") == []
        page.choose("q", "")
        # keyboard: mark the first wrong, the second right, take a third one back
        page.run("document.activeElement.blur()")
        for key in ("w", "ArrowRight", "r", "ArrowRight", "u", "u"):
            page.press(key)
        first, second = table["index"].head(2).tolist()
        assert page.choose("fm", "wrong") == [first]
        assert page.choose("fm", "right") == [second]
        assert page.choose("fm", "unsure") == []
        page.choose("fm", "")
        page.run("document.activeElement.blur()")
        page.press("n")
        assert page.cards() == table["index"][24:48].tolist()
        # export
        page.choose("rule", "relabel")
        saved = page.save(tmp_path / "labels_reviewed.csv")
        # readable on a phone: nothing sticks out sideways
        page.size(390, 844, phone=True)
        assert page.run("document.documentElement.scrollWidth") <= 390
        assert page.problems == []
    rows = {int(r["index"]): r for r in csv.DictReader(saved.open())}
    assert len(rows) == 1297
    assert int(rows[first]["label"]) == int(table["suggested_label"][0])
    assert [rows[i]["mark"] for i in (first, second)] == ["wrong", "right"]
    given = table.set_index("index")["label"]
    assert all(int(r["label"]) == given[i] for i, r in rows.items() if i != first)
    # what the page saves goes back into training
    data = DigitsDataModule(noise=str(saved))
    assert data.train_clean_label is not None  # known to the audit, and the page says so
    assert int(data.train_label[first]) == int(table["suggested_label"][0])


def described(names, folder):
    """Three classes of four samples and a fourth of none; the same labels whatever they are called."""
    label = np.arange(12) // 4
    suggested = np.where(np.arange(12) == 1, 2, label)
    frame = audit_table(
        label,
        np.log(np.where(np.arange(12) == 1, 0.1, 0.9)),
        suggested,
        confidence=np.full(12, 0.9),
        class_names=names,
        path=[f'{folder}/"{i}", {i}.jpg' for i in range(12)],
    )
    paths = frame.sort_values("index")["path"].tolist()
    return frame, ReportFacts(sample_paths=paths), names


@pytest.mark.skipif(
    PROGRAM is None, reason="no Chromium found (set CHROMIUM to its path, or apt install chromium)"
)
@pytest.mark.timeout(600)
def test_marks_of_two_sets_and_of_two_tabs_are_kept_apart_and_together(tmp_path):
    pages = []
    hebrew, arabic = "\u05d0\u05d1\u05d2", "\u0639\u0631\u0628"
    for folder, names in (("birds", [hebrew, "b", arabic, "none"]), ("cars", ["x" * 300, "y", "z", "none"])):
        frame, facts, names = described(names, folder)
        pages.append(write_report(tmp_path / f"{folder}.html", frame, facts, None, names, rows=6, gallery=6))
    key = "Object.keys(localStorage).find(k => k.startsWith('nrml-audit'))"
    stored = f"JSON.parse(localStorage.getItem({key}))"
    with browser.Browser(PROGRAM, tmp_path) as page:
        page.size(1366, 768)
        page.open(pages[0])
        # names written from right to left do not change places: given first, then the suggestion
        for of in (".card b", "#pairs bdi"):
            names = f"[...document.querySelectorAll('{of}')].slice(0, 2)"
            given, suggested = page.run(f"{names}.map(b => b.getBoundingClientRect().left)")
            assert given < suggested
        # another tab has marked sample 3 since this one was opened
        page.press("w")
        page.run(f"localStorage.setItem({key}, JSON.stringify({{...{stored}, 3: 'right'}}))")
        page.press("ArrowRight")
        page.press("w")
        second = page.cards()[1]
        assert page.run(stored) == {"1": "wrong", "3": "right", str(second): "wrong"}
        # a class that is in the lists but not among the rows of the page
        page.run("document.querySelector('#classes tr[data-c=\"2\"]').click()")
        assert page.cards() == []
        assert "the 6 most suspicious" in page.run("document.getElementById('grid').innerText")
        page.choose("rule", "relabel")
        saved = page.save(tmp_path / "labels_reviewed.csv")
        # storage that is full (all reports of a disk may share one) takes no more marks, but none is lost
        page.choose("fg", "")
        full = "Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError') }"
        page.run(f"{full}; 0")
        for _ in range(3):
            page.press("ArrowRight")
            page.press("u")
        page.choose("fm", "unsure")
        assert len(page.cards()) == 3
        # the same labels, another data set
        page.open(pages[1])
        assert "marked" not in page.run("document.getElementById('count').innerText")
        page.size(390, 844, phone=True)
        assert page.run("document.documentElement.scrollWidth") <= 390
        assert page.problems == []
    rows = list(csv.DictReader(saved.open()))
    assert [row["path"] for row in rows] == [f'birds/"{i}", {i}.jpg' for i in range(12)]
    assert [row["label"] for row in rows][:4] == ["0", "2", "0", "0"]
    assert [int(row["index"]) for row in rows if row["mark"]] == sorted({1, 3, second})
    assert [row["index"] for row in rows if row["keep"] == "false"] == [str(second)]


def test_sets_without_names_are_told_apart_by_their_pixels(tmp_path):
    """Two npz files of equally many images per class have the same labels."""
    label = torch.arange(40) % 4
    frame = audit_table(label.numpy(), np.linspace(-3, 0, 40), label.numpy())

    def name(pixels: np.ndarray | None) -> str:
        images = None if pixels is None else lambda rows: pixels[rows]
        return page_data(frame, ReportFacts(), images, None, 4, 10)["id"]

    rng = np.random.default_rng(0)
    birds, cars = (rng.integers(0, 255, (40, 1, 8, 8), dtype=np.uint8) for _ in range(2))
    assert name(birds) != name(cars)
    assert name(birds) == name(birds.copy())
    assert name(birds) != name(None)
    # with names the pixels are not asked, which may be damaged files
    frame["path"] = [f"{i}.png" for i in range(40)]
    assert name(birds) == name(None)
