"""Margin loss with a learned boundary per class, and distance-weighted sampling of its negatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_nrml import distributed
from lightning_nrml.losses.base import Loss, full_precision, prepare, safe_divide, unit_rows, widen

# Below this a squared distance of unit rows is rounding; the root would have no finite slope at 0.
SAME_PLACE = 1e-8
# Antipodal rows have density 0: their weight is finite only if 1 - D^2 / 4 stops short of 0.
ANTIPODE = 1e-6

Triplets = tuple[Tensor, Tensor, Tensor]


class DistanceWeightedMiner(nn.Module):
    """Triplets whose negatives cover the distances evenly: neither only the hardest nor only far ones.

    The distances ``D`` of random unit rows crowd around sqrt(2). A negative is therefore drawn with a
    weight inverse to their density: with ``D' = max(D, cutoff)`` and dimension ``d``,

        log w = (2 - d) log D' - (d - 3) / 2 log(1 - D'^2 / 4),

    and ``w = 0`` for rows of the anchor's class and from ``D' = nonzero_loss_cutoff`` on. For every ordered
    pair (anchor, other image of its class) one negative is drawn, with replacement.

    Left out is first and then each row's own maximum is subtracted. The published code subtracts the
    maximum of the whole matrix, so at d = 512 one close pair (a wrong label, say) underflows the weights
    of all other anchors; pytorch-metric-learning still does. An anchor without a negative below
    ``nonzero_loss_cutoff`` gets any row of another class, all equally likely (the published code may then
    draw one of its own class): with the default boundary only its positive counts.

    Source: Wu et al., "Sampling Matters in Deep Embedding Learning", ICCV 2017, arXiv 1706.07567,
    section 4; constants of the first author's code.

    Args:
        cutoff: distances below it count as this one, so that the variance of the gradient stays low; in
            (0, 2).
        nonzero_loss_cutoff: distance from which on a negative has no loss: margin plus (first) boundary.
            Above 2 nothing is cut.

    Raises:
        ValueError: a cut-off that leaves nothing to draw.
    """

    def __init__(self, cutoff: float = 0.5, nonzero_loss_cutoff: float = 1.4) -> None:
        super().__init__()
        if not 0 < cutoff < 2:
            raise ValueError(f"'cutoff' is a distance of unit rows and must lie in (0, 2), got {cutoff}.")
        if not nonzero_loss_cutoff > cutoff:
            raise ValueError(
                f"'nonzero_loss_cutoff' must be above 'cutoff' = {cutoff}, got {nonzero_loss_cutoff}."
            )
        self.cutoff = cutoff
        self.nonzero_loss_cutoff = nonzero_loss_cutoff

    @torch.no_grad()
    def probability(self, embedding: Tensor, label: Tensor) -> Tensor:
        """``(B, B)`` chance of each row (column) to be the negative of each anchor (row).

        Args:
            embedding: ``(B, D)`` of any float type; normalised inside.
            label: ``(B,)`` int64.

        Returns:
            fp32 (or wider) rows that sum to 1; all 0 for an anchor without a negative below
            ``nonzero_loss_cutoff``.
        """
        with full_precision(embedding):
            z = unit_rows(embedding)
            squared = (2.0 - 2.0 * (z @ z.T)).clamp(min=self.cutoff**2)
            near = (label[:, None] != label[None, :]) & (squared < self.nonzero_loss_cutoff**2)
            dim = z.shape[1]
            log_weight = (2 - dim) / 2 * squared.log()
            log_weight = log_weight - (dim - 3) / 2 * (1.0 - squared / 4).clamp(min=ANTIPODE).log()
            share = log_weight.masked_fill(~near, -torch.inf).softmax(dim=1)
            return torch.where(near.any(dim=1, keepdim=True), share, 0.0)

    @torch.no_grad()
    def forward(
        self,
        embedding: Tensor,
        label: Tensor,
        weight: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Triplets:
        """Draw the triplets of these rows; nothing is gathered over ranks.

        Args:
            embedding: ``(B, D)`` of any float type; normalised inside.
            label: ``(B,)`` int64.
            weight: ``(B,)``; rows of weight 0 are in no triplet, and change no draw of the others.
            generator: on the CPU, so that all devices draw alike; ``None`` = torch's global one.

        Returns:
            ``(anchor, positive, negative)``, each ``(T,)`` int64 row numbers, by anchor and then positive.
            Empty if no class with two rows meets another class.
        """
        row = torch.arange(len(label), device=label.device)
        if weight is not None:
            row = row[weight > 0]
        label = label[row]
        share = self.probability(embedding[row], label)
        other = label[:, None] != label[None, :]
        share = torch.where((share > 0).any(dim=1, keepdim=True), share, other.to(share))
        pair = (~other & other.any(dim=1, keepdim=True)).fill_diagonal_(False)
        anchor, positive = pair.nonzero(as_tuple=True)
        if len(anchor) == 0:
            return row[anchor], row[positive], row[anchor]
        number = pair.cumsum(dim=1)  # of the positive among those of its anchor, from 1
        drawn = _draw(share, int(number[:, -1].max()), generator)
        negative = drawn[anchor, number[anchor, positive] - 1]
        return row[anchor], row[positive], row[negative]

    def extra_repr(self) -> str:
        """Shown by ``print``."""
        return f"cutoff={self.cutoff}, nonzero_loss_cutoff={self.nonzero_loss_cutoff}"


def _draw(share: Tensor, number: int, generator: torch.Generator | None) -> Tensor:
    """``(B, number)`` columns drawn with replacement by the weights ``share (B, M)`` of each row."""
    uniform = torch.rand(len(share), number, generator=generator, dtype=torch.float32).to(share)
    mass = share.cumsum(dim=1)
    found = torch.searchsorted(mass, uniform * mass[:, -1:], right=True).clamp_(max=share.shape[1] - 1)
    # The product may round up to the whole mass, and a parallel sum may grow by rounding where the weight is
    # 0: go back to the last column that has some.
    column = torch.arange(share.shape[1], device=share.device)
    allowed = torch.where(share > 0, column, 0).cummax(dim=1).values
    return allowed.gather(1, found)


class MarginLoss(Loss):
    """Pull positives below, push negatives above a boundary that is learned, for each class or for all.

    With distances ``D`` of unit rows, triplets (a, p, n) and the boundary ``b`` of the anchor's class:

        L = sum over triplets of ([D_ap - b + margin]_+ + [b - D_an + margin]_+ + nu b) / number of terms
            in brackets that are positive,

    and 0 if none is. Without ``triplets``, :class:`DistanceWeightedMiner` draws them from the gathered
    batch, so batches need several images of a class (``m_per_class``). All ranks draw alike, from one
    number that rank 0 takes from torch's global generator: ranks make no difference, and a resumed run of
    our modules draws what the whole one drew.

    With weights, a triplet counts ``w_a w_p w_n`` in the sum and in the number, and rows of weight 0 are
    not drawn: 0/1 weights give the loss of the kept samples alone.

    The boundary learns with the learning rate ``optimizer.loss_lr``: 0.1 with SGD in the paper's code
    (Adam on the net); 0 keeps it as it is. ``nonzero_loss_cutoff`` does not follow it.

    Source: Wu et al., "Sampling Matters in Deep Embedding Learning", ICCV 2017, arXiv 1706.07567,
    section 4; normaliser and constants of the first author's code.

    Args:
        margin: half of the gap between positives and negatives, at least 0.
        beta: boundary at the start, a distance of unit rows in (0, 2).
        nu: pull of the boundaries towards 0, at least 0.
        num_classes: number of training classes C for a boundary each: labels are in ``[0, C)`` (those of
            dropped rows may be anything); ``None`` = one boundary for all.
        cutoff: of :class:`DistanceWeightedMiner`.
        nonzero_loss_cutoff: of :class:`DistanceWeightedMiner`; ``beta + margin`` if you change these.

    Attributes:
        beta: parameter ``(C,)`` or ``(1,)``.
        miner: draws the triplets.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        margin: float = 0.2,
        beta: float = 1.2,
        nu: float = 0.0,
        num_classes: int | None = None,
        cutoff: float = 0.5,
        nonzero_loss_cutoff: float = 1.4,
    ) -> None:
        super().__init__()
        for name, value in (("margin", margin), ("nu", nu)):
            if not value >= 0:
                raise ValueError(f"'{name}' must not be negative, got {value}.")
        if not 0 < beta < 2:
            raise ValueError(f"'beta' is a distance of unit rows and must lie in (0, 2), got {beta}.")
        if num_classes is not None and num_classes < 1:
            raise ValueError(
                f"'num_classes' must be at least 1 (or null for one boundary), got {num_classes}."
            )
        self.margin, self.nu, self.num_classes = margin, nu, num_classes
        self.start_beta = beta
        self.beta = nn.Parameter(torch.full((num_classes or 1,), float(beta)))
        self.miner = DistanceWeightedMiner(cutoff, nonzero_loss_cutoff)

    def forward(
        self,
        embedding: Tensor,
        label: Tensor,
        weight: Tensor | None = None,
        triplets: Triplets | None = None,
    ) -> Tensor:
        """See :class:`~lightning_nrml.losses.base.Loss`.

        Args:
            embedding, label, weight: as in every loss.
            triplets: ``(anchor, positive, negative)``, each ``(T,)`` int64 rows of this rank's
                ``embedding``; ``None`` = drawn from the rows of all ranks.

        Raises:
            ValueError: if shapes or triplets do not fit, or a label has no boundary.
        """
        with full_precision(embedding):
            z, w = prepare(embedding, label, weight)
            self._check_label(label[w > 0])
            z = unit_rows(z)
            if triplets is None:
                keys, key_weight = distributed.gather(z, grad=True), distributed.gather(w)
                start = distributed.rank() * len(z)
                a, p, n = self._mine(keys, distributed.gather(label), key_weight)
                mine = (a >= start) & (a < start + len(z))
                a, p, n = a[mine] - start, p[mine], n[mine]
            else:
                keys, key_weight = z, w
                a, p, n = _checked(triplets, z)
            counted = w[a] * key_weight[p] * key_weight[n]
            live = counted > 0
            a, p, n, counted = a[live], p[live], n[live], counted[live]

            distance = (2.0 - 2.0 * (z @ keys.T)).clamp(min=SAME_PLACE).sqrt()
            beta = widen(self.beta)[label[a] if self.num_classes else torch.zeros_like(a)]
            pull = (distance[a, p] - (beta - self.margin)).clamp(min=0)
            push = ((beta + self.margin) - distance[a, n]).clamp(min=0)
            total = (counted * (pull + push + self.nu * beta)).sum()
            positive = (counted * ((pull > 0).to(counted) + (push > 0))).sum()
            positive = distributed.mean_over_ranks(positive)
            return torch.where(positive == 0, total * 0, safe_divide(total, positive))

    def _mine(self, z: Tensor, label: Tensor, weight: Tensor) -> Triplets:
        """Triplets of the gathered batch, the same on all ranks; takes one number from torch's generator."""
        seed = distributed.gather(torch.randint(2**31, (1,)).to(z.device))
        drawn: Triplets = self.miner(z, label, weight, torch.Generator().manual_seed(int(seed[0])))
        return drawn

    def _check_label(self, label: Tensor) -> None:
        if self.num_classes is None or len(label) == 0:
            return
        low, high = (int(x) for x in torch.stack(label.aminmax()))
        if low < 0 or high >= self.num_classes:
            raise ValueError(
                f"Label {low if low < 0 else high} has no boundary: MarginLoss has num_classes = "
                f"{self.num_classes}, so labels must be 0 to {self.num_classes - 1}."
            )

    def arguments(self) -> dict[str, Any]:
        """Constructor arguments."""
        return {
            "margin": self.margin,
            "beta": self.start_beta,
            "nu": self.nu,
            "num_classes": self.num_classes,
            "cutoff": self.miner.cutoff,
            "nonzero_loss_cutoff": self.miner.nonzero_loss_cutoff,
        }

    def extra_repr(self) -> str:
        """Shown by ``print``."""
        return f"margin={self.margin}, beta={self.start_beta}, nu={self.nu}, num_classes={self.num_classes}"


def _checked(triplets: Triplets, z: Tensor) -> Triplets:
    """The triplets as given, if they are three equally long lists of rows of ``z``."""
    parts = tuple(triplets)
    whole = len(parts) == 3 and all(x.ndim == 1 and x.dtype == torch.int64 for x in parts)
    if not whole or not len(parts[0]) == len(parts[1]) == len(parts[2]):
        raise ValueError(
            "'triplets' must be (anchor, positive, negative), three int64 tensors of one length, got "
            f"{[(tuple(x.shape), str(x.dtype).removeprefix('torch.')) for x in parts]}."
        )
    a, p, n = (x.to(z.device) for x in parts)
    every = torch.cat([a, p, n])
    if len(every) and not 0 <= int(every.min()) <= int(every.max()) < len(z):
        raise ValueError(
            f"'triplets' must number rows of 'embedding', 0 to {len(z) - 1}, got "
            f"{int(every.min())} to {int(every.max())}."
        )
    return a, p, n
