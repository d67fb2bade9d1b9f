"""One thin callback per filter, so that YAML and ``--help`` stay flat."""

from __future__ import annotations

from typing import Any, Literal

from lightning_nrml import filters
from lightning_nrml.callbacks.noise_filter import NoiseFilterCallback
from lightning_nrml.callbacks.run_sizes import RunSizes


class PRISM(NoiseFilterCallback):
    """Probabilistic ranking-based instance selection while training.

    Liu et al., CVPR 2021, arXiv 2103.16047 (``similarity="avg"``) and arXiv 2108.01431 (``"vmf"``).

    Args:
        noise_rate: assumed share of wrong labels, in [0, 1).
        memory_size: rows of the filter's memory; 0 = as many as training samples.
        window: batches over which the threshold is averaged; 1 gives TRM.
        similarity: ``avg`` (mean cosine), ``vmf`` (von Mises-Fisher likelihood) or ``proxy`` (the class
            weights of the loss in the place of the memory's centres).
        warmup_steps: steps in which everything is kept while the memory fills.
        count_empty_classes: count classes without a centre in the softmax, as the official code does.
        shared_kappa: one concentration for all classes instead of one each (``vmf`` only).
        kwargs: schedule, see :class:`NoiseFilterCallback`.
    """

    def __init__(
        self,
        noise_rate: float = 0.5,
        memory_size: int = 0,
        window: int = 30,
        similarity: Literal["avg", "vmf", "proxy"] = "avg",
        warmup_steps: int = 0,
        count_empty_classes: bool = False,
        shared_kappa: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(filter=None, **kwargs)
        self.options: dict[str, Any] = {
            "noise_rate": noise_rate,
            "memory_size": memory_size,
            "window": window,
            "similarity": similarity,
            "warmup_steps": warmup_steps,
            "count_empty_classes": count_empty_classes,
            "shared_kappa": shared_kappa,
        }

    def make_filter(self, sizes: RunSizes) -> filters.NoiseFilter:
        """Size the filter for this run."""
        size = self.options["memory_size"] or sizes.num_samples
        return filters.PRISM(sizes.num_classes, sizes.embedding_dim, **{**self.options, "memory_size": size})


class BARE(NoiseFilterCallback):
    """Keeps the samples whose posterior stands out from the batch's own statistics of their class.

    Patel & Sastry, WACV 2023, arXiv 2106.15292. Needs no noise rate.

    Args:
        k: deviations above the mean of the class's posterior; smaller keeps more.
        posterior: ``logits`` (a loss with classes, such as CosineSoftmaxLoss) or ``centers`` (class centres
            of a memory, for any loss).
        memory_size: rows of that memory; 0 = as many as training samples.
        scale: inverse temperature of the cosines to the centres.
        kwargs: schedule, see :class:`NoiseFilterCallback`.
    """

    def __init__(
        self,
        k: float = 1.0,
        posterior: Literal["logits", "centers"] = "logits",
        memory_size: int = 0,
        scale: float = 16.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(filter=None, **kwargs)
        self.options: dict[str, Any] = {"k": k, "posterior": posterior, "scale": scale}
        self.memory_size = memory_size

    def make_filter(self, sizes: RunSizes) -> filters.NoiseFilter:
        """Size the filter for this run."""
        if self.options["posterior"] == "logits":
            return filters.BARE(**self.options)
        return filters.BARE(
            **self.options,
            num_classes=sizes.num_classes,
            embedding_dim=sizes.embedding_dim,
            memory_size=self.memory_size or sizes.num_samples,
        )


class SmallLoss(NoiseFilterCallback):
    """Keeps the share of each batch that has the smallest loss, as co-teaching does.

    Han et al., NeurIPS 2018, arXiv 1804.06872, with one net.

    Args:
        noise_rate: share of each batch to drop, in [0, 1).
        ramp_epochs: epochs over which that share rises linearly from 0.
        kwargs: schedule, see :class:`NoiseFilterCallback`.
    """

    def __init__(self, noise_rate: float = 0.5, ramp_epochs: int = 10, **kwargs: Any) -> None:
        super().__init__(filter=None, ramp_epochs=ramp_epochs, **kwargs)
        self.noise_rate = noise_rate

    def make_filter(self, sizes: RunSizes) -> filters.NoiseFilter:
        """The filter needs no sizes."""
        return filters.SmallLoss(self.noise_rate)


class LossQuantile(NoiseFilterCallback):
    """Drops the samples whose loss is above a quantile, averaged over the last batches.

    Args:
        noise_rate: assumed share of wrong labels, in [0, 1).
        window: batches over which the quantile is averaged.
        kwargs: schedule, see :class:`NoiseFilterCallback`.
    """

    def __init__(self, noise_rate: float = 0.5, window: int = 30, **kwargs: Any) -> None:
        super().__init__(filter=None, **kwargs)
        self.options: dict[str, Any] = {"noise_rate": noise_rate, "window": window}

    def make_filter(self, sizes: RunSizes) -> filters.NoiseFilter:
        """The filter needs no sizes."""
        return filters.LossQuantile(**self.options)


class KNNVote(NoiseFilterCallback):
    """Judges a label by the share of the nearest features of earlier batches that carry it.

    Args:
        k: voters per sample.
        noise_rate: assumed share of wrong labels, in [0, 1); used unless ``threshold`` is given.
        threshold: keep samples of a (smoothed) share above this value in (0, 1).
        memory_size: rows of the filter's memory; 0 = as many as training samples.
        window: batches over which the quantile is averaged.
        warmup_steps: steps in which everything is kept while the memory fills.
        smoothing: votes that are spread over all classes beforehand.
        kwargs: schedule, see :class:`NoiseFilterCallback`.
    """

    def __init__(
        self,
        k: int = 20,
        noise_rate: float = 0.5,
        threshold: float | None = None,
        memory_size: int = 0,
        window: int = 30,
        warmup_steps: int = 0,
        smoothing: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(filter=None, **kwargs)
        self.options: dict[str, Any] = {
            "k": k,
            "noise_rate": noise_rate,
            "threshold": threshold,
            "memory_size": memory_size,
            "window": window,
            "warmup_steps": warmup_steps,
            "smoothing": smoothing,
        }

    def make_filter(self, sizes: RunSizes) -> filters.NoiseFilter:
        """Size the filter for this run."""
        size = self.options["memory_size"] or sizes.num_samples
        return filters.KNNVote(
            sizes.num_classes, sizes.embedding_dim, **{**self.options, "memory_size": size}
        )


class Consensus(NoiseFilterCallback):
    """Memory and classifiers judge each label, sample by sample, over the whole run; our own method.

    Needs no noise rate, and estimates one. See :class:`lightning_nrml.filters.Consensus`.

    Args:
        warmup_steps: steps in which everything is kept while evidence gathers.
        smoothing: weight in [0, 1) of earlier opinions on a sample.
        noise_rate: share of wrong labels in [0, 1), if it is known; ``null`` = find it. Worth saying where
            people made the mistakes: those look too much like right labels to be counted.
        kwargs: schedule, see :class:`NoiseFilterCallback`.
    """

    def __init__(
        self,
        warmup_steps: int = 150,
        smoothing: float = 0.7,
        noise_rate: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(filter=None, **kwargs)
        self.options: dict[str, Any] = {
            "warmup_steps": warmup_steps,
            "smoothing": smoothing,
            "noise_rate": noise_rate,
        }

    def make_filter(self, sizes: RunSizes) -> filters.NoiseFilter:
        """Size the filter for this run."""
        return filters.Consensus(sizes.num_classes, sizes.embedding_dim, sizes.num_samples, **self.options)


class MultiLabelPRISM(NoiseFilterCallback):
    """Weighs every label of multi-label samples by how probably it is right; our own method.

    Finds extra and missing labels, needs no noise rate and estimates those of each label. See
    :class:`lightning_nrml.filters.MultiLabelPRISM`.

    Args:
        judges: ``both``, ``classifier`` (the module's logits) or ``memory`` (of embeddings).
        memory_size: slots of the memory; 0 = as many as training samples.
        warmup_steps: steps in which everything is kept while evidence gathers.
        smoothing: weight in [0, 1) of earlier opinions on a label.
        weighting: ``soft`` (the probability that the label is right) or ``hard`` (0 or 1).
        noise_rate: assumed share of extra labels among the given ones of each label, and as many missing
            ones; ``null`` = estimated.
        kwargs: schedule, see :class:`NoiseFilterCallback`; ``granularity`` must be ``batch``.
    """

    def __init__(
        self,
        judges: Literal["both", "classifier", "memory"] = "both",
        memory_size: int = 0,
        warmup_steps: int = 240,
        smoothing: float = 0.7,
        weighting: Literal["soft", "hard"] = "soft",
        noise_rate: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(filter=None, **kwargs)
        self.options: dict[str, Any] = {
            "judges": judges,
            "memory_size": memory_size,
            "warmup_steps": warmup_steps,
            "smoothing": smoothing,
            "weighting": weighting,
            "noise_rate": noise_rate,
        }

    def make_filter(self, sizes: RunSizes) -> filters.NoiseFilter:
        """Size the filter for this run."""
        labels = sizes.num_labels or sizes.num_classes
        return filters.MultiLabelPRISM(labels, sizes.embedding_dim, sizes.num_samples, **self.options)


class KnownClean(NoiseFilterCallback):
    """Upper bound of every filter: drops exactly the samples whose given label is known to be wrong.

    For benchmarks only: it reads the datamodule's clean labels.

    Args:
        kwargs: schedule, see :class:`NoiseFilterCallback`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(filter=None, **kwargs)

    def make_filter(self, sizes: RunSizes) -> filters.NoiseFilter:
        """The mask of this run's data, from ``datamodule.train_is_noise``."""
        noise = getattr(sizes.data, "train_is_noise", None)
        if noise is None:
            raise ValueError("KnownClean needs a datamodule that knows which labels are wrong.")
        return filters.FixedFilter(~noise)
