"""Noise on multi-label data: exact numbers per class, laws of each generator, errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_nrml.data import noise
from lightning_nrml.data.multilabel_noise import apply_multilabel_noise
from lightning_nrml.data.noise import NoiseConfig, apply_noise

# UC Merced, training split, airplane ... water
SIZES = [60, 430, 402, 543, 70, 63, 60, 61, 599, 62, 800, 177, 60, 60, 61, 605, 121]
FLIPS = {
    0.2: [12, 86, 80, 108, 14, 12, 12, 12, 119, 12, 160, 35, 12, 12, 12, 121, 24],
    0.4: [24, 172, 160, 217, 28, 25, 24, 24, 239, 24, 320, 70, 24, 24, 24, 242, 48],
    0.6: [36, 258, 241, 325, 42, 37, 36, 36, 359, 37, 480, 106, 36, 36, 36, 363, 72],
}
N, L = 1285, 17


def stand_in() -> np.ndarray:
    """Labels with UC Merced's sizes."""
    rng = np.random.default_rng(0)
    target = np.zeros((N, L), dtype=np.int64)
    for c, size in enumerate(SIZES):
        target[rng.permutation(N)[:size], c] = 1
    return target


def capped(rate: float) -> list[int]:
    return [min(flips, int(0.95 * N) - size) for flips, size in zip(FLIPS[rate], SIZES, strict=True)]


@pytest.fixture(scope="module")
def real(shared_data) -> np.ndarray:
    folder = shared_data("ucmerced_multilabel")
    lines = (folder / "LandUse_Multilabeled.txt").read_text().split("\n")[1:]
    rows = {c[0]: [int(v) for v in c[1:]] for c in (line.split() for line in lines) if c}
    return np.array([rows[stem] for stem in (folder / "split_train.txt").read_text().split()])


KINDS = {
    "subtractive": lambda t, r, s: noise.multilabel(t, r, 0.0, s),
    "additive": lambda t, r, s: noise.multilabel(t, 0.0, r, s),
    "mixed": lambda t, r, s: noise.multilabel(t, r, r, s),
    "uniform": noise.multilabel_uniform,
    "images": noise.multilabel_images,
}
EVERY = pytest.mark.parametrize("kind", KINDS)


@pytest.mark.parametrize("rate", FLIPS)
@pytest.mark.parametrize("seed", [0, 1, 77])
def test_flips_per_class_are_exact(rate, seed):
    target = stand_in()
    assert target.sum(0).tolist() == SIZES
    removed = KINDS["subtractive"](target, rate, seed)
    added = KINDS["additive"](target, rate, seed)
    mixed = KINDS["mixed"](target, rate, seed)
    assert removed.is_noise.sum(0).tolist() == FLIPS[rate]
    assert added.is_noise.sum(0).tolist() == capped(rate)
    assert (mixed.is_noise & (target == 1)).sum(0).tolist() == FLIPS[rate]
    assert (mixed.is_noise & (target == 0)).sum(0).tolist() == capped(rate)
    assert (removed.label <= target).all()
    assert (added.label >= target).all()


@pytest.mark.parametrize(
    ("kind", "rate", "share", "empty"),
    [
        ("additive", 0.2, 3.86, 0),
        ("additive", 0.4, 7.73, 0),
        ("additive", 0.6, 11.33, 0),
        ("subtractive", 0.4, 7.73, 119),
        ("subtractive", 0.6, 11.61, 300),
        ("mixed", 0.4, 15.46, 17),
    ],
)
def test_the_published_table_on_the_real_labels(real, kind, rate, share, empty):
    assert real.sum(0).tolist() == SIZES
    noisy = KINDS[kind](real, rate, 1)
    assert round(100 * noisy.is_noise.mean(), 2) == share
    lost = int((noisy.label.sum(1) == 0).sum())
    assert abs(lost - empty) <= 3 * np.sqrt(empty), "the generator differs, the law does not"
    expected = capped(rate) if kind == "additive" else FLIPS[rate]
    assert (noisy.is_noise & (real == (kind != "additive"))).sum(0).tolist() == expected


@EVERY
def test_rate_zero_is_the_identity_and_the_seed_alone_decides(kind):
    target = stand_in()
    assert (KINDS[kind](target, 0.0, 3).label == target).all()
    assert not KINDS[kind](target, 0.0, 3).is_noise.any()
    torch.manual_seed(0)
    first = KINDS[kind](target, 0.4, 3)
    torch.manual_seed(1)
    assert (KINDS[kind](torch.as_tensor(target), 0.4, 3).label == first.label).all()
    assert (KINDS[kind](target, 0.4, 4).label != first.label).any()
    assert [a.dtype for a in (first.label, first.clean_label, first.is_noise)] == [np.int64, np.int64, bool]
    assert (first.is_noise == (first.label != target)).all()
    assert (first.clean_label == target).all()
    assert (first.true_label == target).all()


@pytest.mark.parametrize("kind", ["subtractive", "additive", "mixed", "uniform"])
def test_flips_of_a_low_rate_are_among_those_of_a_higher_one(kind):
    low, high = (KINDS[kind](stand_in(), rate, 5).is_noise for rate in (0.2, 0.5))
    assert not (low & ~high).any()
    assert low.sum() < high.sum()


def test_a_class_does_not_depend_on_the_others():
    target = stand_in()
    changed = target.copy()
    changed[:, 3] = 1 - changed[:, 3]
    one, two = (noise.multilabel(t, 0.3, 0.3, 2).is_noise for t in (target, changed))
    same = np.arange(L) != 3
    assert (one[:, same] == two[:, same]).all()


def test_extremes_and_the_cap():
    target = stand_in()
    assert noise.multilabel(target, subtractive=1.0).label.sum() == 0
    doubled = noise.multilabel(target, additive=1.0).label.sum(0)
    assert doubled.tolist() == [min(2 * n, int(0.95 * N)) for n in SIZES]
    assert noise.multilabel(target, 0.5, 0.5).label.sum(0).tolist() == SIZES
    assert noise.multilabel(target, additive=1.0, cap=1.0).label[:, 10].all()
    full = np.ones((20, 2), dtype=int)  # above the cap already
    assert (noise.multilabel(full, additive=0.5).label == 1).all()
    rare = np.zeros((50, 1), dtype=int)
    rare[:4] = 1
    assert not noise.multilabel(rare, 0.2, 0.2).is_noise.any()


def test_rates_per_class():
    rates = np.linspace(0, 1, L)
    got = noise.multilabel(stand_in(), subtractive=rates, additive=0.2)
    removed = (got.is_noise & (got.clean_label == 1)).sum(0)
    assert removed.tolist() == [int(r * n) for r, n in zip(rates, SIZES, strict=True)]


def test_uniform_hits_positives_and_negatives_alike():
    target = stand_in()
    flipped = noise.multilabel_uniform(target, 0.3, 1).is_noise
    for part in (target == 1, target == 0):
        assert abs(flipped[part].mean() - 0.3) < 3 * np.sqrt(0.3 * 0.7 / part.sum())
    assert noise.multilabel_uniform(target, 1.0).is_noise.all()


@pytest.mark.parametrize(
    ("rate", "images", "each", "share"),
    [(0.1, 147, 1, 0.6), (0.2, 294, 3, 3.5), (0.3, 441, 5, 8.8), (0.4, 588, 6, 14.1)],
)
def test_rcml_flips_images(rate, images, each, share):
    target = np.zeros((1470, 17), dtype=int)
    target[:, :3] = 1
    flips = noise.multilabel_images(target, rate, 4).is_noise.sum(1)
    assert sorted(set(flips.tolist())) == [0, each]
    assert (flips > 0).sum() == images
    assert round(100 * flips.sum() / target.size, 1) == share


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.4, 1.0])
def test_scores_equal_the_two_thresholds_written_out(rate):
    target = stand_in()
    scores = np.random.default_rng(3).normal(size=target.shape) + target
    got = noise.multilabel_scores(torch.as_tensor(target), torch.as_tensor(scores, dtype=torch.float64), rate)
    positive = sorted(scores[i, c] for i, c in np.argwhere(target == 1))
    place = rate * (len(positive) - 1)

    def quantile(at: float) -> float:
        low = int(at)
        high = min(low + 1, len(positive) - 1)
        return positive[low] + (at - low) * (positive[high] - positive[low])

    low, high = quantile(place), quantile(len(positive) - 1 - place)
    want = np.array(target)
    for i, c in np.ndindex(*target.shape):
        if target[i, c] == 1 and scores[i, c] < low:
            want[i, c] = 0
        if target[i, c] == 0 and scores[i, c] > high and rate > 0:
            want[i, c] = 1
    assert np.array_equal(got.label, want)
    assert np.array_equal(got.is_noise, want != target)
    lost = (got.is_noise & (target == 1)).sum()
    assert abs(lost - rate * sum(SIZES)) <= 1, "by construction that share of the positives goes"


def test_scores_look_alike_images_get_the_label():
    target = np.array([[1, 0], [1, 0], [0, 1], [0, 1], [0, 1]])
    scores = np.array([[9.0, 0.0], [1.0, 0.0], [8.0, 5.0], [0.0, 6.0], [0.0, 7.0]])
    got = noise.multilabel_scores(target, scores, 0.3)  # thresholds 5.2 and 6.8 over 9 1 5 6 7
    assert got.label.tolist() == [[1, 0], [0, 0], [1, 0], [0, 1], [0, 1]]
    scores[4, 0] = 99.0  # above all positives
    assert not noise.multilabel_scores(target, scores, 0.0).is_noise.any()
    scores[4, 0] = 0.0
    only = noise.multilabel_scores(target, scores, 0.3, additive_rate=0.0)
    assert only.label.tolist() == [[1, 0], [0, 0], [0, 0], [0, 1], [0, 1]]
    config = NoiseConfig("scores", 0.0, additive_rate=0.3, scores="x.npy")
    assert apply_multilabel_noise(target, config, scores=scores).label.tolist() == [
        [1, 0],
        [1, 0],
        [1, 1],
        [0, 1],
        [0, 1],
    ]


def test_rates_by_name_of_the_label():
    target, names = stand_in(), [f"label {c}" for c in range(L)]
    config = NoiseConfig("mixed", 0.2, 5, class_rates={"label 3": 0.6}, class_additive_rates={"label 1": 0.4})
    got = apply_multilabel_noise(target, config, names)
    lost, extra = ((got.is_noise & (target == v)).sum(0).tolist() for v in (1, 0))
    assert lost == [*FLIPS[0.2][:3], FLIPS[0.6][3], *FLIPS[0.2][4:]]
    assert extra == [FLIPS[0.2][0], FLIPS[0.4][1], FLIPS[0.2][2], FLIPS[0.6][3], *FLIPS[0.2][4:]]
    config = NoiseConfig("mixed", 0.2, 5, additive_rate=0.0, class_rates={"label 3": 0.6})
    got = apply_multilabel_noise(target, config, names)
    assert (got.is_noise & (target == 1)).sum(0).tolist() == lost
    assert not (got.is_noise & (target == 0)).any()
    added = apply_multilabel_noise(target, NoiseConfig("additive", 0.0, class_rates={"label 0": 0.4}), names)
    assert (added.label - target).sum(0).tolist() == [FLIPS[0.4][0]] + [0] * (L - 1)
    with pytest.raises(ValueError, match="there is no label 'sea'; the labels are label 0"):
        apply_multilabel_noise(target, NoiseConfig("mixed", class_rates={"sea": 0.1}), names)


def test_config_reaches_every_kind():
    target = stand_in()
    for kind in KINDS:
        got = apply_multilabel_noise(target, NoiseConfig(kind, 0.4, 9))
        assert (got.label == KINDS[kind](target, 0.4, 9).label).all()
    both = apply_multilabel_noise(target, NoiseConfig("mixed", 0.2, 9, additive_rate=0.6))
    assert (both.label == noise.multilabel(target, 0.2, 0.6, 9).label).all()
    assert not apply_multilabel_noise(target, NoiseConfig()).is_noise.any()


def test_errors_name_the_culprit():
    bad = stand_in()
    bad[7, 2] = 3
    for call, words in {
        lambda: noise.multilabel(bad): "sample 7, label 2 is 3",
        lambda: noise.multilabel(bad[:, 0]): "shape",
        lambda: noise.multilabel(stand_in(), subtractive=1.1): "subtractive must lie",
        lambda: noise.multilabel(stand_in(), additive=[0.1, 0.2]): "17 labels",
        lambda: noise.multilabel(stand_in(), cap=2.0): "cap must lie",
        lambda: noise.multilabel_images(stand_in(), float("nan")): "rate must lie",
        lambda: noise.multilabel(stand_in(), 0.5, seed=-1): "seed must not be negative",
        lambda: noise.multilabel([["a"]]): "dtype",
        lambda: apply_multilabel_noise(stand_in(), NoiseConfig("symmetric", 0.5)): "several labels per ",
        lambda: apply_noise([0, 1], NoiseConfig("additive", 0.5), 2): "one class per sample",
        lambda: NoiseConfig("additive", 0.5, additive_rate=0.1): "needs noise.kind 'mixed' or 'scores'",
        lambda: NoiseConfig(
            "uniform", 0.5, class_rates={"a": 0.1}
        ): "class_rates needs noise.kind 'subtractive'",
        lambda: NoiseConfig("mixed", 0.5, class_rates={"sea": 1.1}): "class_rates, 'sea' must lie",
        lambda: NoiseConfig("scores", 0.5): "needs noise.scores",
        lambda: NoiseConfig("mixed", 0.5, scores="a.npy"): "noise.scores needs noise.kind 'scores'",
        lambda: noise.multilabel_scores(stand_in(), np.zeros((1285, L)), 1.1, 0.1): r"rate .*1\.1",
        lambda: noise.multilabel_scores(stand_in(), np.zeros((3, L)), 0.1): r"\(1285, 17\), got \(3, 17\)",
        lambda: noise.multilabel_scores(stand_in(), np.full((N, L), np.inf), 0.1): "sample 0, label 0 is inf",
        lambda: noise.multilabel_scores(np.zeros((2, 2)), np.zeros((2, 2)), 0.1): "no label is positive",
    }.items():
        with pytest.raises(ValueError, match=words):
            call()
