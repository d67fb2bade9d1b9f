"""The scores of an audit: closed forms, a slow second reading, blindness to a sample's own label."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from lightning_nrml.audit import (
    AuditData,
    AuditOptions,
    audit,
    audit_label_scores,
    audit_scores,
    mixture_rate,
)
from lightning_nrml.audit.noise_model import fit_confusion, fit_noise_model, log_p_clean
from lightning_nrml.audit.scores import _evidence, _judge, _means, _Problem
from lightning_nrml.audit.scores import _problem as problem_of
from lightning_nrml.audit.scores import _sample as sample_of


def blobs(rate: float, classes: int = 6, each: int = 60, spread: float = 0.5, seed: int = 0):
    """Unit rows around random directions; given and true labels, a share ``rate`` wrong."""
    g = torch.Generator().manual_seed(seed)
    centre = F.normalize(torch.randn(classes, 16, generator=g), dim=1)
    clean = torch.arange(classes).repeat_interleave(each)
    row = centre[clean] + spread * torch.randn(len(clean), 16, generator=g) / 4
    flip = torch.rand(len(clean), generator=g) < rate
    shift = torch.randint(1, classes, (len(clean),), generator=g)
    return row, torch.where(flip, (clean + shift) % classes, clean), clean


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("evidence", ["both", "centres", "knn"])
def test_finds_wrong_labels_their_class_and_their_rate(rate, evidence):
    row, label, clean = blobs(rate)
    found = audit_scores(row, label, 6, evidence)
    wrong = label != clean
    assert bool((found.log_p_clean <= 0).all())
    assert found.noise_rate == pytest.approx(float(wrong.float().mean()), abs=0.05)
    assert (found.suggested == clean).float().mean() > 0.95
    if rate:
        worst = found.log_p_clean.argsort()[: int(wrong.sum())]
        assert wrong[worst].float().mean() > 0.97


def test_half_wrong_labels_that_a_net_has_half_learned_are_not_explained_away():
    """Compact classes, each sample moved a little towards its given one, as training on noise does."""
    row, label, clean = blobs(0.5, classes=10, each=100)
    direction = F.normalize(torch.stack([row[clean == c].mean(0) for c in range(10)]), dim=1)
    found = audit_scores(row + 0.2 * direction[label], label, 10)
    wrong = label != clean
    assert found.noise_rate == pytest.approx(float(wrong.float().mean()), abs=0.05)
    doubted = found.log_p_clean.exp() < 0.5
    assert (doubted == wrong).float().mean() > 0.95


def test_bayes_in_the_log_domain():
    p, r, c = torch.tensor([0.9, 0.2, 1e-3]), 0.3, 5
    expected = (1 - r) * p / ((1 - r) * p + r * (1 - p) / (c - 1))
    log_odds = torch.tensor(r / (1 - r)).log()
    torch.testing.assert_close(log_p_clean(p.log(), log_odds, c).exp(), expected)
    # where float32 has no room for P any more, its logarithm still ranks
    far = log_p_clean(torch.tensor([-300.0, -400.0]), log_odds, c)
    torch.testing.assert_close(far[0] - far[1], torch.tensor(100.0))


def confused(spread: float):
    """Four classes; four tenths of class 0 are given as class 1, nothing else is wrong."""
    row, _, clean = blobs(0.0, classes=4, each=400, spread=spread)
    flip = torch.rand(len(clean), generator=torch.Generator().manual_seed(1)) < 0.4
    return row, torch.where(flip & (clean == 0), 1, clean), clean


def test_finds_who_is_taken_for_whom():
    row, label, _ = confused(0.8)
    found = audit_scores(row, label, 4)
    assert found.confusion is not None
    expected = torch.eye(4)
    expected[0, :2] = torch.tensor([0.6, 0.4])
    torch.testing.assert_close(found.confusion, expected, atol=0.06, rtol=0)


def test_wrong_labels_that_one_rate_for_all_pairs_explains_away():
    row, label, clean = confused(1.5)  # classes overlap
    wrong = label != clean
    problem = problem_of(F.normalize(row, dim=1), label, 4, "both", 20, 0.1, 5, 0, "torch")
    even = _judge(problem, fit_noise_model(*sample_of(problem), 4), None)
    mistakes = [((s.log_p_clean.exp() < 0.5) != wrong).sum() for s in (audit_scores(row, label, 4), even)]
    assert mistakes[0] < 0.7 * mistakes[1]


def test_confusion_equals_a_slow_loop():
    g = torch.Generator().manual_seed(0)
    evidence = torch.randn(3, 60, 3, generator=g)
    label = torch.randint(0, 3, (60,), generator=g)
    theta = torch.tensor([0.1, -0.2, 0.3, -1.0])
    a, b, d = theta[:3].exp()
    p = (a * evidence[0] + b * evidence[1] + d * evidence[2]).softmax(1).double()
    rate = 1 / (1 + math.e)
    prior = [[1 - rate if c == j else rate / 2 for j in range(3)] for c in range(3)]
    flow = [list(r) for r in prior]
    for _ in range(30):
        mass = [[10 * 3 * prior[c][j] for j in range(3)] for c in range(3)]
        for i in range(60):
            joint = [float(p[i, c]) * flow[c][label[i]] for c in range(3)]
            for c in range(3):
                mass[c][label[i]] += joint[c] / sum(joint)
        flow = [[m / sum(row) for m in row] for row in mass]
    torch.testing.assert_close(
        fit_confusion(evidence, label, theta), torch.tensor(flow), atol=1e-5, rtol=1e-4
    )


def test_even_confusion_is_the_symmetric_model():
    row, label, _ = blobs(0.3)
    problem = problem_of(F.normalize(row, dim=1), label, 6, "both", 20, 0.1, 5, 0, "torch")
    theta = fit_noise_model(*sample_of(problem), 6)
    rate = float(theta[-1].sigmoid())
    even = torch.full((6, 6), rate / 5).fill_diagonal_(1 - rate)
    by_pairs, by_rate = _judge(problem, theta, even), _judge(problem, theta, None)
    torch.testing.assert_close(by_pairs.log_p_clean, by_rate.log_p_clean, atol=1e-4, rtol=1e-3)


def test_too_few_samples_for_pairs_of_classes():
    row, label, _ = blobs(0.3, classes=6, each=5)
    assert audit_scores(row, label, 6).confusion is None  # 30 samples, 36 pairs


def test_evidence_equals_a_slow_loop():
    row, label, _ = blobs(0.3, classes=3, each=6)
    row = F.normalize(row, dim=1)
    n, fold = len(row), torch.arange(len(row)) % 3
    similarity = (row @ row.T).fill_diagonal_(-9)
    near, neighbour = similarity.topk(4)
    problem = _Problem(row, label, fold, 3, 3, neighbour, ((near - near[:, :1]) / 0.1).exp(), True)
    for i in range(n):
        cosine, tally, linear = _evidence(problem, torch.tensor([i]), _means(problem, int(fold[i])))
        voters = [j for j in range(n) if fold[j] != fold[i]]
        grand = row[voters].mean(0)
        spread = sum(torch.outer(row[j] - grand, row[j] - grand) for j in voters).double() / len(voters)
        inverse = torch.linalg.inv(spread + 0.1 * spread.trace() / 16 * torch.eye(16))
        for c in range(3):
            mine = [j for j in voters if label[j] == c]
            direction = F.normalize((row[mine] - grand).sum(0), dim=0)
            assert float(cosine[0, c]) == pytest.approx(
                float(F.normalize(row[i] - grand, dim=0) @ direction), abs=1e-5
            )
            mean = (row[mine].mean(0) - grand).double()
            score = (row[i] - grand).double() @ inverse @ mean - mean @ inverse @ mean / 2
            assert float(linear[0, c]) == pytest.approx(float(score), abs=1e-4)
            votes = [math.exp(float(row[i] @ row[j] - near[i, 0]) / 0.1) for j in neighbour[i].tolist()]
            share = sum(v for v, j in zip(votes, neighbour[i].tolist(), strict=True) if label[j] == c)
            assert float(tally[0, c]) == pytest.approx(math.log(share / sum(votes) + 1e-3), abs=1e-4)


@pytest.mark.parametrize("evidence", ["both", "centres", "knn"])
def test_a_sample_does_not_vote_for_itself(evidence, monkeypatch):
    """Whatever the label of one sample, what is suggested for it is the same.

    The four numbers of the noise model, which all labels share, are held fixed. Equal calls
    may differ in the last bit; its own vote would change the confidence by a tenth.
    """
    monkeypatch.setattr(
        "lightning_nrml.audit.scores.fit_noise_model", lambda *sample: torch.tensor([1.5, 0.5, 0.0, -1.0])
    )
    row, label, clean = blobs(0.3, each=20)
    one, two = label.clone(), label.clone()
    one[7], two[7] = clean[7], (clean[7] + 2) % 6
    first, second = (audit_scores(row, y, 6, evidence, k=5) for y in (one, two))
    assert first.suggested[7] == second.suggested[7]
    torch.testing.assert_close(first.confidence[7], second.confidence[7], rtol=1e-5, atol=0.0)
    assert first.log_p_clean[7] > second.log_p_clean[7]


KINDS = pytest.mark.parametrize("evidence", ["both", "centres", "knn"])


def with_lone_classes(lone: int, share: float = 0.0):
    """120 rows of 6 classes and ``lone`` classes of one sample each, around directions of their own."""
    row, label, clean = blobs(share, each=20)
    g = torch.Generator().manual_seed(1)
    own = F.normalize(torch.randn(lone, 16, generator=g), dim=1)
    return torch.cat([row, own]), torch.cat([label, 6 + torch.arange(lone)]), label != clean


@KINDS
def test_nothing_is_known_of_a_class_of_one_sample(evidence):
    row, label, _ = with_lone_classes(30)
    found = audit_scores(row, label, 37, evidence)  # 36 has no sample at all
    assert bool(found.log_p_clean[120:].isnan().all())
    assert bool(found.confidence[120:].isnan().all())
    assert found.suggested.tolist() == label[:120].tolist() + [-1] * 30
    assert float(found.log_p_clean[:120].exp().min()) > 0.9
    # they are a fifth of all: counted as wrong they would show in the rate and in its fit
    assert found.noise_rate < 0.01
    assert found.parameters["rate"] < 0.01


@KINDS
def test_samples_of_lone_classes_hide_no_wrong_labels(evidence):
    row, label, wrong = with_lone_classes(10, 0.2)
    found = audit_scores(row, label, 16, evidence)
    assert (found.log_p_clean[:120].exp() < 0.5).tolist() == wrong.tolist()
    assert found.noise_rate == pytest.approx(float(wrong.float().mean()), abs=0.03)


@KINDS
def test_a_class_whose_other_sample_is_of_the_same_fold(evidence):
    """Centres then know nothing of it; neighbours do, and so does each of two folds about the other."""
    row, label, _ = with_lone_classes(2)
    fold = torch.randperm(122, generator=torch.Generator().manual_seed(0)) % 5
    for together in (True, False):
        twin = next(i for i in range(120) if (fold[i] == fold[120]) == together)
        given, moved = label.clone(), row.clone()
        given[twin], moved[twin] = 6, row[120] + 0.01
        found = audit_scores(moved, given, 8, evidence)
        pair = found.log_p_clean[[twin, 120]]
        if together and evidence != "knn":
            assert bool(pair.isnan().all())
        else:
            assert float(pair.exp().min()) > 0.5
            assert found.suggested[[twin, 120]].tolist() == [6, 6]
        assert found.log_p_clean.isnan().sum() == pair.isnan().sum() + 1  # and 7, which is alone


@KINDS
def test_a_label_that_only_one_sample_has_or_lacks(evidence):
    row, label, _ = blobs(0.0, each=20)
    given = F.one_hot(label, 8)
    given[:, 6], given[:, 7] = 0, 1
    given[5, 6], given[9, 7] = 1, 0
    found = audit_label_scores(row, given, evidence)
    score, suggested = found.log_p_clean.view(120, 8), found.suggested.view(120, 8)
    assert score.isnan().nonzero().tolist() == [[5, 6], [9, 7]]
    assert (suggested < 0).nonzero().tolist() == [[5, 6], [9, 7]]
    # without a voter for the other answer the given one is right
    fold = torch.randperm(120, generator=torch.Generator().manual_seed(0)) % 5
    for sample, c in ((5, 6), (9, 7)):
        beside = (fold == fold[sample]) & (torch.arange(120) != sample)
        assert torch.equal(suggested[beside, c], given[beside, c])
        assert float(score[beside, c].exp().min()) > 0.99
    assert found.noise_rate < 0.05


def test_only_lone_classes_and_their_files(tmp_path):
    row, label, _ = with_lone_classes(30)
    for evidence in ("both", "centres", "knn"):
        found = audit_scores(row[120:], label[120:] - 6, 30, evidence)
        assert bool(found.log_p_clean.isnan().all())
        assert math.isnan(found.noise_rate)
    result = audit(row[:124], AuditData(label[:124], 10), tmp_path)
    assert result.table["index"].tolist()[-4:] == [120, 121, 122, 123]
    assert result.table["suggested_label"].tolist()[-4:] == [-1] * 4
    assert result.corrected["action"].tolist() == ["kept"] * 124
    several = F.one_hot(label[:124], 10)
    result = audit(row[:124], AuditData(several, 10), tmp_path, AuditOptions(rule="relabel"))
    assert result.table["sample"].tolist()[-4:] == [120, 121, 122, 123]
    assert result.table["suggested_label"].tolist()[-4:] == [-1] * 4
    assert result.rates["extra"].isna().tolist() == [False] * 6 + [True] * 4
    assert result.rates["suspected_extra"].tolist() == [0] * 10


def test_mixture_rate():
    g = torch.Generator().manual_seed(0)
    score = torch.cat(
        [torch.randn(300, generator=g) - 8, torch.randn(700, generator=g), torch.tensor([math.nan])]
    )
    assert mixture_rate(score) == pytest.approx(0.3, abs=0.01)
    assert math.isnan(mixture_rate(torch.zeros(50)))
    assert math.isnan(mixture_rate(torch.arange(5.0)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": torch.zeros(3, dtype=torch.int64)}, "label must have shape"),
        ({"num_classes": 4}, r"label runs from 0 to 5; it must lie in \[0, C - 1\] with C = num_classes = 4"),
        ({"evidence": "magic"}, "evidence is 'magic': choose one of auto, both, centres, knn"),
        ({"folds": 1}, "folds must be 2 to N = 360, got 1"),
        ({"folds": 400}, "an audit of 400 folds needs at least as many samples, got 360"),
        ({"label": torch.zeros(360, dtype=torch.int64)}, "the labels have 1 class: .* at least 2"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
    ],
)
def test_errors(change, message):
    row, label, _ = blobs(0.2)
    with pytest.raises(ValueError, match=message):
        audit_scores(**{"embedding": row, "label": label, **change})
    row[5, 0] = math.nan
    with pytest.raises(ValueError, match="first rows: 5"):
        audit_scores(row, label)


@pytest.mark.parametrize("evidence", ["both", "knn"])
def test_classes_without_samples_change_nothing(evidence):
    row, label, _ = blobs(0.3)
    want = audit_scores(row, label, 6, evidence)
    number = torch.tensor([1, 5, 6, 20, 33, 39])  # of the classes, among 40
    found = audit_scores(row, number[label], 40, evidence)
    assert torch.equal(found.log_p_clean, want.log_p_clean)
    assert torch.equal(found.suggested, number[want.suggested])
    assert torch.equal(found.confidence, want.confidence)
    assert found.noise_rate == want.noise_rate
    assert torch.equal(found.confusion[number[:, None], number], want.confusion)
    others = torch.ones(40, dtype=torch.bool)
    others[number] = False
    assert torch.equal(found.confusion[others], torch.eye(40)[others])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": "remove"}, "rule is 'remove': choose one of drop, relabel"),
        ({"evidence": "x"}, "evidence is 'x': choose one of"),
        ({"below": 50}, r"below is a probability in \[0, 1\], got 50"),
        ({"confident": -3}, "confident is a probability"),
    ],
)
def test_options_are_checked_when_they_are_given(change, message):
    with pytest.raises(ValueError, match=message):
        AuditOptions(**change)
