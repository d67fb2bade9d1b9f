"""Losses that remember a soft target for every label of every training sample: ELR and SAT."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_nrml import distributed
from lightning_nrml.indexing import check_index, last_writer
from lightning_nrml.losses.base import full_precision
from lightning_nrml.losses.multilabel import MultiLabelLoss, bce_entries, entry_mean, prepare_entries

_CLAMP = 1e-4


class TargetLoss(MultiLabelLoss):
    """A loss with a moving average of each sample's own predictions.

    The average is written from gathered predictions, before it enters the loss, in training mode only
    (``loss.eval()`` leaves it alone), and is equal on all ranks. Of several rows of one sample in a batch the
    last one counts. Entries of weight 0 or with a NaN are not written. Float32, part of the state dict.

    Args:
        num_samples: size of the training set; 0 = told later by :meth:`allocate`, or by a checkpoint.
        num_labels: L.
        momentum: share of the old average that is kept, in [0, 1].

    Attributes:
        target: ``(num_samples, num_labels)``.
    """

    target: Tensor
    empty: float = 0.0  # what an entry holds before its first visit

    def __init__(self, num_samples: int, num_labels: int, momentum: float) -> None:
        super().__init__()
        if num_samples < 0 or num_labels < 1:
            raise ValueError(
                f"num_samples ({num_samples}) must be 0 or more, and num_labels ({num_labels}) 1 or more."
            )
        self.num_labels, self.momentum = num_labels, momentum
        self.register_buffer("target", self._rows(num_samples))

    def _rows(self, num_samples: int) -> Tensor:
        """Empty memory."""
        return torch.full((num_samples, self.num_labels), self.empty, dtype=torch.float32)

    @property
    def num_samples(self) -> int:  # type: ignore[override]
        """Rows of the memory."""
        return self.target.shape[0]

    def allocate(self, num_samples: int) -> None:
        """Make room for a training set of this size, unless there is already.

        Raises:
            ValueError: the memory belongs to a set of another size.
        """
        if self.num_samples == 0:
            self.target = self._rows(num_samples).to(self.target.device)
        elif self.num_samples != num_samples:
            raise ValueError(
                f"{type(self).__name__} remembers {self.num_samples} samples, but the training set has "
                f"{num_samples}: a run can only be resumed on the same training set."
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(f"{prefix}target")
        if saved is not None and self.num_samples == 0 and saved.ndim == 2:
            self.allocate(len(saved))  # outside of a fit nobody else knows the size
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.no_grad()
    def _remember(self, index: Tensor, prob: Tensor, label: Tensor, weight: Tensor) -> None:
        """Move the rows of all ranks' samples towards their predictions."""
        check_index(index, self.num_samples, type(self).__name__)
        parts = [prob, label, ((weight > 0) & prob.isfinite()).to(prob)]
        whole = distributed.gather(torch.stack(parts, dim=1))
        index = distributed.gather(index)
        valid = whole[:, 2] > 0
        source = last_writer(index, valid.any(dim=1))
        prob, label, valid = whole[source, 0], whole[source, 1], valid[source]
        moved = self.momentum * self._old(index, label) + (1 - self.momentum) * prob
        self.target.index_copy_(0, index, torch.where(valid, moved.float(), self.target[index]))

    def _old(self, index: Tensor, label: Tensor) -> Tensor:
        """Targets of these rows, as ``label``'s type."""
        return self.target[index].to(label)


class MultiLabelELRLoss(TargetLoss):
    """Early-learning regularisation: predictions are drawn to their own earlier ones.

    With ``p`` clamped to [1e-4, 1 - 1e-4] and ``T <- beta T + (1 - beta) p``:
    ``mean BCE + lam * mean log(1 - T p)``. The second part only pushes ``p`` up, most where ``T`` is high: it
    protects labels that are missing, hardly against extra ones. ``symmetric=True`` (our own variant) replaces
    ``T p`` by ``T p + (1 - T)(1 - p)``, the single-label form with the two classes present and absent. The
    loss may be negative.

    Source: Liu et al., "Early-Learning Regularization Prevents Memorization of Noisy Labels", NeurIPS 2020,
    arXiv 2007.00151, eq. 6; multi-label form after Burgert et al., IEEE TGRS 2022, arXiv 2207.13975.

    Args:
        num_samples: size of the training set, see :class:`TargetLoss`.
        num_labels: L.
        lam: weight of the second part, not negative.
        beta: momentum of the average, in [0, 1].
        symmetric: also protect absent labels.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        num_samples: int,
        num_labels: int,
        lam: float = 3.0,
        beta: float = 0.7,
        symmetric: bool = False,
    ) -> None:
        if lam < 0 or not 0 <= beta <= 1:
            raise ValueError(f"lam ({lam}) must not be negative, and beta ({beta}) must lie in [0, 1].")
        super().__init__(num_samples, num_labels, beta)
        self.lam, self.symmetric = lam, symmetric

    def forward(
        self, logits: Tensor, label: Tensor, index: Tensor, weight: Tensor | None = None, epoch: int = 0
    ) -> Tensor:
        """See :meth:`MultiLabelLoss.forward`; ``epoch`` is not used."""
        with full_precision(logits):
            z, y, w = prepare_entries(logits, label, weight)
            p, index = z.sigmoid().clamp(_CLAMP, 1 - _CLAMP), index.long()
            if self.training:
                self._remember(index, p.detach(), y, w)
            t = self.target[index].to(p)
            agreement = t * p + (1 - t) * (1 - p) if self.symmetric else t * p
            return entry_mean(bce_entries(z, y) + self.lam * torch.log1p(-agreement), w)


class MultiLabelSATLoss(TargetLoss):
    """Self-adaptive training: wrong labels fade out into the network's own predictions.

    ``T`` starts at the given labels. In the first ``warmup_epochs`` epochs the loss is plain BCE and ``T``
    rests; then ``T <- a T + (1 - a) p`` (no gradient) and the loss is BCE against ``T``. Rare classes are
    drained first, as their probabilities are low early on.

    Source: Huang et al., "Self-Adaptive Training: beyond Empirical Risk Minimization", NeurIPS 2020, arXiv
    2002.10319, algorithm 1; multi-label form (without sample weights) after Burgert et al., IEEE TGRS 2022,
    arXiv 2207.13975.

    Args:
        num_samples: size of the training set, see :class:`TargetLoss`.
        num_labels: L.
        momentum: a, in [0, 1].
        warmup_epochs: exactly so many plain epochs, counted from 0.

    Raises:
        ValueError: an argument is out of range.
    """

    empty = torch.nan  # the given label, which comes with every batch

    def __init__(
        self, num_samples: int, num_labels: int, momentum: float = 0.9, warmup_epochs: int = 5
    ) -> None:
        if not 0 <= momentum <= 1 or warmup_epochs < 0:
            raise ValueError(
                f"momentum ({momentum}) must lie in [0, 1], and warmup_epochs ({warmup_epochs}) must not be "
                "negative."
            )
        super().__init__(num_samples, num_labels, momentum)
        self.warmup_epochs = warmup_epochs

    def _old(self, index: Tensor, label: Tensor) -> Tensor:
        rows = super()._old(index, label)
        return torch.where(rows.isnan(), label, rows)

    def forward(
        self, logits: Tensor, label: Tensor, index: Tensor, weight: Tensor | None = None, epoch: int = 0
    ) -> Tensor:
        """See :meth:`MultiLabelLoss.forward`."""
        with full_precision(logits):
            z, y, w = prepare_entries(logits, label, weight)
            if epoch >= self.warmup_epochs:
                index = index.long()
                if self.training:
                    self._remember(index, z.detach().sigmoid(), y, w)
                y = self._old(index, y)
            return entry_mean(bce_entries(z, y), w)

    def corrected(self, label: Tensor) -> Tensor:
        """``(N, L)`` labels after correction: where the target has passed .5, else the given ones.

        Args:
            label: ``(N, L)`` given labels of the whole training set.
        """
        soft = self._old(torch.arange(len(label), device=self.target.device), label.to(self.target))
        return (soft > 0.5).to(label)
