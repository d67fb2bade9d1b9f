"""Multi-label evaluation on the validation and test splits."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_nrml.callbacks.evaluator import SplitEvaluator
from lightning_nrml.metrics import MultiLabelMetrics
from lightning_nrml.modules.two_networks import TwoNetworks

MONITORS = ("map_macro", "map_micro", "f1_macro", "f1_micro")


class MultiLabelEvaluator(SplitEvaluator):
    """Logs mAP, F1 and the calibration gap of every validation and test run.

    Keys as in :func:`~lightning_nrml.metrics.multilabel_metrics`: ``val/map_macro``, ``val/map_micro``,
    ``val/f1_macro``, ``val/f1_micro``, ``val/calibration_gap``, ..., and ``val/ap/<label>`` with
    ``per_class``. In a fit every validation finds the threshold of each class with the best F1; a test run
    with the checkpoint applies them (``test/f1_macro_tuned``, ``test/f1_micro_tuned``). Where the test split
    serves for validation, none are looked for and the tuned F1 are left out. Reads ``probability`` of the
    module's evaluation step. Absent classes are left out of the macro means. Of two networks
    ``val/map_micro_1`` and ``val/map_micro_2`` are logged, too.

    Args:
        threshold: of the F1.
        monitor: key that decides which epoch was best.
        per_class: also log the AP of every class.
        every_n_epochs: validation epochs between two evaluations; the last epoch always counts.
    """

    def __init__(
        self,
        threshold: float = 0.5,
        monitor: str = "map_macro",
        per_class: bool = False,
        every_n_epochs: int = 1,
    ) -> None:
        super().__init__(monitor, every_n_epochs)
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold must lie in [0, 1], got {threshold}.")
        if monitor not in MONITORS:
            raise ValueError(f"monitor is '{monitor}': choose one of {', '.join(MONITORS)}.")
        self.threshold, self.per_class = threshold, per_class
        self.class_threshold: Tensor | None = None
        self._tune = True
        self._names: list[str] = []
        self._single: dict[str, MultiLabelMetrics] = {}

    def state_dict(self) -> dict[str, Any]:
        """As in the base class, and the thresholds of the last validation."""
        thresholds = None if self.class_threshold is None else self.class_threshold.tolist()
        return {**super().state_dict(), "class_threshold": thresholds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore values and thresholds, the latter in a test run, too: it applies them."""
        super().load_state_dict(state_dict)
        saved = state_dict["class_threshold"]
        self.class_threshold = None if saved is None else torch.tensor(saved)

    def make_metric(self, trainer: Trainer, pl_module: LightningModule, prefix: str) -> MultiLabelMetrics:
        """Metrics of as many labels as the module has; the test split gets the tuned thresholds."""
        labels = getattr(pl_module, "num_classes", None)
        if not isinstance(labels, int):
            raise TypeError(
                f"{type(pl_module).__name__} has no int attribute `num_classes`, which this callback needs."
            )
        data = getattr(trainer, "datamodule", None)
        names = getattr(data, "class_names", None)
        self._names = list(names) if names is not None else [str(i) for i in range(labels)]
        self._tune = prefix == "val" and not getattr(data, "validates_on_test", False)
        if self._fitting and not self._tune:
            self.class_threshold = None  # of an earlier fit
        tuned = self.class_threshold if prefix == "test" else None
        if prefix == "test" and tuned is None:
            rank_zero_info(
                "test/f1_macro_tuned and test/f1_micro_tuned are left out: their thresholds come from a "
                "validation split apart from the test split, and this run or checkpoint had none."
            )
        networks = ("1", "2") if isinstance(pl_module, TwoNetworks) else ()
        self._single = {name: MultiLabelMetrics(labels).to(pl_module.device) for name in networks}
        return MultiLabelMetrics(labels, self.threshold, tuned)

    def collect(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        """Probabilities of one batch."""
        if not isinstance(outputs, dict) or "probability" not in outputs:
            raise TypeError(
                f"{type(pl_module).__name__} returns no 'probability' from its evaluation step, which "
                "MultiLabelEvaluator reads; use MultiLabel, JoCoR or RCML, or return it."
            )
        self._metric.update(outputs["probability"], batch["label"], batch["index"])
        for name, metric in self._single.items():
            metric.update(outputs[f"probability_{name}"], batch["label"], batch["index"])

    def results(self, values: dict[str, Any], prefix: str) -> dict[str, float]:
        """The scalars, and the AP of the classes if wanted."""
        if self._tune:
            self.class_threshold = values["best_threshold"].cpu()
        found = {k: v for k, v in values.items() if isinstance(v, float)}
        if self.per_class:
            found |= {f"ap/{name}": float(v) for name, v in zip(self._names, values["ap"], strict=True)}
        return found | {f"map_micro_{name}": m.compute()["map_micro"] for name, m in self._single.items()}
