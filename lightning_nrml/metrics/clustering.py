"""Agreement of k-means clusters with the classes."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_nrml.metrics.search import prepare_rows


def nmi_ami(embedding: Tensor, label: Tensor, seed: int = 0, iterations: int = 20) -> dict[str, float]:
    """Normalised and adjusted mutual information between classes and k-means clusters.

    As many clusters as classes; faiss' k-means with L2 distance on unit rows (so nearest centre means
    largest cosine up to the centre's length), every row used, one start. Both scores use the arithmetic
    mean of the two entropies, as scikit-learn does. They depend on the seed: compare equal seeds only.

    Args:
        embedding: ``(N, D)`` rows of any length.
        label: ``(N,)`` integer class ids.
        seed: seed of the k-means start.
        iterations: k-means iterations.

    Returns:
        ``nmi`` in [0, 1], and ``ami``, which is about 0 for random clusters and 1 for perfect ones.

    Raises:
        ValueError: for shapes that do not fit, no rows, or NaN/infinite rows.
    """
    if embedding.ndim != 2 or label.shape != embedding.shape[:1] or not len(label):
        raise ValueError(
            f"embedding must be (N, D) with N >= 1 and label (N,), got {tuple(embedding.shape)} and "
            f"{tuple(label.shape)}."
        )
    import faiss
    from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score

    rows = prepare_rows(embedding).float().cpu().contiguous().numpy()
    classes, truth = label.cpu().unique(return_inverse=True)
    # no subsampling of large sets, no warning about small clusters
    kmeans = faiss.Kmeans(
        rows.shape[1],
        len(classes),
        niter=iterations,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=len(rows),
    )
    kmeans.train(rows)
    cluster = torch.from_numpy(kmeans.index.search(rows, 1)[1]).flatten()
    return {
        "nmi": float(normalized_mutual_info_score(truth.numpy(), cluster.numpy())),
        "ami": float(adjusted_mutual_info_score(truth.numpy(), cluster.numpy())),
    }
