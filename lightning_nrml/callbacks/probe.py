"""A linear classifier trained beside a representation, to see what it has learnt."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from lightning_nrml import distributed
from lightning_nrml.callbacks.embedding import (
    LABEL_KEY,
    LabelName,
    check_same_classes,
    embedding_of,
    is_due,
    labels_of,
    size_of,
)
from lightning_nrml.callbacks.evaluator import SplitCallback
from lightning_nrml.filters.chain import tolerate_absent_filters
from lightning_nrml.metrics import TopKAccuracy
from lightning_nrml.optim import OptimizerConfig, create_optimizer


class ProbeHead(nn.Module):
    """Zero-initialised linear classifier on unit rows, scaled to a root mean square of 1.

    Training and evaluation then see the same scale whether or not a module normalises its embeddings.
    Its parameters do not require gradients, so that no optimiser, gradient clipping or DDP of the
    module it sits in ever touches them; :meth:`gradient` computes theirs.

    Args:
        dim: columns of the embedding.
        num_classes: classes.
    """

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        # not nn.Linear: its random start would draw from the generator that the training uses
        self.weight = nn.Parameter(torch.zeros(num_classes, dim), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(num_classes), requires_grad=False)
        self.register_load_state_dict_pre_hook(_start_fresh_if_absent)

    def forward(self, embedding: Tensor) -> Tensor:
        """``(B, dim)`` rows of any length -> ``(B, num_classes)`` float32 logits."""
        return self._logits(embedding, self.weight.float(), self.bias.float())

    @staticmethod
    def _logits(embedding: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with torch.autocast(embedding.device.type, enabled=False):
            x = F.normalize(embedding.detach().float(), dim=1) * math.sqrt(weight.shape[1])
            return F.linear(x, weight, bias)

    def gradient(self, embedding: Tensor, label: Tensor) -> Tensor:
        """Put the gradient of the mean cross-entropy over the rows of *all ranks* into ``.grad``.

        Ranks may hold unequal numbers of rows; rows with a negative label are left out.

        Args:
            embedding: ``(B, dim)`` rows of this rank.
            label: ``(B,)`` int64.

        Returns:
            The mean cross-entropy over all ranks, 0-d.
        """
        with torch.enable_grad():
            weight = self.weight.detach().float().requires_grad_()
            bias = self.bias.detach().float().requires_grad_()
            logits = self._logits(embedding, weight, bias)
            loss = F.cross_entropy(logits, label.clamp(min=-1), ignore_index=-1, reduction="sum")
            parts = torch.autograd.grad(loss, (weight, bias))
        count = (label >= 0).sum().float()
        own = torch.cat([parts[0].flatten(), parts[1], torch.stack([loss.detach(), count])])
        total = distributed.reduce_sum(own)
        mean = total[:-1] / total[-1].clamp_min(1)
        size = self.weight.numel()
        self.weight.grad = mean[:size].view_as(self.weight).to(self.weight.dtype)
        self.bias.grad = mean[size:-1].to(self.bias.dtype)
        return mean[-1]


def _start_fresh_if_absent(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A checkpoint from a run without the probe loads: the probe keeps its present weights."""
    absent = {prefix + name: p for name, p in module.state_dict().items() if prefix + name not in state}
    if absent:
        rank_zero_warn("The checkpoint holds no online linear probe: it starts from zero.")
        state.update(absent)


class OnlineLinearProbe(SplitCallback):
    """Trains a linear classifier on the detached embeddings of every batch; logs ``val/probe_top1``.

    Reads the ``embedding`` that ``training_step`` returns (for our self-supervised modules the
    backbone's features), so it costs one matrix product a step. It never changes the training it
    watches, not by a bit: no gradient flows back, the module's optimiser does not see its weights and
    no random number is drawn. The classifier is ``pl_module.probes["linear"]`` and its optimiser belongs
    to this callback; both are in the checkpoint. Takes one step per batch, also under gradient
    accumulation, and looks at all rows, also those that a noise filter drops.

    It learns from the labels as given, noise included, unless ``label="clean"``. Online accuracy is a
    monitor: for the number to report, train :class:`~lightning_nrml.modules.LinearProbe`.

    Args:
        optimizer: optimiser settings, at a constant rate; default Adam, 1e-2 without weight decay.
        label: ``"given"`` or ``"clean"`` training labels.
        every_n_epochs: validation epochs between two evaluations; the last epoch always counts.
    """

    def __init__(
        self,
        optimizer: OptimizerConfig | None = None,
        label: LabelName = "given",
        every_n_epochs: int = 1,
    ) -> None:
        if label not in LABEL_KEY:
            raise ValueError(f"label is '{label}': choose 'given' or 'clean'.")
        super().__init__(every_n_epochs)
        self.config = optimizer or OptimizerConfig("adam", lr=1e-2, weight_decay=0.0)
        self.label: LabelName = label
        self._optimizer: Optimizer | None = None
        self._restored: dict[str, Any] | None = None
        self._accuracy = TopKAccuracy()
        self._active = False

    # ---- state --------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Attach the classifier before the checkpoint is restored, in evaluation too."""
        self._restored = None  # an evaluation has restored it as well, but only a fit uses it up
        tolerate_absent_filters(pl_module)
        check_same_classes(trainer, "OnlineLinearProbe")
        data = getattr(trainer, "datamodule", None)
        dim = size_of("embedding_dim", "OnlineLinearProbe", pl_module)
        classes = size_of("num_classes", "OnlineLinearProbe", data, pl_module)
        if getattr(pl_module, "probes", None) is None:
            pl_module.probes = nn.ModuleDict()
        probes = cast(nn.ModuleDict, pl_module.probes)
        if "linear" not in probes or cast(ProbeHead, probes["linear"]).weight.shape != (classes, dim):
            probes["linear"] = ProbeHead(dim, classes).to(pl_module.device)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the optimiser, now that the weights are where they stay."""
        head = _head(pl_module).requires_grad_(True)  # the factory takes trainable parameters only
        self._optimizer = create_optimizer(self.config, head)
        head.requires_grad_(False)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue a restored optimiser."""
        if self._restored is not None:
            assert self._optimizer is not None
            self._optimizer.load_state_dict(self._restored)
            self._restored = None

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's state."""
        return {} if self._optimizer is None else {"optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until :meth:`on_train_start`: most strategies restore before the optimiser exists."""
        self._restored = state_dict.get("optimizer")

    # ---- training -----------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """One step of the classifier (before any checkpoint of this step is written)."""
        if not isinstance(outputs, dict) or "embedding" not in outputs:
            raise TypeError(
                "OnlineLinearProbe reads the 'embedding' that training_step returns, but "
                f"{type(pl_module).__name__} returns none: return {{'loss': ..., 'embedding': ...}}."
            )
        assert self._optimizer is not None
        label = labels_of(batch, self.label, "OnlineLinearProbe")
        loss = _head(pl_module).gradient(outputs["embedding"], label)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        pl_module.log("train/probe_loss", loss, batch_size=len(label))

    # ---- evaluation ---------------------------------------------------------------------------------

    def begin(self, trainer: Trainer, pl_module: LightningModule, prefix: str) -> None:
        """Start counting, if this epoch counts."""
        # zero weights: a checkpoint without a probe, about which there is nothing to say
        self._active = is_due(trainer, self.every_n_epochs) and bool(_head(pl_module).weight.any())
        self._accuracy.to(pl_module.device).reset()

    def update(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        """Classify one batch."""
        if self._active:
            embedding = embedding_of(trainer, pl_module, outputs, batch)
            label = labels_of(batch, "given", "OnlineLinearProbe")
            self._accuracy.update(_head(pl_module)(embedding), label)

    def finish(self, trainer: Trainer, pl_module: LightningModule, prefix: str) -> None:
        """Log ``val/probe_*`` or ``test/probe_*``."""
        if self._active:
            for key, value in self._accuracy.compute().items():
                pl_module.log(f"{prefix}/probe_{key}", value, prog_bar=key == "top1", sync_dist=True)


def _head(pl_module: LightningModule) -> ProbeHead:
    return cast(ProbeHead, cast(nn.ModuleDict, pl_module.probes)["linear"])
