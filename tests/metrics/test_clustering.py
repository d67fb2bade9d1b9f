"""nmi_ami on clusterings whose scores are known."""

from __future__ import annotations

import pytest
import torch

from lightning_nrml.metrics import nmi_ami


def test_separated_classes_score_one_whatever_the_length_of_the_rows():
    g = torch.Generator().manual_seed(0)
    label = torch.arange(200) % 2 + 2**24
    direction = torch.eye(4)[(label - 2**24) * 2]
    embedding = (direction + 0.01 * torch.randn(200, 4, generator=g)) * (
        0.1 + 9 * torch.rand(200, 1, generator=g)
    )
    got = nmi_ami(embedding, label)
    assert got["nmi"] == pytest.approx(1)
    assert got["ami"] == pytest.approx(1)


def test_random_labels_score_zero_after_adjustment():
    g = torch.Generator().manual_seed(0)
    embedding, label = torch.randn(600, 8, generator=g), torch.randint(40, (600,), generator=g)
    got = nmi_ami(embedding, label)
    assert got["ami"] == pytest.approx(0, abs=0.03)
    assert got["nmi"] > 0.3  # chance alone


def test_the_seed_decides():
    g = torch.Generator().manual_seed(0)
    label = torch.arange(300) % 30
    embedding = torch.randn(30, 8, generator=g)[label] + 0.7 * torch.randn(300, 8, generator=g)
    assert nmi_ami(embedding, label, seed=3) == nmi_ami(embedding, label, seed=3)
    assert len({nmi_ami(embedding, label, seed=s)["nmi"] for s in range(4)}) > 1


def test_k_means_goes_on_for_its_iterations():
    g = torch.Generator().manual_seed(0)
    label = torch.arange(300) % 30
    embedding = torch.randn(30, 8, generator=g)[label] + 0.3 * torch.randn(300, 8, generator=g)
    early, late = (sum(nmi_ami(embedding, label, s, n)["nmi"] for s in range(4)) for n in (1, 20))
    assert late > early


def test_shapes_must_fit():
    with pytest.raises(ValueError, match=r"got \(3, 2\) and \(4,\)"):
        nmi_ami(torch.ones(3, 2), torch.arange(4))
