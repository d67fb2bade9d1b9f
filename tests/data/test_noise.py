"""Label noise: laws of each generator, determinism, tables, and errors."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from lightning_nrml.data.noise import (
    NoiseConfig,
    _clusters,
    apply_noise,
    asymmetric,
    label_hash,
    pair_flip,
    small_cluster,
    symmetric,
)
from lightning_nrml.data.noise_types import by_number
from lightning_nrml.data.tables import write_label_table

N, C = 20_000, 10
LABEL = np.random.default_rng(0).integers(0, C, N)
EMBEDDING = np.random.default_rng(1).normal(size=(600, 8))
CLUSTER_LABEL = np.repeat(np.arange(20), 30)

ALL = {
    "symmetric": lambda rate, seed: symmetric(LABEL, rate, C, seed),
    "asymmetric": lambda rate, seed: asymmetric(LABEL, rate, {9: 1, 2: 0, 3: 5, 5: 3, 4: 7}, seed),
    "pair_flip": lambda rate, seed: pair_flip(LABEL, rate, C, seed),
    "small_cluster": lambda rate, seed: small_cluster(CLUSTER_LABEL, EMBEDDING, rate, seed),
}
EVERY = pytest.mark.parametrize("kind", ALL)


def spread(rate, n):
    return 3 * np.sqrt(rate * (1 - rate) / n)


@EVERY
def test_seed_alone_decides(kind):
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    first = ALL[kind](0.4, 3)
    state, legacy = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    again = ALL[kind](0.4, 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == legacy).all()  # noqa: NPY002
    assert (first.label == again.label).all()
    assert (first.is_noise == again.is_noise).all()
    assert (ALL[kind](0.4, 4).label != first.label).any()
    assert [a.dtype for a in (first.label, first.clean_label, first.is_noise)] == [np.int64, np.int64, bool]


@EVERY
def test_rate_zero_is_the_identity(kind):
    noisy = ALL[kind](0.0, 1)
    assert (noisy.label == noisy.clean_label).all()
    assert not noisy.is_noise.any()
    assert noisy.class_id is None


@EVERY
def test_true_label_agrees_exactly_where_there_is_no_noise(kind):
    noisy = ALL[kind](0.5, 2)
    assert ((noisy.label != noisy.true_label) == noisy.is_noise).all()


@EVERY
def test_input_is_not_written_to_nor_shared(kind):
    before = LABEL.copy(), CLUSTER_LABEL.copy()
    noisy = ALL[kind](0.0, 1)
    noisy.label[:] = 0
    noisy.clean_label[:] = 1
    assert (noisy.label == 0).all()
    assert (before[0] == LABEL).all()
    assert (before[1] == CLUSTER_LABEL).all()


def test_labels_are_the_same_in_another_process_with_other_threads():
    code = (
        "import numpy as np; from lightning_nrml.data.noise import *;"
        "e = np.random.default_rng(1).normal(size=(600, 8)); l = np.repeat(np.arange(20), 30);"
        "print(label_hash(symmetric(l, .3, 20, 5).label), label_hash(small_cluster(l, e, .5, 5).label))"
    )
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "2",
        "PYTHONHASHSEED": "7",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    here = symmetric(CLUSTER_LABEL, 0.3, 20, 5), small_cluster(CLUSTER_LABEL, EMBEDDING, 0.5, 5)
    assert out.stdout.split() == [label_hash(noisy.label) for noisy in here]


def test_random_stream_is_pinned():
    """A seed names the same labels in every release; if this fails, published noisy sets change."""
    assert symmetric(np.arange(8), 0.5, 8, 0).label.tolist() == [0, 7, 6, 0, 4, 5, 6, 7]


@pytest.mark.parametrize("rate", [0.1, 0.2, 0.5, 1.0])
def test_symmetric_is_a_coin_with_uniform_wrong_targets(rate):
    noisy = symmetric(LABEL, rate, C, 7)
    assert (noisy.clean_label == LABEL).all()
    assert (noisy.is_noise == (noisy.label != LABEL)).all()
    assert abs(noisy.is_noise.mean() - rate) <= spread(rate, N)
    for c in range(C):
        own = np.equal(LABEL, c)
        assert abs(noisy.is_noise[own].mean() - rate) <= 1.5 * spread(rate, own.sum())
    shift = (noisy.label - LABEL)[noisy.is_noise] % C
    counts = np.bincount(shift, minlength=C)
    assert counts[0] == 0
    expected = noisy.is_noise.sum() / (C - 1)
    assert ((counts[1:] - expected) ** 2 / expected).sum() < 27.9  # chi-square, 8 degrees: p = 0.0005


def test_symmetric_of_two_classes_swaps_and_wrong_sets_are_nested():
    label = LABEL % 2
    assert (symmetric(label, 1.0, 2, 0).label == 1 - label).all()
    low, high = symmetric(LABEL, 0.2, C, 0), symmetric(LABEL, 0.5, C, 0)
    assert high.is_noise[low.is_noise].all()
    assert (high.label[low.is_noise] == low.label[low.is_noise]).all()


def test_asymmetric_flips_only_along_the_mapping():
    mapping = {9: 1, 2: 0, 3: 5, 5: 3, 4: 7}
    noisy = asymmetric(LABEL, 0.4, mapping, 1)
    assert set(zip(LABEL[noisy.is_noise].tolist(), noisy.label[noisy.is_noise].tolist(), strict=True)) == set(
        mapping.items()
    )
    source = np.isin(LABEL, list(mapping))
    assert abs(noisy.is_noise[source].mean() - 0.4) <= spread(0.4, source.sum())
    assert not noisy.is_noise[~source].any()
    assert (asymmetric(LABEL, 1.0, {0: 1}, 0).label[LABEL == 0] == 1).all()


def test_pair_flip_goes_to_the_next_class_and_round():
    noisy = pair_flip(LABEL, 0.3, C, 1)
    assert (noisy.label[noisy.is_noise] == (LABEL[noisy.is_noise] + 1) % C).all()
    assert (noisy.label[~noisy.is_noise] == LABEL[~noisy.is_noise]).all()
    assert abs(noisy.is_noise.mean() - 0.3) <= spread(0.3, N)
    assert ((LABEL == C - 1) & (noisy.label == 0)).any()


@pytest.mark.parametrize(("fraction", "dissolved"), [(0.25, 5), (0.5, 10), (0.13, 3), (0.125, 3)])
def test_small_cluster_dissolves_whole_classes(fraction, dissolved):
    noisy = small_cluster(CLUSTER_LABEL, EMBEDDING, fraction, 3)
    assert (noisy.clean_label == CLUSTER_LABEL).all()
    share = np.array([noisy.is_noise[np.equal(CLUSTER_LABEL, c)].mean() for c in range(20)])
    assert set(share) == {0.0, 1.0}
    assert share.sum() == dissolved
    assert (noisy.class_id == np.flatnonzero(share == 0)).all()
    assert np.unique(noisy.label).tolist() == list(range(20 - dissolved))
    right = ~noisy.is_noise
    assert (noisy.class_id[noisy.label[right]] == CLUSTER_LABEL[right]).all()
    assert (noisy.true_label[noisy.is_noise] == -1).all()


def test_small_cluster_moves_look_alikes_together():
    # each class: 15 tight pairs; k = ceil(30 / 2) centres, so pairs mostly stay together
    base = np.random.default_rng(0).normal(size=(300, 4)) * 100
    rows = np.repeat(base, 2, axis=0) + np.random.default_rng(1).normal(size=(600, 4)) * 0.01
    noisy = small_cluster(CLUSTER_LABEL, rows, 0.5, 0)
    first, second = noisy.label[::2][noisy.is_noise[::2]], noisy.label[1::2][noisy.is_noise[::2]]
    shuffled = np.random.default_rng(2).permutation(second)
    assert (first == second).mean() > 0.6
    assert (first == shuffled).mean() < 0.3


def test_small_cluster_chunks_are_mostly_ones_and_twos():
    data = load_digits()
    label = data.target * 6 + np.arange(len(data.target)) % 6  # 60 classes of about 30
    noisy = small_cluster(label, data.data, 0.5, 0)
    pairs = np.stack([noisy.clean_label, noisy.label])[:, noisy.is_noise]
    _, chunk = np.unique(pairs, axis=1, return_counts=True)
    assert (chunk <= 2).mean() > 0.5
    assert np.bincount(chunk).argmax() == 1
    assert len(np.unique(pairs[1])) > 20  # spread over the 30 remaining classes
    assert abs(noisy.is_noise.mean() - 0.5) < 0.03


def test_small_cluster_copes_with_duplicates_gaps_and_lone_images():
    label = np.array([3, 3, 3, 3, 8, 11, 11, 40])
    noisy = small_cluster(label, np.zeros((8, 2)), 0.5, 0)
    assert noisy.class_id is not None
    assert set(noisy.class_id) < {3, 8, 11, 40}
    assert set(noisy.label) <= {0, 1}
    assert ((noisy.label != noisy.true_label) == noisy.is_noise).all()
    torch_in = small_cluster(torch.from_numpy(label), torch.zeros(8, 2), 0.5, 0)
    assert (torch_in.label == noisy.label).all()


@pytest.mark.parametrize("bad", [[0, -1, 2], [0, 1, 10], [0.0, np.nan, 1], [0, 1.5, 1], [0, 1, np.inf]])
def test_bad_labels_are_named_with_their_sample(bad):
    row = int(np.argmax([not (x == x and 0 <= x < 10 and x % 1 == 0) for x in bad]))
    for make in (symmetric, pair_flip):
        with pytest.raises(ValueError, match=rf"label of sample {row} is .* in \[0, 9\]"):
            make(np.array(bad), 0.2, 10, 0)


def test_other_shapes_and_types_of_labels_are_refused():
    with pytest.raises(ValueError, match=r"shape \(N,\).*\(2, 3\)"):
        symmetric(np.zeros((2, 3), int), 0.1, 3)
    with pytest.raises(ValueError, match="integers"):
        symmetric(np.array(["cat", "dog"]), 0.1, 3)
    assert symmetric(torch.tensor([0, 1]), 0.0, 2).label.tolist() == [0, 1]
    assert symmetric([], 0.5, 2).label.shape == (0,)


@EVERY
@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_rates_outside_the_unit_interval_are_refused(kind, rate):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        ALL[kind](rate, 0)


@EVERY
def test_negative_seeds_are_refused(kind):
    with pytest.raises(ValueError, match="seed must not be negative"):
        ALL[kind](0.5, -1)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({12: 1}, "12: 1 names an unknown class.*0 to 9"),
        ({1: -1}, "unknown"),
        ({3: 3}, "3: 3 keeps"),
        ({}, "needs"),
    ],
)
def test_bad_mappings_are_named(mapping, message):
    with pytest.raises(ValueError, match=message):
        asymmetric(LABEL, 0.2, mapping, 0)
    if mapping:
        with pytest.raises(ValueError, match=message):
            asymmetric(LABEL[:5], 0.2, mapping, 0, num_classes=10)


def test_too_few_classes_are_refused():
    for make in (symmetric, pair_flip):
        with pytest.raises(ValueError, match="num_classes=1"):
            make([0, 0], 0.2, 1)
    with pytest.raises(ValueError, match="leaves no class"):
        small_cluster(CLUSTER_LABEL, EMBEDDING, 0.98, 0)


def test_bad_embeddings_are_named():
    with pytest.raises(ValueError, match="needs an embedding"):
        small_cluster(CLUSTER_LABEL, None, 0.5)
    with pytest.raises(ValueError, match=r"N = 600 labels, got \(599, 8\)"):
        small_cluster(CLUSTER_LABEL, EMBEDDING[1:], 0.5)
    broken = EMBEDDING.copy()
    broken[41, 2] = np.nan
    with pytest.raises(ValueError, match="embedding of sample 41"):
        small_cluster(CLUSTER_LABEL, broken, 0.5)


def test_apply_noise_dispatches():
    mapping = {0: 1}
    for config, direct in [
        (NoiseConfig("symmetric", 0.3, 4), symmetric(LABEL, 0.3, C, 4)),
        (NoiseConfig("asymmetric", 0.3, 4, mapping), asymmetric(LABEL, 0.3, mapping, 4)),
        (NoiseConfig("pair_flip", 0.3, 4), pair_flip(LABEL, 0.3, C, 4)),
    ]:
        assert (apply_noise(LABEL, config, C).label == direct.label).all()
        assert direct.is_noise.any()
    clean = apply_noise(LABEL, NoiseConfig("none", 0.3), C)  # kind none switches a recipe's noise off
    assert (clean.label == LABEL).all()
    assert not clean.is_noise.any()
    config = NoiseConfig("small_cluster", 0.5, 4)
    assert apply_noise(CLUSTER_LABEL, config, 20, EMBEDDING).label.max() == 9
    with pytest.raises(ValueError, match="needs an embedding"):
        apply_noise(CLUSTER_LABEL, config, 20)
    with pytest.raises(ValueError, match="label of sample"):
        apply_noise(LABEL, NoiseConfig(), C - 1)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"rate": 0.3}, r"noise.rate is 0.3 but there is no noise.kind: set kind, such as symmetric"),
        ({"kind": "symetric"}, "did you mean 'symmetric'"),
        ({"kind": "symmetric", "rate": 20}, r"noise.rate must lie in \[0, 1\], got 20"),
        ({"seed": -3}, "noise.seed"),
        ({"kind": "asymmetric", "rate": 0.2}, "needs noise.mapping"),
        ({"kind": "symmetric", "table": "x.csv"}, "noise.table replaces the labels"),
    ],
)
def test_bad_settings_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        NoiseConfig(**kwargs)


def test_label_hash_names_the_labels_not_their_container():
    assert (
        label_hash([0, 1, 2])
        == label_hash(torch.tensor([0, 1, 2], dtype=torch.int32))
        == label_hash(np.arange(3))
    )
    assert len({label_hash(x) for x in ([0, 1, 2], [0, 2, 1], [0, 1], [[0, 1, 2]])}) == 4
    assert len(label_hash([0])) == 12


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("kind", ["symmetric", "small_cluster"])
def test_written_noise_reads_back_the_same(tmp_path, suffix, kind):
    config = NoiseConfig(kind, 0.5, 3)
    noisy = apply_noise(CLUSTER_LABEL, config, 20, EMBEDDING)
    path = write_label_table(tmp_path / f"noisy{suffix}", noisy.to_columns())
    back = apply_noise(CLUSTER_LABEL, NoiseConfig(table=str(path)), 20)
    for name in ("label", "clean_label", "is_noise", "class_id", "true_label"):
        assert np.array_equal(getattr(back, name), getattr(noisy, name)), name


def table(tmp_path, text):
    path = tmp_path / "t.csv"
    path.write_text(text)
    return str(path)


def test_table_rows_are_matched_by_index_or_path(tmp_path):
    clean = np.array([0, 1, 2])
    noisy = apply_noise(clean, NoiseConfig(table=table(tmp_path, "index,label\n2,0\n0,0\n1,2\n")), 3)
    assert noisy.label.tolist() == [0, 2, 0]
    assert noisy.is_noise.tolist() == [False, True, True]
    assert noisy.clean_label.tolist() == [0, 1, 2]
    config = NoiseConfig(table=table(tmp_path, "path,worst\nc,0\na,0\nb,2\n"), column="worst")
    assert apply_noise(clean, config, 3, path=["a", "b", "c"]).label.tolist() == [0, 2, 0]
    with pytest.raises(ValueError, match="no paths"):
        apply_noise(clean, config, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("index,label\n0,0\n2,1\n", "no row for 1 of 3 .* index 1"),
        ("index,label\n0,0\n1,1\n1,1\n2,1\n", "row 2: 1; it occurs in an earlier row"),
        ("index,label\n0,0\n1,1\n2,1\n3,1\n", "row 3: 3; the training set has 3 samples"),
        ("index,label\n2,0\n1,7\n0,1\n", r"column 'label', row 1: 7; class ids must lie in \[0, 2\]"),
        ("index,label\n2,0\n1,1\n0,-1\n", "column 'label', row 2: -1"),
        ("index,label,clean_label\n2,0,2\n1,1,0\n0,0,0\n", "row 1: 0, but the dataset says 1 for index 1"),
        ("index,label,is_noise\n0,1,0\n1,1,0\n2,2,0\n", "column 'is_noise' contradicts"),
    ],
)
def test_tables_that_do_not_fit_are_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        apply_noise(np.array([0, 1, 2]), NoiseConfig(table=table(tmp_path, text)), 3)


def test_human_labels_of_cifar10n_through_a_table(tmp_path, shared_data):
    with np.load(shared_data("cifar10n") / "cifar10n_jpeg.npz") as data:
        columns = {name: data[name] for name in ("clean_label", "aggre_label", "worse_label")}
    order = np.random.default_rng(0).permutation(50_000)
    rows = {"index": order, **{name: values[order] for name, values in columns.items()}}
    path = write_label_table(tmp_path / "cifar10n.parquet", rows, column="worse_label")
    for column, rate in (("aggre_label", 0.0901), ("worse_label", 0.4021)):
        noisy = apply_noise(columns["clean_label"], NoiseConfig(table=str(path), column=column), 10)
        assert (noisy.label == columns[column]).all()
        assert noisy.is_noise.mean() == pytest.approx(rate, abs=6e-5)


def test_two_labels_for_one_class_cannot_both_be_right(tmp_path):
    path = table(tmp_path, "index,label,is_noise\n0,0,0\n1,1,0\n")
    with pytest.raises(ValueError, match="must pair each label with one class"):
        apply_noise(np.array([0, 0]), NoiseConfig(table=path), 2)


@pytest.mark.parametrize("rows", [1, 2, 7, 40])
def test_clusters_are_those_of_the_nearest_mean(rows: int) -> None:
    g = np.random.default_rng(rows)
    x = g.normal(size=(rows, 3)) * g.uniform(0.5, 3, size=(rows, 1))  # rows far from 0 attract no others
    cluster = _clusters(x, g.uniform(size=rows))
    assert sorted(set(cluster)) == list(range(max(cluster) + 1))
    mean = np.stack([x[cluster == c].mean(axis=0) for c in range(max(cluster) + 1)])
    distance = ((x[:, None] - mean) ** 2).sum(axis=2)
    assert (distance.argmin(axis=1) == cluster).all()
    assert max(cluster) + 1 > rows // 4


def test_mapping_by_names_of_classes():
    names, label = ["car", "tree", "7"], np.asarray([0, 1, 2, 1])
    mapping = by_number({"car": "tree", "1": 0, "2": " 1 "}, names)
    config = NoiseConfig("asymmetric", 1.0, mapping=mapping)
    assert apply_noise(label, config, 3).label.tolist() == [1, 0, 1, 0]

    def refused(mapping, names=names):
        with pytest.raises(ValueError, match=r"noise\.mapping") as error:
            by_number(mapping, names)
        return str(error.value)

    assert "did you mean 'tree'?" in refused({"car": "tre"})
    assert "car, tree, 7" in refused({"water": "car"})
    assert "no names of classes: give numbers" in refused({"car": "tree"}, None)
    assert "twice" in refused({"car": "tree", 0: 2})
    with pytest.raises(ValueError, match="no names of classes: give numbers"):
        apply_noise(label, NoiseConfig("asymmetric", 0.5, mapping={"car": "tree"}), 3)
