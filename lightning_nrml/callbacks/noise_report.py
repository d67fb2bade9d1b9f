"""The label audit at the end of training, and the audit of what a datamodule serves."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_nrml import distributed
from lightning_nrml.audit import AuditData, AuditOptions, AuditResult, audit, review_marks
from lightning_nrml.audit.scores import check_classes, check_samples
from lightning_nrml.callbacks.embedding import embed
from lightning_nrml.memory import LabelLedger, SampleLedger
from lightning_nrml.modules import EmbeddingModule

_WANDB_ROWS = 100


class NoiseReport(Callback):
    """Audits the training labels at the end of ``fit``: table, corrected labels and HTML report.

    Embeds the whole training split with the evaluation view and judges every label by the other samples
    (see :mod:`lightning_nrml.audit.scores`); of multi-label data every label of every sample, given or not
    (see :mod:`lightning_nrml.audit.labels`). If a noise filter ran, the table also has its ledger and its
    score of each sample after each of the last epochs. With a W&B logger, the most suspicious samples
    (with images), the confusion (of multi-label data the extra and missing rates of each label) and the
    estimated noise rate are logged as ``audit/*``.

    Args:
        folder: where to write; default ``audit`` in the trainer's ``default_root_dir``.
        history: epochs whose scores are kept (2 bytes per sample and epoch, in checkpoints too; of
            multi-label data per label); 0 = none.
        options: see :class:`~lightning_nrml.audit.AuditOptions`.
    """

    def __init__(
        self, folder: str | None = None, history: int = 10, options: AuditOptions | None = None
    ) -> None:
        if history < 0:
            raise ValueError(f"history is {history}: give the number of epochs to keep, 0 or more.")
        self.folder, self.history = folder, history
        self.options = options or AuditOptions()
        self._epochs: dict[int, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        """Scores of the last epochs."""
        return {"epochs": dict(self._epochs)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore them."""
        self._epochs = dict(state_dict["epochs"])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be audited before hours of training, not after."""
        if stage == "fit":
            self._epochs = {}  # of an earlier fit; a resumed one gets its own from the checkpoint
            review_marks(self.options, audit_data(getattr(trainer, "datamodule", None)))
            if not callable(getattr(pl_module, "embed", None)):
                raise TypeError(
                    f"NoiseReport needs {type(pl_module).__name__}.embed(image) -> (B, D): extend "
                    "EmbeddingModule or write that method."
                )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After the last batch of an epoch (before any checkpoint) keep the filter's scores."""
        ledger = getattr(pl_module, "noise_ledger", None)
        if not trainer.is_last_batch or not self.history or not isinstance(ledger, SampleLedger):
            return
        score = ledger.label_last_score.flatten() if isinstance(ledger, LabelLedger) else ledger.last_score
        self._epochs[trainer.current_epoch] = score.detach().half().cpu()
        for old in sorted(self._epochs)[: -self.history]:
            del self._epochs[old]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Embed, judge, write, log."""
        if getattr(trainer, "fast_dev_run", False):
            return
        embedding, index = embed_training_set(trainer, pl_module)
        if trainer.is_global_zero:
            folder = Path(self.folder or Path(trainer.default_root_dir, "audit"))
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            facts = {"run": trainer.default_root_dir, "trained": f"{trainer.current_epoch} epochs"}
            columns = self._columns(pl_module)
            result = write_audit(
                embedding, index, data, folder, self.options, trainer.loggers, facts, columns
            )
            for line in summary_lines(result):
                rank_zero_info(line)
        distributed.barrier()

    def _columns(self, pl_module: LightningModule) -> dict[str, np.ndarray]:
        ledger = getattr(pl_module, "noise_ledger", None)
        if not isinstance(ledger, SampleLedger):
            return {}
        seen, dropped = ledger.seen, ledger.dropped
        if isinstance(ledger, LabelLedger):
            seen, dropped = seen.repeat_interleave(ledger.num_labels), ledger.label_dropped.flatten()
        columns = {"times_seen": seen.cpu().numpy(), "times_dropped": dropped.cpu().numpy()}
        return columns | {f"epoch_{e}": self._epochs[e].float().numpy() for e in sorted(self._epochs)}


@torch.no_grad()
def embed_training_set(trainer: Trainer, pl_module: LightningModule) -> tuple[Tensor, Tensor]:
    """``(N, D)`` embeddings of the train split as evaluation sees it, and their ``(N,)`` indices; all ranks.

    Samples whose image cannot be read are left out.
    """
    datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
    training, device = pl_module.training, pl_module.device
    pl_module.eval()
    rows, index = [], []
    for batch in datamodule.embed_dataloader():
        batch = {key: value.to(device) for key, value in batch.items()}
        batch = datamodule.apply_views(batch, training=False)
        if isinstance(pl_module, EmbeddingModule):
            with trainer.precision_plugin.forward_context():
                z = pl_module.predict_step(batch, 0)["embedding"].float()
        else:
            z = embed(trainer, pl_module, batch["image"])
        rows.append(z)
        index.append(batch["index"])
    pl_module.train(training)
    embedding, _ = distributed.gather_ragged(torch.cat(rows))
    where, _ = distributed.gather_ragged(torch.cat(index))
    order = where.argsort()
    return embedding[order], where[order]


def audit_data(datamodule: Any) -> AuditData:
    """What an audit needs to know, from a datamodule.

    Raises:
        TypeError: it has no train labels or no ``embed_dataloader``.
        ValueError: it has fewer than two classes, or fewer samples than an audit has folds.
    """
    label = getattr(datamodule, "train_label", None)
    if not isinstance(label, Tensor) or not hasattr(datamodule, "embed_dataloader"):
        raise TypeError(
            f"the audit needs a datamodule of lightning_nrml (or one with train_label and embed_dataloader), "
            f"not {type(datamodule).__name__}."
        )
    check_samples(len(label))
    if label.ndim == 1:
        check_classes(datamodule.num_classes)
    images = datamodule.splits.train.images
    return AuditData(
        label,
        datamodule.num_classes,
        datamodule.class_names,
        datamodule.train_paths,
        datamodule.train_clean_label,
        lambda rows: images.pictures(rows.tolist()).numpy(),
    )


def write_audit(
    embedding: Tensor,
    index: Tensor,
    datamodule: Any,
    folder: Path,
    options: AuditOptions,
    loggers: Iterable[Logger] = (),
    facts: dict[str, str] | None = None,
    extra: dict[str, np.ndarray] | None = None,
) -> AuditResult:
    """Audit, and log to W&B if that is a logger of the run."""
    data = audit_data(datamodule)
    shown = {"data": type(datamodule).__name__, **(facts or {})}
    result = audit(embedding, data, folder, options, shown, extra, index)
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            log_to_wandb(logger, result, data)
    return result


def summary_lines(result: AuditResult) -> list[str]:
    """What was found, for a person."""
    action = result.corrected["action"].value_counts()
    done = ", ".join(f"{action[a]} {a}" for a in ("kept", "relabelled", "dropped") if a in action)
    if result.rates is not None and "dropped" in action:
        done += " (they stay as given, named under 'doubted')"
    whole = "and" if result.rates is None else "all labels:"
    lines = [
        f"Label audit: an estimated {result.noise_rate:.1%} of {len(result.table)} labels are wrong",
        f"report           {result.files['report']}",
        f"audit table      {result.files['table']} ({whole} .parquet)",
        f"corrected labels {result.files['corrected']} (and .parquet): {done}",
    ]
    if result.rates is not None:
        lines.insert(3, f"rates by label   {result.files['rates']}")
    return lines


def log_to_wandb(logger: WandbLogger, result: AuditResult, data: AuditData) -> None:
    """``audit/suspects`` (table with images), ``audit/confusion`` and ``audit/noise_rate``.

    Of multi-label data ``audit/label_rates`` instead of the confusion: what is extra and missing by label.
    """
    import wandb

    # what was not judged may have no image
    top = result.table[result.table["log_p_clean"].notna()].head(_WANDB_ROWS)
    names = [c for c in top.columns if not c.startswith("epoch_")]
    columns, rows = list(names), top[names].to_numpy(dtype=object).tolist()
    if data.images is not None:
        pixels = data.images(top["sample" if "sample" in top else "index"].to_numpy(copy=True))
        columns = ["image", *names]
        bands = pixels[:, :1] if pixels.shape[1] < 3 else pixels[:, :3]
        rows = [
            [wandb.Image(np.ascontiguousarray(image.transpose(1, 2, 0))), *row]
            for image, row in zip(bands, rows, strict=True)
        ]
    if result.rates is None:
        judged = result.table[result.table["suggested_label"] >= 0]
        differ = judged[judged["suggested_label"] != judged["label"]]
        pairs = differ.groupby(["label", "suggested_label"]).size().reset_index(name="count")
        overview = {"audit/confusion": pairs.sort_values("count", ascending=False).head(1000)}
    else:
        overview = {"audit/label_rates": result.rates}
    logger.experiment.log(
        {
            "audit/suspects": wandb.Table(columns=columns, data=rows),
            **{name: wandb.Table(dataframe=frame) for name, frame in overview.items()},
            "audit/noise_rate": result.noise_rate,
        }
    )
