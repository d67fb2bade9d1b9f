"""How probable each given label is, from frozen embeddings, without a sample's vote for itself.

Evidence for "sample i shows class c", all of it blind to the label of sample i:

* centres: cosine to the mean of class c over the *other folds*, with the grand mean taken out (label
  noise pulls every class mean towards the grand mean; the direction that is left is the class's);
* linear: the linear discriminant of the same folds (Fisher 1936), with the total covariance, a tenth of
  its mean variance added: it also knows which directions all classes share. Part of "centres";
* neighbours: share of class c among the nearest samples, itself left out.

A model of the noise with four numbers (a, b, d, r) is fitted to the given labels by maximum likelihood:

    p(c | x)     = softmax_c( a * centre_c + b * log vote_c + d * linear_c )
    P(given | x) = (1 - r) p(given | x) + r (1 - p(given | x)) / (C - 1)
    P_clean      = (1 - r) p(given | x) / P(given | x)

r is the rate of wrong labels; the estimate that is reported is the mean of 1 - P_clean. Where all samples
of a class are alike, soft votes (small a, b) explain disagreement as well as noise does, and better if the
net has moved samples a little towards wrong labels that it was trained on; a prior prefers sharp votes.

People take cats for dogs rather than for trucks. With more than two classes and a sample for each pair of
them, chances T[c, j] that class c is given as j are found by expectation maximisation at the fitted a, b, d
(Dawid and Skene 1979, for one labeller), with the noise above as a prior of ten samples for each pair:

    P_clean      = p(given | x) T[given, given] / sum_c p(c | x) T[c, given]

A class that is in none of the other folds (without centres: that has one sample) gives no evidence: there it
is not suggested, and nothing is said of the labels that name it.

Tried and left out: a second round in which voters count by their own P_clean (AUROC -.01 on caltech's pixels,
+.001 on Omniglot); fitting a, b, d again under T (the rate runs away: .14, .16, .17, ... on CIFAR-10N aggre,
where .09 are wrong); only the pairs or only the rates of classes free (AUROC lower by .003 to .008 on
CIFAR-10N); T for each label of multi-label data (UC Merced, mixed 40 %: AUROC .881, with one rate .886).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_nrml.audit.noise_model import class_logits, fit_confusion, fit_noise_model, log_p_clean
from lightning_nrml.metrics.search import Backend, prepare_rows, topk_search

Evidence = Literal["auto", "both", "centres", "knn"]
#: "auto" leaves neighbours out beyond this many samples on a CPU: exact search is quadratic
KNN_LIMIT = 200_000
#: parts of the samples, each judged by the others
FOLDS = 5
_FIT_ROWS = 20_000
_CHUNK_NUMBERS = 1 << 22
#: numbers of the table that the model is fitted to
_FIT_NUMBERS = 100_000_000
_SHRINKAGE = 0.1  # of the covariance, in units of its mean variance
_FLOOR = 1e-3  # vote for every class, so that none is impossible


@dataclass(frozen=True, slots=True)
class AuditScores:
    """One row per sample, in the order of the embeddings.

    Attributes:
        log_p_clean: ``(N,)`` float32, log-probability that the given label is right, at most 0; NaN where no
            voter has the given class, so that nothing is known.
        suggested: ``(N,)`` int64, the most probable class; -1 where nothing is known.
        confidence: ``(N,)`` float32 in (0, 1], its probability; NaN where nothing is known.
        noise_rate: estimated share of wrong labels among the judged ones, in [0, 1]; NaN if none is.
        parameters: the fitted noise model: ``centres`` (a), ``neighbours`` (b), ``linear`` (d), ``rate`` (r).
        confusion: ``(C, C)`` T, chance that a sample of one class (row) is given as another one; ``None`` for
            symmetric noise of rate r.
    """

    log_p_clean: Tensor
    suggested: Tensor
    confidence: Tensor
    noise_rate: float
    parameters: dict[str, float]
    confusion: Tensor | None = None


@dataclass(frozen=True, slots=True)
class _Problem:
    """Unit rows ``(N, D)``, labels and folds ``(N,)``, and neighbours ``(N, k)`` with their affinities."""

    row: Tensor
    label: Tensor
    fold: Tensor
    num_folds: int
    num_classes: int
    neighbour: Tensor | None
    affinity: Tensor | None
    centred: bool
    #: covariance by the fold that is left out, factored; labels have no part in it, so that all questions
    #: about the same rows share it
    factored: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Means:
    """Unit directions ``(C, D)`` of the classes, the grand mean ``(D,)``, and the linear discriminant."""

    direction: Tensor
    grand: Tensor
    weight: Tensor
    offset: Tensor
    silent: Tensor  # (C,) bool, classes that have samples, but none among the voters


def check_evidence(evidence: Evidence) -> None:
    """Refuse what is no :data:`Evidence`.

    Raises:
        ValueError: names what there is.
    """
    if evidence not in get_args(Evidence):
        raise ValueError(f"evidence is {evidence!r}: choose one of {', '.join(get_args(Evidence))}.")


def check_classes(count: int) -> None:
    """Refuse data with fewer than two classes.

    Raises:
        ValueError: says why.
    """
    if count < 2:
        raise ValueError(
            f"the labels have {count} class: an audit asks which other class a sample may show, so it needs "
            "at least 2."
        )


def check_samples(count: int, folds: int = FOLDS) -> None:
    """Refuse fewer samples than folds.

    Raises:
        ValueError: gives both.
    """
    if folds > count:
        raise ValueError(f"an audit of {folds} folds needs at least as many samples, got {count}.")


def audit_scores(
    embedding: Tensor,
    label: Tensor,
    num_classes: int | None = None,
    evidence: Evidence = "auto",
    k: int = 20,
    temperature: float = 0.1,
    folds: int = FOLDS,
    seed: int = 0,
    backend: Backend = "torch",
) -> AuditScores:
    """Judge every given label by the other samples.

    Args:
        embedding: ``(N, D)`` frozen features of any length, N >= 2.
        label: ``(N,)`` int64 given labels in ``[0, num_classes)``.
        num_classes: C, at least 2; ``None`` = largest label + 1. Classes without a sample change nothing.
        evidence: ``both`` fuses centres (with the discriminant) and neighbours; ``auto`` is ``both``, but
            ``centres`` beyond 200,000 samples on a CPU, where the search for neighbours would take hours.
        k: neighbours that vote, at least 1.
        temperature: a neighbour at cosine s votes with weight ``exp(s / temperature)``.
        folds: parts for the out-of-sample centres, 2 to N.
        seed: of the split into folds.
        backend: of the neighbour search, see :func:`lightning_nrml.metrics.search.topk_search`.

    Raises:
        ValueError: wrong shapes or values, NaN in the embedding (naming rows).
    """
    row = prepare_rows(embedding, "cosine", "embedding").float()
    label = label.to(row.device, torch.int64)
    declared = _checked_classes(row, label, num_classes)
    present, compact = label.unique(return_inverse=True)
    count = len(present)
    if count < 2:  # nothing to compare with, as if the other classes had samples
        present, compact, count = torch.arange(declared, device=row.device), label, declared
    problem = _problem(row, compact, count, evidence, k, temperature, folds, seed, backend)
    sample = _sample(problem)
    theta = fit_noise_model(*sample, count)
    many = count > 2 and len(row) >= count**2
    return _of_all_classes(
        _judge(problem, theta, fit_confusion(*sample, theta) if many else None), present, declared
    )


def audit_label_scores(
    embedding: Tensor, label: Tensor, evidence: Evidence = "auto", k: int = 20, seed: int = 0
) -> AuditScores:
    """Judge every label of multi-label samples, given or not, by the other samples.

    Each label is a question of two classes, without and with it. The noise model is fitted to each label, but
    how sharply centres and neighbours vote is the median over the labels; the search for neighbours is done
    once.

    Args:
        embedding: ``(N, D)`` frozen features, N >= 5.
        label: ``(N, L)`` given labels, 0 or 1.
        evidence, k, seed: see :func:`audit_scores`.

    Returns:
        Scores of ``N * L`` entries, label by label within each sample: entry ``i * L + c``. ``suggested`` is
        0 or 1; ``parameters`` are means over the labels. A label that all samples or none have is taken for
        right: score 0. One that no voter has is unknown where given; one that all voters have, where not.

    Raises:
        ValueError: wrong shapes or values, NaN in the embedding (naming rows).
    """
    row = prepare_rows(embedding, "cosine", "embedding").float()
    label = label.to(row.device, torch.int64)
    if label.ndim != 2 or len(label) != len(row) or bool(((label != 0) & (label != 1)).any()):
        raise ValueError(f"label must be ({len(row)}, L) of 0 and 1, got shape {tuple(label.shape)}.")
    first = _problem(row, label[:, 0], 2, evidence, k, 0.1, FOLDS, seed, "torch")
    asked = [c for c in range(label.shape[1]) if 0 < int(label[:, c].sum()) < len(row)]
    problems = [replace(first, label=label[:, c]) for c in asked]
    fitted = [fit_noise_model(*_sample(problem), 2) for problem in problems]
    log_clean, suggested = torch.zeros(label.shape, device=row.device), label.clone()
    confidence, found = torch.ones_like(log_clean), []
    for c, problem, theta in zip(asked, problems, fitted, strict=True):
        # few samples have a rare label: alone they would make its votes far too sharp
        common = torch.stack(fitted)[:, :2].median(dim=0).values
        found.append(_judge(problem, torch.cat([common, theta[2:]]), None))
        log_clean[:, c], suggested[:, c] = found[-1].log_p_clean, found[-1].suggested
        confidence[:, c] = found[-1].confidence
    names = found[0].parameters if found else {}
    parameters = {n: sum(s.parameters[n] for s in found) / len(found) for n in names}
    rate = _noise_rate(log_clean)
    return AuditScores(log_clean.flatten(), suggested.flatten(), confidence.flatten(), rate, parameters)


def _problem(
    row: Tensor,
    label: Tensor,
    count: int,
    evidence: Evidence,
    k: int,
    temperature: float,
    folds: int,
    seed: int,
    backend: Backend,
) -> _Problem:
    """Folds and neighbours of unit rows ``(N, D)``."""
    check_evidence(evidence)
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}.")
    if folds < 2:
        raise ValueError(f"folds must be 2 to N = {len(row)}, got {folds}.")
    check_samples(len(row), folds)
    if evidence == "auto":
        evidence = "centres" if len(row) > KNN_LIMIT and row.device.type == "cpu" else "both"
    neighbour = affinity = None
    if evidence != "centres":
        itself = torch.arange(len(row), device=row.device)
        near, neighbour = topk_search(row, row, min(k, len(row) - 1), exclude=itself, backend=backend)
        affinity = ((near - near[:, :1]) / temperature).exp()
    order = torch.randperm(len(row), generator=torch.Generator().manual_seed(seed))
    fold = (order % folds).to(row.device)
    return _Problem(row, label, fold, folds, count, neighbour, affinity, evidence != "knn")


def _checked_classes(row: Tensor, label: Tensor, num_classes: int | None) -> int:
    if label.shape != row.shape[:1] or len(row) < 2:
        raise ValueError(
            f"label must have shape (N,) with N = {len(row)} >= 2 embeddings, got {tuple(label.shape)}."
        )
    count = int(label.max()) + 1 if num_classes is None else num_classes
    check_classes(count)
    if int(label.min()) < 0 or int(label.max()) >= count:
        raise ValueError(
            f"label runs from {int(label.min())} to {int(label.max())}; it must lie in [0, C - 1] with "
            f"C = num_classes = {count}."
        )
    return count


# ---- evidence --------------------------------------------------------------------------------------


def _factored(problem: _Problem, fold: int, row: Tensor, grand: Tensor) -> tuple[Tensor, Tensor]:
    """LU factors of the covariance of ``row``, all samples but those of ``fold``, with mean ``grand``."""
    if fold not in problem.factored:
        spread = (row.T @ row).double() / len(row) - torch.outer(grand, grand).double()
        spread.diagonal().add_(_SHRINKAGE * spread.trace() / row.shape[1] + 1e-12)
        factors, pivots = torch.linalg.lu_factor(spread)
        problem.factored[fold] = factors, pivots
    return problem.factored[fold]


def _means(problem: _Problem, fold: int) -> _Means:
    """What the samples of all folds but ``fold`` tell about the classes."""
    use = problem.fold != fold
    size = (problem.num_classes, problem.row.shape[1])
    row, label = problem.row[use], problem.label[use]
    total = row.new_zeros(size).index_add_(0, label, row)
    mass = row.new_zeros(size[0]).index_add_(0, label, torch.ones_like(row[:, 0]))
    grand = row.mean(0)
    # of a class that all voters have only rounding errors would be left
    apart = (total - mass[:, None] * grand) * (mass < len(row))[:, None]
    mean = (apart / mass.clamp_min(1)[:, None]).double()
    weight = torch.linalg.lu_solve(*_factored(problem, fold, row, grand), mean.T).T
    offset = ((mean * weight).sum(1) / 2).float()
    count = problem.label.bincount(minlength=size[0])
    silent = (count > 0) & (mass == 0) if problem.centred else count == 1
    return _Means(F.normalize(apart, dim=1), grand, weight.float(), offset, silent)


def _evidence(problem: _Problem, rows: Tensor, means: _Means) -> Tensor:
    """``(3, n, C)``: cosines to the centres, log votes and discriminants; 0 where a kind is not wanted."""
    out = problem.row.new_zeros(3, len(rows), problem.num_classes)
    if problem.centred:
        apart = problem.row[rows] - means.grand
        out[0] = F.normalize(apart, dim=1) @ means.direction.T
        out[2] = apart @ means.weight.T - means.offset
    if problem.neighbour is not None and problem.affinity is not None:
        found = problem.neighbour[rows]
        tally = out[1].scatter_add(1, problem.label[found], problem.affinity[rows])
        out[1] = (tally / tally.sum(1, keepdim=True).clamp_min(1e-12) + _FLOOR).log()
    return out


def _blocks(problem: _Problem, rows: Tensor) -> Iterator[Tensor]:
    yield from rows.split(max(64, _CHUNK_NUMBERS // problem.num_classes))


def _sample(problem: _Problem) -> tuple[Tensor, Tensor]:
    """Evidence ``(3, n, C)`` and given labels ``(n,)`` of at most 20,000 judged rows, on the CPU."""
    order = torch.randperm(len(problem.row), generator=torch.Generator().manual_seed(0))
    rows = order[: min(_FIT_ROWS, _FIT_NUMBERS // problem.num_classes)].to(problem.row.device)
    parts, labels = [], []
    for fold in range(problem.num_folds):
        chosen = rows[problem.fold[rows] == fold]
        means = _means(problem, fold)
        chosen = chosen[~means.silent[problem.label[chosen]]]
        for block in _blocks(problem, chosen):
            parts.append(_evidence(problem, block, means).cpu())
            labels.append(problem.label[block].cpu())
    return torch.cat(parts, dim=1), torch.cat(labels)


def _judge(problem: _Problem, theta: Tensor, confusion: Tensor | None) -> AuditScores:
    theta = theta.to(problem.row.device)
    log_flow = None if confusion is None else confusion.to(problem.row.device).clamp_min(1e-30).log()
    log_clean = torch.empty_like(problem.row[:, 0])
    suggested, confidence = torch.empty_like(problem.label), torch.empty_like(log_clean)
    for fold in range(problem.num_folds):
        means = _means(problem, fold)
        for rows in _blocks(problem, (problem.fold == fold).nonzero()[:, 0]):
            logits = class_logits(_evidence(problem, rows, means), theta)
            log_p = logits.masked_fill(means.silent, -torch.inf).log_softmax(1)
            given, best = problem.label[rows], log_p.max(1)
            unknown = means.silent[given]
            suggested[rows] = best.indices.masked_fill(unknown, -1)
            confidence[rows] = best.values.exp().masked_fill(unknown, torch.nan)
            if log_flow is None:
                own = log_p.gather(1, given[:, None])[:, 0]
                log_clean[rows] = log_p_clean(own, theta[-1], problem.num_classes)
            else:
                log_true = (log_p + log_flow[:, given].T).log_softmax(1)
                log_clean[rows] = log_true.gather(1, given[:, None])[:, 0]
            log_clean[rows[unknown]] = torch.nan
    a, b, d = theta[:3].exp().tolist()
    return AuditScores(
        log_clean,
        suggested,
        confidence,
        _noise_rate(log_clean),
        {"centres": a, "neighbours": b, "linear": d, "rate": float(theta[-1].sigmoid())},
        confusion,
    )


def _of_all_classes(judged: AuditScores, present: Tensor, declared: int) -> AuditScores:
    """The same by the numbers of the ``declared`` classes; those without a sample took no part."""
    at = judged.suggested
    suggested = torch.where(at >= 0, present[at.clamp_min(0)], at)
    confusion = judged.confusion
    if confusion is not None and len(present) < declared:
        wide, to = torch.eye(declared, dtype=confusion.dtype), present.cpu()
        wide[to[:, None], to] = confusion
        confusion = wide
    return replace(judged, suggested=suggested, confusion=confusion)


def _noise_rate(log_clean: Tensor) -> float:
    """Estimated share of wrong labels among those that are judged at all."""
    return float(1 - log_clean[~log_clean.isnan()].exp().double().mean())
