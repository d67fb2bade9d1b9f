"""One thin callback per filter, so that YAML and ``--help`` stay flat."""

from __future__ import annotations

from typing import Any, Literal

from lightning_nrml import filters
from lightning_nrml.callbacks.noise_filter import NoiseFilterCallback, RunSizes


class PRISM(NoiseFilterCallback):
    """Probabilistic ranking-based instance selection while training.

    Liu et al., CVPR 2021, arXiv 2103.16047 (``similarity="avg"``) and arXiv 2108.01431 (``"vmf"``).

    Args:
        noise_rate: assumed share of wrong labels, in [0, 1).
        memory_size: rows of the filter's memory; 0 = as many as training samples.
        window: batches over which the threshold is averaged; 1 gives TRM.
        similarity: ``avg`` (mean cosine) or ``vmf`` (von Mises-Fisher likelihood).
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
        similarity: Literal["avg", "vmf"] = "avg",
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


class Consensus(NoiseFilterCallback):
    """A classifier and a memory judge each label, sample by sample, over the whole run; our own method.

    Needs no noise rate, and estimates one (``noise/rate``). See :class:`lightning_nrml.filters.Consensus`.

    Args:
        warmup_steps: steps in which everything is kept while evidence gathers.
        smoothing: weight in [0, 1) of earlier opinions on a sample.
        classifier: ``side`` trains a softmax regression on detached embeddings; ``logits`` takes the
            module's own classifier.
        kwargs: schedule, see :class:`NoiseFilterCallback`.
    """

    def __init__(
        self,
        warmup_steps: int = 150,
        smoothing: float = 0.6,
        classifier: Literal["side", "logits"] = "side",
        **kwargs: Any,
    ) -> None:
        super().__init__(filter=None, **kwargs)
        self.options = {"warmup_steps": warmup_steps, "smoothing": smoothing, "classifier": classifier}

    def make_filter(self, sizes: RunSizes) -> filters.NoiseFilter:
        """Size the filter for this run."""
        return filters.Consensus(
            sizes.num_classes, sizes.embedding_dim, sizes.num_samples, **self.options
        )


class KnownClean(NoiseFilterCallback):
    """Upper bound of every filter: drops exactly the samples whose given label is known to be wrong.

    For benchmarks only: it reads the datamodule's clean labels.

    Args:
        kwargs: schedule, see :class:`NoiseFilterCallback`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(filter=None, **kwargs)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Build the mask from ``datamodule.train_is_noise``."""
        if stage == "fit" and self.filter is None:
            noise = getattr(trainer.datamodule, "train_is_noise", None)
            if noise is None:
                raise ValueError("KnownClean needs a datamodule that knows which labels are wrong.")
            self.filter = filters.FixedFilter(~noise)
        super().setup(trainer, pl_module, stage)
