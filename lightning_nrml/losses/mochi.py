"""MoCo's loss against a queue, and MoCHi's with synthetic hard negatives."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_nrml import distributed
from lightning_nrml.losses.base import full_precision, prepare, safe_divide, unit_rows

# Values gathered at a time: 1 MB stays in the cache of a CPU core, 256 MB keep a GPU busy.
CPU_BLOCK = 2**18
GPU_BLOCK = 2**26


class MoCHiLoss(nn.Module):
    """InfoNCE of queries against their keys and a queue, with mixed hard negatives.

    With unit ``q``, ``k`` and queue rows ``n``, the logits of a query are ``q.k``, all ``q.n``, ``num_mixed``
    of ``q.h`` and ``num_query_mixed`` of ``q.h'``, over ``temperature``; the loss is the cross entropy of the
    first. The synthetic rows are mixed from the hard set, the ``num_hard`` queue rows nearest to the query:
    ``h = norm(a n_i + (1 - a) n_j)`` with ``a`` from U(0, 1) and ``i != j``, and
    ``h' = norm(b q + (1 - b) n_j)`` with ``b`` from U(0, 0.5). No gradient passes through ``k``, the queue or
    a synthetic row.

    ``num_mixed = num_query_mixed = 0`` is the loss of MoCo. The mixed logits follow from the queue logits
    by algebra, and only the drawn rows are gathered, block by block, for the lengths of the mixtures.
    Each rank draws for its own queries; the value is the mean over its own queries.

    Source: Kalantidis et al., "Hard Negative Mixing for Contrastive Learning", NeurIPS 2020, arXiv
    2010.01028, sections 3.2 and 3.3; He et al., "Momentum Contrast", CVPR 2020, eq. 1.

    Args:
        temperature: > 0.
        num_hard: size N of the hard set; cut to the rows that the queue holds.
        num_mixed: s, mixtures of two hard negatives per query.
        num_query_mixed: s', mixtures of the query with a hard negative per query.

    Raises:
        ValueError: if the temperature is not positive, a number is negative, or there is something to mix
            but no hard set.
    """

    def __init__(
        self, temperature: float = 0.2, num_hard: int = 1024, num_mixed: int = 0, num_query_mixed: int = 0
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"'temperature' must be positive, got {temperature}.")
        for name, value in (
            ("num_hard", num_hard),
            ("num_mixed", num_mixed),
            ("num_query_mixed", num_query_mixed),
        ):
            if value < 0:
                raise ValueError(f"'{name}' must not be negative, got {value}.")
        if num_mixed + num_query_mixed > 0 and num_hard == 0:
            raise ValueError("'num_hard' must be at least 1 to mix hard negatives, got 0.")
        self.temperature = temperature
        self.num_hard = num_hard
        self.num_mixed = num_mixed
        self.num_query_mixed = num_query_mixed

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        queue: Tensor,
        weight: Tensor | None = None,
        *,
        hard_i: Tensor | None = None,
        hard_j: Tensor | None = None,
        alpha: Tensor | None = None,
        query_hard: Tensor | None = None,
        beta: Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch. What is not given is drawn from torch's global generator.

        Args:
            q: ``(B, D)`` queries of any float type; normalised inside.
            k: ``(B, D)`` keys of the same images, constant.
            queue: ``(K, D)`` negatives, constant, without the keys of this batch; ``K = 0`` gives 0.
            weight: ``(B,)`` weights of the queries in [0, 1]; ``None`` = all 1.
            hard_i: ``(B, num_mixed)`` int64 ranks in the hard set (0 = nearest), first partner.
            hard_j: ``(B, num_mixed)`` ranks of the second partner.
            alpha: ``(B, num_mixed)`` share of the first partner.
            query_hard: ``(B, num_query_mixed)`` ranks of the partner of the query.
            beta: ``(B, num_query_mixed)`` share of the query.

        Returns:
            0-d tensor, float32 (float64 for float64 input).

        Raises:
            ValueError: if the shapes do not agree.
        """
        if k.shape != q.shape:
            raise ValueError(f"'k' must have the shape {tuple(q.shape)} of 'q', got {tuple(k.shape)}.")
        if queue.ndim != 2 or queue.shape[1] != q.shape[-1]:
            raise ValueError(f"'queue' must be (K, {q.shape[-1]}) like 'q', got shape {tuple(queue.shape)}.")
        with full_precision(q):
            no_label = q.new_zeros(len(q))
            query, w = prepare(q, no_label, weight)
            key, _ = prepare(k.detach().to(query), no_label, weight)
            hard = min(self.num_hard, len(queue))
            num_mixed, num_query_mixed = (self.num_mixed, self.num_query_mixed) if hard else (0, 0)
            pairs = _complete(query, hard, num_mixed, hard_i, hard_j, alpha, top_share=1.0)
            query_pairs = _complete(query, hard, num_query_mixed, None, query_hard, beta, top_share=0.5)
            total: Tensor = _InfoNCE.apply(
                unit_rows(query),
                unit_rows(key),
                unit_rows(queue.detach().to(query)),
                w,
                self.temperature,
                hard,
                pairs,
                query_pairs,
            )
            return safe_divide(total, distributed.mean_over_ranks(w.sum()))

    def extra_repr(self) -> str:
        """Shown by ``print``."""
        return (
            f"temperature={self.temperature}, num_hard={self.num_hard}, num_mixed={self.num_mixed}, "
            f"num_query_mixed={self.num_query_mixed}"
        )


class _Draws(NamedTuple):
    """Mixtures ``share * first + (1 - share) * second`` of each query, all ``(B, s)``."""

    first: Tensor | None  # rank in the hard set; None: the query itself
    second: Tensor
    share: Tensor


def _complete(
    query: Tensor,
    hard: int,
    num: int,
    first: Tensor | None,
    second: Tensor | None,
    share: Tensor | None,
    *,
    top_share: float,
) -> _Draws | None:
    """Check what is given and draw the rest, shares from U(0, ``top_share``).

    With ``top_share`` 1 two hard negatives are mixed, else the query and one of them.
    """
    if num == 0:
        return None
    shape = (len(query), num)
    for x in (first, second, share):
        if x is not None and x.shape != shape:
            raise ValueError(f"The draws must have shape {shape} (queries, mixtures), got {tuple(x.shape)}.")
    if second is None:
        second = torch.randint(hard, shape, device=query.device)
    if first is None and top_share == 1.0:
        step = torch.randint(1, max(hard, 2), shape, device=query.device)
        first = (second + step) % hard  # never the same row, each other one equally likely
    if share is None:
        share = torch.rand(shape, device=query.device, dtype=query.dtype) * top_share
    return _Draws(first, second, share.to(query))


class _InfoNCE(torch.autograd.Function):
    """Weighted sum of the queries' losses, with the gradient for unit ``q`` made in the forward pass.

    The part of the gradient along ``q``, which mixtures with the query have, is left out: the normalisation
    that made ``q`` takes it out anyway.

    A mixed row is a constant ``h = (c n_i + (1 - c) n_j) / r`` with ``r`` the length of the bracket, so
    ``q.h`` and its gradient are sums of two queue logits and two queue rows: probabilities of synthetic
    negatives are added to those of the queue rows that they are made of, and one product gives the gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        queue: Tensor,
        w: Tensor,
        temperature: float,
        hard: int,
        pairs: _Draws | None,
        query_pairs: _Draws | None,
    ) -> Tensor:
        positive = (q * k).sum(dim=1, keepdim=True)
        cosine = q @ queue.T
        mixes = []
        if pairs is not None or query_pairs is not None:
            value, row = cosine.topk(hard)  # sorted: rank 0 is the nearest
            mixes = [_mix(q, queue, value, row, d) for d in (pairs, query_pairs) if d is not None]

        top = positive
        for x in (cosine, *(m.logit for m in mixes)):
            if x.shape[1] > 0:
                top = torch.maximum(top, x.amax(dim=1, keepdim=True))
        p_positive = ((positive - top) / temperature).exp_()
        p_queue = cosine.sub_(top).div_(temperature).exp_()
        p_mixes = [((m.logit - top) / temperature).exp_() for m in mixes]
        mass = p_positive + p_queue.sum(dim=1, keepdim=True)
        for p in p_mixes:
            mass = mass + p.sum(dim=1, keepdim=True)
        loss = mass.log() + (top - positive) / temperature

        if ctx.needs_input_grad[0]:
            for p, m in zip(p_mixes, mixes, strict=True):
                p_queue.scatter_add_(1, m.second, p * m.second_share)
                if m.first is not None:
                    p_queue.scatter_add_(1, m.first, p * m.first_share)
            grad = torch.addmm(p_positive * k, p_queue, queue).div_(mass).sub_(k)
            ctx.save_for_backward(grad.mul_(w[:, None] / temperature))
        return (w * loss.squeeze(1)).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * grad_output, None, None, None, None, None, None, None


class _Mixed(NamedTuple):
    """Synthetic negatives ``first_share * x_first + second_share * x_second`` of length 1: ``(B, s)``."""

    logit: Tensor
    first: Tensor | None  # queue row; None: the query
    second: Tensor  # queue row
    first_share: Tensor
    second_share: Tensor


def _mix(q: Tensor, queue: Tensor, value: Tensor, row: Tensor, draws: _Draws) -> _Mixed:
    """Logits of mixtures from the logits ``value`` of the queue rows ``row``, both ``(B, hard)``."""
    c, second = draws.share, row.gather(1, draws.second)
    logit_second = value.gather(1, draws.second)
    if draws.first is None:
        first, dot = None, logit_second
        logit_first = (q * q).sum(dim=1, keepdim=True)
    else:
        first, logit_first = row.gather(1, draws.first), value.gather(1, draws.first)
        dot = _row_products(queue, first, second)
    length = (c * c + (1.0 - c) ** 2 + 2.0 * c * (1.0 - c) * dot).clamp_min_(1e-12).sqrt_()
    first_share, second_share = c / length, (1.0 - c) / length
    logit = first_share * logit_first + second_share * logit_second
    return _Mixed(logit, first, second, first_share, second_share)


def _row_products(x: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """``x[i] . x[j]``, a few queries at a time: the gathered rows of all would be ``B * s * D`` values."""
    out = torch.empty(i.shape, dtype=x.dtype, device=x.device)
    block = CPU_BLOCK if x.device.type == "cpu" else GPU_BLOCK
    step = max(block // max(i.shape[1] * x.shape[1], 1), 1)
    for start in range(0, len(i), step):
        rows = slice(start, start + step)
        product = x.index_select(0, i[rows].flatten()).mul_(x.index_select(0, j[rows].flatten()))
        torch.sum(product.view(-1, i.shape[1], x.shape[1]), dim=2, out=out[rows])
    return out
