"""The smallest model, data and callback that the command line can drive."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset


@dataclass
class Rule:
    lr: float = 0.1


class TinyModule(LightningModule):
    def __init__(
        self, num_classes: int, in_channels: int = 3, embedding_dim: int = 8, rule: Rule | None = None
    ):
        super().__init__()
        self.num_classes, self.in_channels, self.embedding_dim = num_classes, in_channels, embedding_dim
        self.rule = rule or Rule()
        self.layer = torch.nn.Linear(4, num_classes)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.layer(batch[0]).square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/recall@1", 1.0 / (1.0 + self.layer.weight.detach().square().mean()))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test/norm", self.layer.weight.detach().square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.rule.lr)


class Failing(TinyModule):
    """Raises in the hook ``at``."""

    def __init__(self, at: str, num_classes: int):
        super().__init__(num_classes)
        setattr(self, at, self._fail)

    def _fail(self, *args: object, **kwargs: object) -> None:
        raise RuntimeError("failed at start")


class NoClasses(TinyModule):
    """Takes none of the linked arguments."""

    def __init__(self, embedding_dim: int = 8):
        super().__init__(2, 5, embedding_dim)


@dataclass
class TinyNoise:
    kind: str = "symmetric"
    rate: float = 0.5
    seed: int = 3


class TinyData(LightningDataModule):
    def __init__(self, batch_size: int = 4, noise: TinyNoise | None = None):
        super().__init__()
        self.num_classes, self.in_channels, self.num_train_samples = 7, 1, 16
        self.noise = noise or TinyNoise()
        self.train_is_noise = torch.arange(16) % 4 == 0
        self.batch_size = batch_size

    def _loader(self) -> DataLoader:
        x = torch.arange(64.0).reshape(16, 4) / 64
        return DataLoader(TensorDataset(x), self.batch_size)

    train_dataloader = val_dataloader = test_dataloader = _loader


class TinyCallback(Callback):
    def __init__(self, rate: float = 0.5):
        self.rate = rate


class EarlyLog(Callback):
    """Logs before the first batch."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.logger.log_hyperparams({"early": 1})
        trainer.logger.log_metrics({"early": 0.25}, 0)
        trainer.logger.save()


class Broken(LightningDataModule):
    """A bug, not a user error."""

    def __init__(self) -> None:
        super().__init__()
        int("not a number")
