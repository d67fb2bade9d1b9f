"""PMLLoss beside pytorch-metric-learning itself."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from pytorch_metric_learning import distances, losses, miners, regularizers

from lightning_nrml.losses import PMLLoss

LABEL = torch.arange(12) % 4
NEEDS = {"P2SGradLoss": {"embedding_size": 8, "num_classes": 4}, "RankedListLoss": {"margin": 1.0, "Tn": 5}}
UNWEIGHTED = {  # terms that are not of samples
    "DynamicSoftMarginLoss", "HistogramLoss", "P2SGradLoss", "PNPLoss", "ProxyAnchorLoss", "SmoothAPLoss",
    "ThresholdConsistentMarginLoss",
}  # fmt: skip
ALL = sorted(
    name
    for name in dir(losses)
    if isinstance(getattr(losses, name), type)
    and issubclass(getattr(losses, name), losses.BaseMetricLossFunction)
    and name not in ("BaseMetricLossFunction", "GenericPairLoss", "ManifoldLoss", "VICRegLoss")
)


def embedding(n: int = 12) -> torch.Tensor:
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(0))


def make(name: str, **arguments) -> PMLLoss:
    torch.manual_seed(0)
    return PMLLoss(name, **{"num_classes": 4, "embedding_size": 8, **NEEDS.get(name, {}), **arguments})


@pytest.mark.parametrize("name", ALL)
def test_every_loss_of_the_library_works_and_gives_its_value(name):
    ours = make(name)
    torch.manual_seed(0)
    sizes = {"num_classes": 4, "embedding_size": 8}
    try:
        theirs = getattr(losses, name)(**sizes)
    except TypeError:
        try:
            theirs = getattr(losses, name)(**({"num_classes": 4} if name == "MarginLoss" else {}))
        except TypeError:
            need = {"descriptors_dim": 8, "num_classes": 4} if name == "P2SGradLoss" else NEEDS[name]
            theirs = getattr(losses, name)(**need)
    theirs.load_state_dict({k.removeprefix("pml."): v for k, v in ours.state_dict().items()})
    z = embedding().requires_grad_()
    torch.manual_seed(1)
    got = ours(z, LABEL)
    torch.manual_seed(1)
    want = theirs(embedding(), LABEL)
    torch.testing.assert_close(got, want.squeeze())
    got.backward()
    assert z.grad.isfinite().all()
    assert z.grad.abs().sum() > 0


@pytest.mark.parametrize("name", [n for n in ALL if n != "SmoothAPLoss"])  # that one wants equal classes
def test_zero_weights_remove_rows(name):
    ours = make(name)
    w = (torch.arange(12) != 5).float()
    w[2] = 0
    z = embedding().requires_grad_()
    torch.manual_seed(1)
    got = ours(z, LABEL, w)
    got.backward()
    torch.manual_seed(1)
    torch.testing.assert_close(got, copy.deepcopy(make(name))(embedding()[w > 0], LABEL[w > 0]))
    assert (z.grad[w == 0] == 0).all()


@pytest.mark.parametrize("name", ALL)
def test_fractional_weights_work_or_are_refused(name):
    loss = make(name)
    w = torch.linspace(0.1, 1.0, 12)
    if name in UNWEIGHTED:
        with pytest.raises(ValueError, match="only weights 0 and 1"):
            loss(embedding(), LABEL, w)
        torch.testing.assert_close(
            loss(embedding(), LABEL, torch.full((12,), 0.5)), make(name)(embedding(), LABEL)
        )
    else:
        z = embedding().requires_grad_()
        value = loss(z, LABEL, w)
        value.backward()
        assert value.isfinite()
        assert not torch.equal(value, loss(embedding(), LABEL))
    assert loss(embedding(), LABEL).isfinite()  # nothing of the weights is left behind


def test_fractional_weights_are_a_weighted_mean_over_anchors():
    loss = make("NormalizedSoftmaxLoss")
    w = torch.linspace(0.1, 1.0, 12)
    per_sample = torch.stack([loss(embedding()[i : i + 1], LABEL[i : i + 1]) for i in range(12)])
    torch.testing.assert_close(loss(embedding(), LABEL, w), (w * per_sample).sum() / w.sum())


def test_fractional_weights_multiply_pairs_and_triplets():
    w = torch.linspace(0.1, 1.0, 12)
    z = torch.nn.functional.normalize(embedding())
    d = torch.cdist(z, z)
    same = (LABEL[:, None] == LABEL[None]) & ~torch.eye(12, dtype=torch.bool)
    pair = w[:, None] * w[None]
    differs = LABEL[:, None] != LABEL[None]
    push = differs & (d < 1)  # only violated pairs are averaged over
    want = (pair * d)[same].sum() / pair[same].sum() + (pair * (1 - d))[push].sum() / pair[push].sum()
    torch.testing.assert_close(make("ContrastiveLoss")(embedding(), LABEL, w), want)

    total = mass = 0.0
    for a in range(12):
        for p in range(12):
            for n in range(12):
                gap = d[a, p] - d[a, n] + 0.05
                if same[a, p] and differs[a, n] and gap > 0:
                    total, mass = total + w[a] * w[p] * w[n] * gap, mass + w[a] * w[p] * w[n]
    torch.testing.assert_close(make("TripletMarginLoss")(embedding(), LABEL, w), total / mass)


def test_fractional_weights_where_the_loss_divides_by_its_active_terms():
    w, beta, margin = torch.linspace(0.1, 1.0, 12), 1.2, 0.1
    rows = embedding() + 3 * torch.nn.functional.one_hot(LABEL, 8)
    z = torch.nn.functional.normalize(rows)
    d = torch.cdist(z, z)
    total = mass = active = terms = total_terms = 0.0
    for a, p, n in itertools.product(range(12), repeat=3):
        if a != p and LABEL[a] == LABEL[p] and LABEL[a] != LABEL[n]:
            pull, push = (d[a, p] - beta + margin).clamp(min=0), (beta - d[a, n] + margin).clamp(min=0)
            product, total_terms = w[a] * w[p] * w[n], total_terms + 1
            total = total + product * (pull + push)
            active += float(pull > 0) + float(push > 0)
            if pull + push > 0:
                mass, terms = mass + product, terms + 1
    assert 0 < terms < min(total_terms, active)
    want = total / (mass / terms) / active
    torch.testing.assert_close(make("MarginLoss", margin=margin)(rows, LABEL, w), want)


def test_miner_sees_only_kept_rows():
    loss = make("TripletMarginLoss", miner="BatchHardMiner", miner_kwargs={"distance": "CosineSimilarity"})
    kept = torch.arange(12) % 3 > 0
    z, label = embedding()[kept], LABEL[kept]
    tuples = miners.BatchHardMiner(distance=distances.CosineSimilarity())(z, label)
    want = losses.TripletMarginLoss()(z, label, tuples)
    torch.testing.assert_close(loss(embedding(), LABEL, kept.float()), want)


def test_parts_by_name_as_yaml_gives_them():
    given = {
        "distance": {"name": "LpDistance", "p": 1},
        "embedding_regularizer": "LpRegularizer",
        "embedding_reg_weight": 0.1,
    }
    loss = PMLLoss("ContrastiveLoss", kwargs={**given, "neg_margin": 2}, pos_margin=0.1)
    theirs = losses.ContrastiveLoss(
        pos_margin=0.1,
        neg_margin=2,
        distance=distances.LpDistance(p=1),
        embedding_regularizer=regularizers.LpRegularizer(),
        embedding_reg_weight=0.1,
    )
    torch.testing.assert_close(loss(embedding(), LABEL), theirs(embedding(), LABEL))
    assert loss(embedding(), LABEL, torch.linspace(0, 1, 12)).isfinite()


def test_arguments_rebuild_it():
    loss = PMLLoss("ArcFaceLoss", "MultiSimilarityMiner", {"epsilon": 0.3}, {"margin": 20}, 4, 8, scale=32)
    other = PMLLoss(**loss.arguments())
    other.load_state_dict(loss.state_dict())
    assert (other.pml.margin, other.pml.scale, other.miner.epsilon) == (loss.pml.margin, 32, 0.3)
    assert torch.equal(other(embedding(), LABEL), loss(embedding(), LABEL))


def test_logits_where_the_loss_has_them():
    loss = make("ArcFaceLoss")
    z = embedding().bfloat16()
    assert loss.logits(z).shape == (12, 4)
    assert loss.logits(z).dtype is torch.float32
    torch.testing.assert_close(loss.get_logits(z), loss.pml.get_logits(z.float()))
    assert torch.isfinite(loss.bfloat16().logits(z)).all()
    assert loss.pml.W.dtype is torch.bfloat16
    plain = make("TripletMarginLoss")
    assert plain.logits(z) is None
    with pytest.raises(TypeError, match="TripletMarginLoss has no class logits"):
        plain.get_logits(z)


def test_parameters_are_in_the_graph_even_without_a_triplet():
    loss = make("MarginLoss", learn_beta=True)
    loss(embedding(2).requires_grad_(), torch.arange(2)).backward()
    assert (loss.pml.beta.grad == 0).all()


def test_errors_name_the_nearest():
    with pytest.raises(ValueError, match=r"no loss 'MultiSimilartyLoss'.*did you mean 'MultiSimilarityLoss'"):
        PMLLoss("MultiSimilartyLoss")
    with pytest.raises(ValueError, match=r"no argument 'alhpa', did you mean 'alpha'.*it takes alpha, base"):
        PMLLoss("MultiSimilarityLoss", alhpa=1)
    with pytest.raises(ValueError, match=r"no miner 'BatchHardminer'.*'BatchHardMiner'"):
        PMLLoss("TripletMarginLoss", miner="BatchHardminer")
    with pytest.raises(ValueError, match=r"TupletMarginLoss has no argument 'num_classes'"):
        PMLLoss("TupletMarginLoss", kwargs={"num_classes": 3})
    with pytest.raises(ValueError, match=r"VICRegLoss.*two views"):
        PMLLoss("VICRegLoss")
    with pytest.raises(ValueError, match=r"'CosinSimilarity'.*'CosineSimilarity'"):
        PMLLoss("ContrastiveLoss", distance="CosinSimilarity")
    with pytest.raises(ValueError, match=r"mapping with 'name'"):
        PMLLoss("ContrastiveLoss", distance={"p": 1})
    with pytest.raises(ValueError, match=r"CrossBatchMemory"):
        PMLLoss("CrossBatchMemory")


def test_sizes_come_from_the_module_that_takes_the_loss():
    z, label = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    for name in ("ArcFaceLoss", "ProxyAnchorLoss", "P2SGradLoss"):
        torch.manual_seed(0)
        given = PMLLoss(name, num_classes=3, embedding_size=4)
        torch.manual_seed(0)
        told = PMLLoss(name)
        with pytest.raises(ValueError, match=rf"{name} needs the argument '"):
            told(z, label)
        told.set_sizes(3, 4)
        assert torch.equal(told(z, label), given(z, label))
        assert told.arguments() == given.arguments()
        assert [n for n, _ in told.named_parameters()] == [n for n, _ in given.named_parameters()]
        told.set_sizes(3, 4)
        assert torch.equal(told(z, label), given(z, label))
    with pytest.raises(ValueError, match="ArcFaceLoss needs the argument 'num_classes'"):
        PMLLoss("ArcFaceLoss").set_sizes(None, 4)
    with pytest.raises(ValueError, match="ArcFaceLoss has num_classes 3, but the module that takes it 5"):
        PMLLoss("ArcFaceLoss", num_classes=3).set_sizes(5, 4)
    with pytest.raises(ValueError, match="ArcFaceLoss has embedding_size 8, but the module that takes it 4"):
        PMLLoss("ArcFaceLoss", embedding_size=8).set_sizes(3, 4)
    PMLLoss("MultiSimilarityLoss").set_sizes(None, 4)  # needs none


@pytest.mark.parametrize(
    "reducer",
    [
        {"name": "ThresholdReducer", "low": 0.3},
        {"name": "ThresholdReducer", "low": 0.3, "high": 0.6},
        {"name": "AvgNonZeroReducer"},
    ],
)
def test_thresholds_are_of_the_terms_not_of_the_weighted_ones(reducer):
    """So that the loss has no jump where a weight goes to 0."""
    ours, z = make("ContrastiveLoss", reducer=reducer), embedding()
    half = torch.arange(12) < 6
    torch.testing.assert_close(ours(z, LABEL, torch.full((12,), 0.2)), ours(z, LABEL))
    for tiny in (1e-3, 1e-6):
        torch.testing.assert_close(
            ours(z, LABEL, torch.where(half, 1.0, tiny)),
            ours(z, LABEL, half.float()),
            rtol=20 * tiny + 1e-6,
            atol=0,
        )
