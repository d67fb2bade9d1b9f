"""SimCLR, MoCo-v2, BYOL and SwAV built of lightly's parts.

Heads, losses, prototypes, memory banks and moving averages are lightly's, put together as in its examples;
sizes, temperatures and schedules are those of the module of ours that a recipe builds. ``ssl_peer.py`` trains
them in the plain loop of ``peer_loop.py``, beside ours.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from lightly.loss import NegativeCosineSimilarity, NTXentLoss, SwaVLoss
from lightly.models.modules.heads import (
    BYOLPredictionHead,
    BYOLProjectionHead,
    MoCoProjectionHead,
    SimCLRProjectionHead,
    SwaVProjectionHead,
    SwaVPrototypes,
)
from lightly.models.modules.memory_bank import MemoryBankModule
from lightly.models.utils import deactivate_requires_grad, update_momentum
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_nrml.models import cosine_tau
from lightning_nrml.modules import BYOL, MoCo, SimCLR, SwAV
from lightning_nrml.modules.self_supervised import SelfSupervised, TaughtModule


class Peer(nn.Module):
    """A method built of lightly's parts around a copy of our module's untrained backbone.

    Args:
        ours: the module that the recipe builds: backbone and settings are taken from it.
    """

    def __init__(self, ours: SelfSupervised) -> None:
        super().__init__()
        self.ours = dict(ours.hparams)
        self.backbone = copy.deepcopy(ours.backbone)
        self.width = ours.num_features

    def loss(self, batch: Any, views: list[Tensor], epoch: int, step: int, steps: int) -> Tensor:
        """The loss of one batch: ``views`` each ``(B, C, h, w)``, the ``step``-th of ``steps`` of the run."""
        raise NotImplementedError


class SimCLRPeer(Peer):
    """``NTXentLoss`` and ``SimCLRProjectionHead``, the views in a pass each."""

    def __init__(self, ours: SimCLR) -> None:
        super().__init__(ours)
        hidden = self.ours["projector_hidden"] or self.width
        self.projection_head = SimCLRProjectionHead(
            self.width, hidden, self.ours["projector_dim"], num_layers=self.ours["projector_layers"]
        )
        self.criterion = NTXentLoss(self.ours["temperature"])

    def loss(self, batch: Any, views: list[Tensor], epoch: int, step: int, steps: int) -> Tensor:
        """Both views contrasted with the batch."""
        z0, z1 = (self.projection_head(self.backbone(view)) for view in views)
        return self.criterion(z0, z1)


class TaughtPeer(Peer):
    """A peer with a momentum copy of backbone and projection head."""

    projection_head: nn.Module

    def __init__(self, ours: TaughtModule) -> None:
        super().__init__(ours)
        self.tau, self.tau_schedule = ours.tau, ours.tau_schedule

    def copy_for_momentum(self) -> None:
        """Make the copies, once the projection head exists."""
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)

    def move(self, step: int, steps: int) -> None:
        """Before the forward pass, with the momentum that our module has after the step before."""
        tau = self.tau if self.tau_schedule == "constant" else cosine_tau(max(step - 1, 0), steps, self.tau)
        update_momentum(self.backbone, self.backbone_momentum, m=tau)
        update_momentum(self.projection_head, self.projection_head_momentum, m=tau)

    @torch.no_grad()
    def target(self, view: Tensor) -> Tensor:
        """The momentum copy's projection."""
        return self.projection_head_momentum(self.backbone_momentum(view))


class MoCoPeer(TaughtPeer):
    """``NTXentLoss`` with a memory bank and ``MoCoProjectionHead``."""

    def __init__(self, ours: MoCo) -> None:
        super().__init__(ours)
        hidden, dim = self.ours["projector_hidden"] or self.width, self.ours["projector_dim"]
        self.projection_head = MoCoProjectionHead(self.width, hidden, dim)
        self.criterion = NTXentLoss(self.ours["temperature"], memory_bank_size=(self.ours["queue_size"], dim))
        self.copy_for_momentum()

    def loss(self, batch: Any, views: list[Tensor], epoch: int, step: int, steps: int) -> Tensor:
        """Query of the first view, key of the second."""
        self.move(step, steps)
        query = self.projection_head(self.backbone(views[0]))
        return self.criterion(query, self.target(views[1]))


class BYOLPeer(TaughtPeer):
    """``NegativeCosineSimilarity`` and BYOL's two heads."""

    def __init__(self, ours: BYOL) -> None:
        super().__init__(ours)
        hidden, dim = self.ours["projector_hidden"], self.ours["projector_dim"]
        self.projection_head = BYOLProjectionHead(self.width, hidden, dim)
        self.prediction_head = BYOLPredictionHead(dim, hidden, dim)
        self.criterion = NegativeCosineSimilarity()
        self.copy_for_momentum()

    def loss(self, batch: Any, views: list[Tensor], epoch: int, step: int, steps: int) -> Tensor:
        """Four times lightly's mean, the paper's scale: Adam's weight decay then weighs the same."""
        self.move(step, steps)
        p0, p1 = (self.prediction_head(self.projection_head(self.backbone(view))) for view in views)
        z0, z1 = (self.target(view) for view in views)
        return 4 * 0.5 * (self.criterion(p0, z1) + self.criterion(p1, z0))


class SwAVPeer(Peer):
    """``SwaVLoss``, ``SwaVProjectionHead``, ``SwaVPrototypes`` and a memory bank per large crop."""

    def __init__(self, ours: SwAV) -> None:
        super().__init__(ours)
        dim = self.ours["projector_dim"]
        self.projection_head = SwaVProjectionHead(self.width, self.ours["projector_hidden"], dim)
        self.prototypes = SwaVPrototypes(dim, self.ours["num_prototypes"], self.ours["freeze_epochs"])
        self.criterion = SwaVLoss(
            self.ours["temperature"], self.ours["sinkhorn_iterations"], self.ours["epsilon"]
        )
        size = (self.ours["queue_size"], dim)
        self.queues = nn.ModuleList(MemoryBankModule(size) for _ in range(self.ours["large_crops"]))
        self.queued = 0

    def project(self, views: list[Tensor]) -> list[Tensor]:
        """Unit projections of every crop, a pass each."""
        return [F.normalize(self.projection_head(self.backbone(view)), dim=1) for view in views]

    def loss(self, batch: Any, views: list[Tensor], epoch: int, step: int, steps: int) -> Tensor:
        """Codes of the large crops, made with their queues once these are full."""
        self.prototypes.normalize()
        z = self.project(views)
        scores = [self.prototypes(rows, step=epoch) for rows in z]
        large = self.ours["large_crops"]
        return self.criterion(scores[:large], scores[large:], self.queue_scores(z[:large], epoch))

    @torch.no_grad()
    def queue_scores(self, large: list[Tensor], epoch: int) -> list[Tensor] | None:
        """Scores of the rows of earlier batches; those of this one enter the queues."""
        if not self.ours["queue_size"] or epoch < self.ours["queue_start_epoch"]:
            return None
        rows = [queue(z, update=True)[1].T for queue, z in zip(self.queues, large, strict=True)]
        full = self.queued >= self.ours["queue_size"]
        self.queued += len(large[0])
        return [self.prototypes(x, step=epoch) for x in rows] if full else None


PEERS: dict[str, type] = {"simclr": SimCLRPeer, "moco": MoCoPeer, "byol": BYOLPeer, "swav": SwAVPeer}


class Ours(nn.Module):
    """Our own module behind the interface of :class:`Peer`, for timing and to check :func:`train`."""

    def __init__(self, ours: SelfSupervised) -> None:
        super().__init__()
        assert not isinstance(ours, TaughtModule), "the teacher is moved by the trainer"
        self.module, self.backbone = ours, ours.backbone

    def loss(self, batch: Any, views: list[Tensor], epoch: int, step: int, steps: int) -> Tensor:
        """Our step's loss without any filter."""
        rows = torch.arange(len(views[0]))
        out = self.module.step({"image": views[0], "views": views, "label": rows, "index": rows})
        assert out.loss_fn is not None
        loss = out.loss_fn(None)
        assert isinstance(loss, Tensor)
        return loss
