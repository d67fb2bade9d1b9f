"""k-nearest-neighbour accuracy while a representation is trained."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_nrml import distributed
from lightning_nrml.callbacks.embedding import (
    LABEL_KEY,
    LabelName,
    check_same_classes,
    embed_train_set,
    embedding_of,
    is_due,
    labels_of,
    size_of,
)
from lightning_nrml.callbacks.evaluator import SplitCallback
from lightning_nrml.filters.chain import gathered_context, tolerate_absent_filters
from lightning_nrml.memory import FeatureBank
from lightning_nrml.metrics import KNNClassifier, TopKAccuracy

Mode = Literal["exact", "running"]


class OnlineKNN(SplitCallback):
    """Logs ``val/knn_top1`` (and ``val/knn_top5`` above five classes) of the weighted kNN classifier.

    The bank is the train split, the queries are the images of the validation (or test) split. Needs no
    training of its own; also runs in ``validate`` and ``test``, that is on any checkpoint.
    Source: Wu et al., CVPR 2018, section 3.4, with the k and temperature of DINO (arXiv 2104.14294).

    ``mode="exact"``: before each validation the whole train split is embedded without augmentation, in
    eval mode, on all ranks together. Costs a forward pass over the train split.
    ``mode="running"``: the bank holds the embeddings that training made in the newest epoch, augmented
    and from weights that have moved since: free, but lower than ``exact``. It is kept as
    ``pl_module.knn_bank`` and saved in checkpoints, so that resuming and ``validate`` find it.

    **The bank votes with the labels as given, noise included**, unless ``label="clean"``. The queries'
    labels are those of the evaluated split, which this package keeps clean.

    Args:
        k: neighbours that vote.
        temperature: each votes with weight exp(cosine / temperature).
        every_n_epochs: validation epochs between two evaluations; the last epoch always counts.
        mode: see above.
        label: ``"given"`` or ``"clean"`` labels of the bank (for measurement where the truth is known).
    """

    def __init__(
        self,
        k: int = 20,
        temperature: float = 0.07,
        every_n_epochs: int = 1,
        mode: Mode = "exact",
        label: LabelName = "given",
    ) -> None:
        KNNClassifier(k, temperature)  # refuses bad values now, not after an epoch
        if mode not in ("exact", "running"):
            raise ValueError(f"mode is '{mode}': choose 'exact' or 'running'.")
        if label not in LABEL_KEY:
            raise ValueError(f"label is '{label}': choose 'given' or 'clean'.")
        super().__init__(every_n_epochs)
        self.k, self.temperature = k, temperature
        self.mode: Mode = mode
        self.label: LabelName = label
        self._knn: KNNClassifier | None = None
        self._accuracy = TopKAccuracy()
        self._num_classes = 0

    # ---- the bank ---------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the data; in running mode attach the bank before a checkpoint is restored.

        A fit starts with an empty one: rows of an earlier fit are of other weights, and older than their
        epochs say.
        """
        tolerate_absent_filters(pl_module)
        check_same_classes(trainer, "OnlineKNN")
        data = getattr(trainer, "datamodule", None)
        self._num_classes = size_of("num_classes", "OnlineKNN", data, pl_module)
        if self.mode == "exact":
            if not hasattr(data, "embed_dataloader"):
                raise TypeError(
                    "OnlineKNN(mode='exact') needs a datamodule with `embed_dataloader()` (all datamodules "
                    "of lightning_nrml have one); use mode='running' with this one."
                )
            return
        if stage == "fit" or getattr(pl_module, "knn_bank", None) is None:
            samples = size_of("num_train_samples", "OnlineKNN(mode='running')", data, pl_module)
            bank = FeatureBank(
                samples, size_of("embedding_dim", "OnlineKNN(mode='running')", pl_module, data)
            )
            bank.register_buffer("label", torch.full((samples,), -1))
            pl_module.knn_bank = bank
        distributed.exempt_from_ddp_sync(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Running mode: keep the embeddings of this batch, of all ranks."""
        if self.mode == "exact":
            return
        if not isinstance(outputs, dict) or "embedding" not in outputs:
            raise TypeError(
                f"OnlineKNN(mode='running') reads the 'embedding' that training_step returns, but "
                f"{type(pl_module).__name__} returns none: return it, or use mode='exact'."
            )
        ctx, _ = gathered_context(
            embedding=outputs["embedding"],
            label=labels_of(batch, self.label, "OnlineKNN"),
            index=batch["index"],
        )
        bank = cast(FeatureBank, pl_module.knn_bank)
        bank.write(ctx.index, ctx.embedding, trainer.current_epoch)
        cast(Tensor, bank.label).index_copy_(0, ctx.index, ctx.label)

    def _fit_bank(self, trainer: Trainer, pl_module: LightningModule) -> KNNClassifier | None:
        """The classifier over the bank; ``None`` while it is empty."""
        if self.mode == "exact":
            rows, label = embed_train_set(trainer, pl_module, self.label, "OnlineKNN")
        else:
            bank = cast(FeatureBank, pl_module.knn_bank)
            newest = bank.filled & (bank.epoch_seen == bank.epoch_seen.max())
            rows, label = bank.embedding[newest], cast(Tensor, bank.label)[newest]
        known = label >= 0  # a clean label may be "none of the classes"
        if not bool(known.any()):
            return None
        return KNNClassifier(self.k, self.temperature).fit(rows[known], label[known])

    # ---- evaluation -------------------------------------------------------------------------------

    def begin(self, trainer: Trainer, pl_module: LightningModule, prefix: str) -> None:
        """Make the bank, if this epoch counts."""
        self._knn = self._fit_bank(trainer, pl_module) if is_due(trainer, self.every_n_epochs) else None
        self._accuracy.to(pl_module.device).reset()

    def update(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        """Classify one batch."""
        if self._knn is None:
            return
        label = labels_of(batch, "given", "OnlineKNN")
        shares = self._knn.predict_scores(embedding_of(trainer, pl_module, outputs, batch))[1]
        assert self._knn.classes is not None
        # a class without a vote is no answer, not even the fifth
        score = shares.new_full((len(shares), self._num_classes), -torch.inf)
        score[:, self._knn.classes] = shares.masked_fill(shares == 0, -torch.inf)
        self._accuracy.update(score, label)

    def finish(self, trainer: Trainer, pl_module: LightningModule, prefix: str) -> None:
        """Log ``val/knn_*`` or ``test/knn_*``."""
        if self._knn is None:
            return
        self._knn = None
        for key, value in self._accuracy.compute().items():
            pl_module.log(f"{prefix}/knn_{key}", value, prog_bar=key == "top1", sync_dist=True)
