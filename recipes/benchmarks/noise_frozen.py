"""Which wrong labels do frozen embeddings show? Our audit and cleanlab on equal inputs.

A net is trained by cross-entropy on the labels as given, without a filter, and kept; another one with our
filter Consensus. The embeddings of the train split (evaluation view, last checkpoint) go to

* ``audit``: the scores of ``nrml audit`` (class centres and neighbours, no sample votes for itself);
* ``cleanlab``: confident learning (Northcutt et al., JAIR 2021, arXiv 1911.00068) as its package does it, on
  out-of-fold probabilities of a logistic regression on the same rows. Its strength is the one of three that
  predicts the *given* labels of the first held-out part best; no true label is looked at.

``pip install lightning-nrml[bench]`` brings cleanlab.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from runner import write_json

SCORERS = {
    "audit": "`nrml audit`",
    "audit_knn": "`nrml audit --evidence knn`",
    "cleanlab": "cleanlab, self-confidence (its default)",
    "cleanlab_margin": "cleanlab, normalised margin",
}
#: rows of the detection table: each scorer on the embeddings of each kept net
DETECTORS = {
    "frozen": SCORERS,
    "consensus_frozen": {f"consensus_{key}": f"after Consensus: {text}" for key, text in SCORERS.items()},
    "shuffled_frozen": {
        f"shuffled_{key}": f"after shuffled batches: {text}" for key, text in SCORERS.items()
    },
}
STRENGTHS = (0.01, 0.1, 1.0)
FOLDS = 5


def judge_run(folder: Path) -> dict[str, dict[str, float]]:
    """Detection quality of every scorer on the last checkpoint of a run; also kept as ``detection.json``."""
    from lightning_nrml.callbacks.predictions import PredictionCollector
    from lightning_nrml.cli.app import NRMLCLI

    cli = NRMLCLI(
        [
            "audit",
            f"--config={folder / 'config.yaml'}",
            f"--ckpt_path={folder / 'checkpoints' / 'last.ckpt'}",
            f"--trainer.default_root_dir={folder}",
            "--gallery=20",
        ]
    )
    collector = next(c for c in cli.trainer.callbacks if type(c) is PredictionCollector)
    label, clean = cli.datamodule.train_label.numpy(), cli.datamodule.train_clean_label.numpy()
    index = collector.arrays["index"]
    found = judge(collector.arrays["embedding"], label[index], clean[index], cli.datamodule.num_classes)
    write_json(folder / "detection.json", found, indent=2)
    return found


def judge(
    embedding: np.ndarray, label: np.ndarray, clean: np.ndarray, num_classes: int
) -> dict[str, dict[str, float]]:
    """Precision and recall of the kept set, AUROC, average precision and the noise rate found, by scorer.

    Args:
        embedding: ``(N, D)``. label, clean: ``(N,)`` given and true labels, the latter for measuring only.
    """
    import torch

    from lightning_nrml.audit import audit_scores
    from lightning_nrml.metrics import filter_quality

    is_noise = torch.from_numpy(label != clean)
    found: dict[str, dict[str, float]] = {}
    rows, given = torch.from_numpy(embedding), torch.from_numpy(label)
    for name, evidence in (("audit", "both"), ("audit_knn", "knn")):
        scores = audit_scores(rows, given, num_classes, evidence)  # type: ignore[arg-type]
        keep = ~(scores.log_p_clean.exp() < 0.5)  # what cannot be judged (NaN) is kept
        found[name] = filter_quality(keep, is_noise, scores.log_p_clean)
        found[name]["noise_rate"] = scores.noise_rate
    keep, scores_of, facts = confident_learning(embedding, label)
    for name, score in scores_of.items():
        found[name] = {**filter_quality(torch.from_numpy(keep), is_noise, torch.from_numpy(score)), **facts}
        found[name]["noise_rate"] = float((~keep).mean())
    return found


def confident_learning(
    embedding: np.ndarray, label: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, Any]]:
    """cleanlab's kept rows ``(N,)``, its scores ``(N,)`` by name, and what it was fed."""
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    strength, probability = out_of_fold(embedding, label)
    issue = find_label_issues(label, probability, n_jobs=1)
    names = {"cleanlab": "self_confidence", "cleanlab_margin": "normalized_margin"}
    scores = {
        name: get_label_quality_scores(label, probability, method=method) for name, method in names.items()
    }
    return ~issue, scores, {"strength": strength, "accuracy": float((probability.argmax(1) == label).mean())}


def out_of_fold(embedding: np.ndarray, label: np.ndarray) -> tuple[float, np.ndarray]:
    """The chosen strength and ``(N, C)`` probabilities of a cross-validated logistic regression."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    parts = list(StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(embedding, label))

    def predict(strength: float, part: int) -> np.ndarray:
        train, held_out = parts[part]
        model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=100))
        model.fit(embedding[train], label[train])
        probability = np.zeros((len(held_out), int(label.max()) + 1))
        probability[:, model.classes_] = model.predict_proba(embedding[held_out])
        return probability

    def surprise(probability: np.ndarray) -> float:
        held_out = parts[0][1]
        return float(-np.log(probability[np.arange(len(held_out)), label[held_out]].clip(1e-12)).mean())

    # the first part chooses
    tried = {strength: predict(strength, 0) for strength in STRENGTHS}
    best = min(STRENGTHS, key=lambda strength: surprise(tried[strength]))
    out = np.empty((len(label), int(label.max()) + 1))
    for part, (_, held_out) in enumerate(parts):
        out[held_out] = tried[best] if part == 0 else predict(best, part)
    return best, out
