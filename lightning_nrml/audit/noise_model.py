"""The noise model of an audit, fitted to evidence; and a noise rate where there is none but scores.

What it is, and why: :mod:`lightning_nrml.audit.scores`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: (log a, log b, log d, logit r) of sharp votes and some noise, and how much they count
_PRIOR = torch.tensor([3.0, 1.0, 0.0, -1.0])
_PRIOR_WEIGHT = torch.tensor([7e-3, 7e-3, 7e-3, 1e-4])
#: how much the symmetric prior of a pair of classes counts, and rounds of EM
_PSEUDO_COUNT, _ROUNDS = 10.0, 30


def class_logits(evidence: Tensor, theta: Tensor) -> Tensor:
    """``(n, C)`` from evidence ``(3, n, C)`` (centres, log votes, discriminants) and its log weights."""
    return torch.einsum("k,knc->nc", theta[:3].exp(), evidence)


def log_p_clean(log_p: Tensor, log_odds: Tensor, num_classes: int) -> Tensor:
    """``log P_clean`` from ``log p(given | x)`` and ``logit r``, without leaving the log domain."""
    log_p = log_p.clamp(max=-1e-7)
    log_rest = torch.log(-torch.expm1(log_p))
    spread = torch.log(torch.tensor(num_classes - 1.0))
    return -F.softplus(log_odds - spread + log_rest - log_p)


def fit_noise_model(evidence: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """Maximum-likelihood ``(log a, log b, log d, logit r)``, of no rows the prior's."""
    if not len(label):
        return _PRIOR
    theta = _PRIOR.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([theta], max_iter=25, line_search_fn="strong_wolfe")
    spread = torch.log(torch.tensor(num_classes - 1.0))

    def closure() -> Tensor:
        optimiser.zero_grad()
        bounded = theta.clamp(-30, 30)  # a line search that reached infinity would never come back
        log_p = class_logits(evidence, bounded).log_softmax(1).gather(1, label[:, None])[:, 0]
        log_p = log_p.clamp(max=-1e-7)
        right = F.logsigmoid(-theta[-1]) + log_p
        wrong = F.logsigmoid(theta[-1]) - spread + torch.log(-torch.expm1(log_p))
        # the prior also keeps the numbers finite where the data do not say anything about them
        loss = -torch.logaddexp(right, wrong).mean() + (_PRIOR_WEIGHT * (theta - _PRIOR).square()).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimiser.step(closure)
    return theta.detach()


def fit_confusion(evidence: Tensor, label: Tensor, theta: Tensor) -> Tensor:
    """``(C, C)`` chance that a sample of class c (row) is given as class j: posterior mode, 30 rounds of EM.

    Args:
        evidence: ``(3, n, C)``. label: ``(n,)``.
        theta: of :func:`fit_noise_model`; its rate, spread evenly over the other classes, is the prior.
    """
    p = class_logits(evidence, theta).softmax(1)
    rate, count = float(theta[-1].sigmoid()), p.shape[1]
    symmetric = torch.full((count, count), rate / (count - 1))
    symmetric.fill_diagonal_(1 - rate)
    confusion = symmetric
    for _ in range(_ROUNDS):
        true = p * confusion[:, label].T
        true /= true.sum(1, keepdim=True).clamp_min(1e-30)
        mass = _PSEUDO_COUNT * count * symmetric
        mass = mass + torch.zeros_like(mass).index_add_(0, label, true).T
        confusion = mass / mass.sum(1, keepdim=True)
    return confusion


def mixture_rate(score: Tensor, max_rows: int = 100_000) -> float:
    """Share of the lower of two Gaussians fitted to scores: a noise rate where nothing else is known.

    Args:
        score: ``(N,)`` scores that rise with the trust in a label, such as a ledger's; NaN rows are left out.
        max_rows: a random part of this size is fitted.

    Returns:
        A share in [0, 1]; NaN for fewer than 10 finite scores or if all are equal.
    """
    from sklearn.mixture import GaussianMixture

    finite = score[torch.isfinite(score)].double().cpu()
    if len(finite) < 10 or float(finite.std()) == 0:
        return float("nan")
    order = torch.randperm(len(finite), generator=torch.Generator().manual_seed(0))
    rows = finite[order[:max_rows], None].numpy()
    mixture = GaussianMixture(2, random_state=0).fit(rows)
    return float(mixture.weights_[mixture.means_[:, 0].argmin()])
