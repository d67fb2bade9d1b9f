"""The callback that drives any noise filter on any LightningModule."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_nrml import distributed
from lightning_nrml.callbacks.attached import chain_of, drop_leftovers
from lightning_nrml.callbacks.ledger_file import write_ledger
from lightning_nrml.callbacks.run_sizes import RunSizes
from lightning_nrml.callbacks.whole_set import (
    add_bank,
    decide,
    judge,
    release_sampler,
    tell_sampler,
    train_label,
)
from lightning_nrml.filters import NoiseFilter
from lightning_nrml.filters.chain import Mode, tolerate_absent_filters
from lightning_nrml.memory import FeatureBank, LabelLedger, SampleLedger
from lightning_nrml.metrics import FilterQuality
from lightning_nrml.precision import float32_default
from lightning_nrml.types import FilterContext, Selection

Granularity = Literal["batch", "epoch"]
#: what is logged of a filter's quality as ``noise/<key>``; the last ones for multi-label data only
_QUALITY = ("precision", "recall", "auroc", "average_precision", "f1")
_RATES = {
    "noise_rate": "noise/estimated_rate",
    "extra_rate": "noise/estimated_extra",
    "missing_rate": "noise/estimated_missing",
}
_LABEL_QUALITY = tuple(f"{k}_{v}" for k in ("extra", "missing") for v in ("precision", "recall", "auroc"))


class NoiseFilterCallback(Callback):
    """Plugs a :class:`~lightning_nrml.filters.NoiseFilter` into a training run.

    ``granularity="batch"``: the filter decides on every batch, and dropped rows get weight 0.
    ``granularity="epoch"``: embeddings of every sample are kept in a bank as they pass; after the last
    batch of an epoch the filter scores the whole training set from the bank, and the sampler of the
    next epoch leaves dropped samples out, so that they are neither decoded nor forwarded. A dropped
    sample comes back with weight 0 once its bank row is older than ``max_age`` epochs, so that it is
    judged by a fresh embedding. (An epoch then has fewer steps than the schedule was made for; set
    ``trainer.max_steps`` for a run of fixed length.)

    Works with our modules and with any LightningModule whose ``training_step`` calls
    :func:`lightning_nrml.select`. All state (filter, ledger, bank) is part of the checkpoint. Clean
    labels, where the data has them, are used here for ``noise/*`` metrics only.

    Args:
        filter: the filter; subclasses such as :class:`PRISM` build theirs in :meth:`make_filter`.
        granularity: ``batch`` weighs the rows of each batch; ``epoch`` judges the whole training set after
            each epoch and lets the sampler skip dropped samples.
        start_epoch: first epoch in which decisions count; before it the filter only fills its memory.
        every_n_epochs: epochs between two whole-set passes (``granularity="epoch"`` only).
        max_age: epochs after which a dropped sample is forwarded again, with weight 0, to be judged anew
            (``granularity="epoch"`` only); 0 never brings one back.
        ramp_epochs: epochs over which the filter's assumed noise rate rises linearly from 0, counted from
            ``start_epoch``; 0 = the full rate at once.
        correct_labels: train with the label that the filter suggests, where it is confident: the suggested
            label scores at least as high as the median of the batch's kept rows do with theirs. It counts
            from the sample's next batch on, until the filter thinks otherwise; the filter judges it like
            any other label. Off: suggestions are only written to the ledger
            (``granularity="batch"`` only).
        name: key under ``pl_module.filters``; default the filter's class name in lower case.
        save_ledger: write ``noise_ledger.parquet`` and ``.csv`` into the run folder at the end of fit.
    """

    def __init__(
        self,
        filter: NoiseFilter | None = None,
        granularity: Granularity = "batch",
        start_epoch: int = 0,
        every_n_epochs: int = 1,
        max_age: int = 5,
        ramp_epochs: int = 0,
        correct_labels: bool = False,
        name: str | None = None,
        save_ledger: bool = True,
    ) -> None:
        if granularity not in ("batch", "epoch"):
            raise ValueError(f"granularity is '{granularity}': choose 'batch' or 'epoch'.")
        if every_n_epochs < 1 or (every_n_epochs > 1 and granularity == "batch"):
            raise ValueError(
                f"every_n_epochs is {every_n_epochs}: it must be 1, or more with granularity='epoch'."
            )
        for key, value in (("start_epoch", start_epoch), ("max_age", max_age), ("ramp_epochs", ramp_epochs)):
            if value < 0:
                raise ValueError(f"{key} is {value}: it must not be negative.")
        if correct_labels and granularity != "batch":
            raise ValueError("correct_labels works with granularity='batch' only.")
        self.filter = filter
        self.granularity: Granularity = granularity
        self.start_epoch, self.every_n_epochs, self.max_age = start_epoch, every_n_epochs, max_age
        self.ramp_epochs, self.correct_labels = ramp_epochs, correct_labels
        self._full_rate: float | None = None
        self.name = name or type(filter or self).__name__.lower()
        self.save_ledger = save_ledger
        self._quality: FilterQuality | None = None
        self._kept: tuple[Tensor | int, int] = (0, 0)
        self._judged = -1  # the last epoch whose whole-set decision went into the quality

    # ---- attaching ------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Distinguishes two filters of one run."""
        return f"{type(self).__qualname__}[{self.name}]"

    def make_filter(self, sizes: RunSizes) -> NoiseFilter:
        """The filter to attach; subclasses build theirs from the sizes of the run."""
        if self.filter is None:
            raise ValueError("NoiseFilterCallback needs a filter: NoiseFilterCallback(filter=PRISM(...)).")
        return self.filter

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Attach filter, ledger and (epoch mode) bank before the checkpoint is restored.

        Every fit begins with a new ledger, and with a new filter unless the object itself was given; a
        resumed one gets its state from the checkpoint.
        """
        tolerate_absent_filters(pl_module)
        if stage != "fit":
            return
        chain = chain_of(pl_module)
        sizes = RunSizes(trainer, pl_module)
        names = [c.name for c in _filter_callbacks(trainer, self)]
        if names.count(self.name) > 1:
            raise ValueError(f"Two noise filters are called '{self.name}': give one of them another name=.")
        if names[0] == self.name:
            drop_leftovers(pl_module, chain, names)
            pl_module.noise_ledger = sizes.ledger()
        part = self.filter = self.make_filter(sizes)
        if self.granularity not in part.granularities:
            raise ValueError(
                f"{type(part).__name__} works with granularity {' or '.join(map(repr, part.granularities))}, "
                f"not '{self.granularity}'."
            )
        self._check_schedule(part)
        chain[self.name] = part
        chain.mode[self.name] = "off"
        ledger = cast(SampleLedger, pl_module.noise_ledger)
        if self.correct_labels:
            if isinstance(ledger, LabelLedger):
                raise ValueError("correct_labels works with one class per sample, not with multi-label data.")
            ledger.allow_corrections()
        if self.granularity == "epoch":
            if getattr(pl_module, "feature_bank", None) is not None and chain.epoch_keep.keys() - {self.name}:
                raise ValueError(
                    "Only one filter of a run may have granularity='epoch'; use 'batch' for the other."
                )
            add_bank(pl_module, sizes.num_samples, sizes.embedding_dim)
            chain.epoch_keep[self.name] = lambda: ledger.keep
            # the loader must be rebuilt so that Lightning knows the shorter epoch (validation, progress)
            trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]
        distributed.exempt_from_ddp_sync(pl_module)
        self._quality = FilterQuality(sizes.num_labels)
        self._judged = -1

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """After the fit the filter can be looked at and saved, but takes no part in another run."""
        if stage == "fit":
            self.detach(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The same for a fit that was broken off, which has no teardown."""
        self.detach(trainer, pl_module)

    def detach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Switch the filter off and let the sampler draw everything again."""
        chain = chain_of(pl_module)
        chain.mode.pop(self.name, None)
        chain.pending = chain.last = None
        if chain.epoch_keep.pop(self.name, None) is not None:
            release_sampler(trainer)

    def _check_schedule(self, part: NoiseFilter) -> None:
        if self.ramp_epochs:
            if getattr(part, "noise_rate", None) is None:
                raise ValueError(
                    f"ramp_epochs needs a filter with a noise_rate, which {type(part).__name__} has not: "
                    "leave it at 0."
                )
            if self._full_rate is None:
                self._full_rate = float(cast(Any, part).noise_rate)
        if self.correct_labels and type(part).suggest is NoiseFilter.suggest:
            raise ValueError(
                f"correct_labels needs a filter that suggests labels; {type(part).__name__} does not."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After a restore: hand the last epoch decision to the sampler of the epoch to come."""
        assert self._quality is not None
        self._quality.to(pl_module.device)
        if self.granularity == "epoch":
            part = cast(NoiseFilter, chain_of(pl_module)[self.name])
            if trainer.ckpt_path is None and self.start_epoch == 0 and not part.uses_embedding:
                self._decide(trainer, pl_module, part)
            tell_sampler(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the mode here too: Lightning leaves ``on_train_epoch_start`` out when it resumes mid-epoch."""
        self._set_mode(trainer, pl_module)

    # ---- life cycle -----------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Switch the filter on or off for this epoch."""
        if self._set_mode(trainer, pl_module):
            cast(NoiseFilter, chain_of(pl_module)[self.name]).begin_epoch(trainer.current_epoch)

    def _set_mode(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        active = trainer.current_epoch >= self.start_epoch
        mode: Mode = self.granularity if active else "observe"
        chain_of(pl_module).mode[self.name] = mode
        self._set_rate(cast(NoiseFilter, chain_of(pl_module)[self.name]), trainer.current_epoch)
        return active

    def _set_rate(self, part: NoiseFilter, epoch: int) -> None:
        """The ramp: a function of the epoch alone, so that it needs no state."""
        if self._full_rate is not None:
            done = min(max(epoch - self.start_epoch, 0) / self.ramp_epochs, 1.0)
            cast(Any, part).noise_rate = self._full_rate * done

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Put corrected labels in the place of the given ones."""
        chain_of(pl_module).last = None
        if self.correct_labels:
            ledger = cast(SampleLedger, pl_module.noise_ledger)
            corrected = cast(Tensor, ledger.corrected)[batch["index"]]
            batch["label"] = torch.where(corrected >= 0, corrected, batch["label"])

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Correct the labels of the batch's samples for the next time."""
        chain = chain_of(pl_module)
        if self.correct_labels and chain.pending is not None and chain.mode[self.name] == "batch":
            ctx, selection = chain.pending
            label = confident_labels(cast(NoiseFilter, chain[self.name]), ctx, selection)
            cast(SampleLedger, pl_module.noise_ledger).correct(ctx.index, label)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the filters learn from the batch; write ledger and bank."""
        self._commit(trainer, pl_module)

    def _commit(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pending = chain_of(pl_module).commit()
        if pending is None:  # another filter callback of this run was first
            return
        ctx, selection = pending
        weight, score = selection.weight, selection.score
        ledger = cast(SampleLedger, pl_module.noise_ledger)
        if ledger.corrected is not None:  # the ledger speaks of given labels, and this one took no part
            changed = train_label(trainer).to(ctx.label.device)[ctx.index] != ctx.label
            weight, score = weight.masked_fill(changed, 0.0), score.masked_fill(changed, torch.nan)
        known = (v for k, v in selection.stats.items() if k.endswith("/suggested"))
        ledger.record(ctx.index, weight, score, next(known, None))  # of the first filter that suggests
        bank = getattr(pl_module, "feature_bank", None)
        if isinstance(bank, FeatureBank):
            bank.write(ctx.index, ctx.embedding, trainer.current_epoch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log; after the last batch take the decision for the next epoch (before any checkpoint)."""
        self._commit(trainer, pl_module)  # for steps without a backward pass
        last = chain_of(pl_module).last
        if last is not None:
            self._log(trainer, pl_module, batch, last[0].index, last[1])
        if trainer.is_last_batch:
            self._end_epoch(trainer, pl_module)

    def _end_epoch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch, part = trainer.current_epoch, cast(NoiseFilter, chain_of(pl_module)[self.name])
        if epoch >= self.start_epoch:
            part.end_epoch(epoch)
        self._judge(trainer, pl_module)
        due = epoch + 1 >= self.start_epoch and (epoch + 1 - self.start_epoch) % self.every_n_epochs == 0
        if self.granularity == "epoch" and due:
            self._decide(trainer, pl_module, part)

    def _decide(self, trainer: Trainer, pl_module: LightningModule, part: NoiseFilter) -> None:
        self._set_rate(part, trainer.current_epoch + 1)  # that of the epoch it is for
        decide(trainer, pl_module, part, self.max_age)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the quality of this epoch's decisions where the truth is known."""
        assert self._quality is not None
        self._judge(trainer, pl_module)
        if self.granularity == "epoch":
            tell_sampler(trainer, pl_module)
        (kept, count), self._kept = self._kept, (0, 0)
        if count:  # loggers have the curve of the steps; what stays in callback_metrics is the epoch's mean
            pl_module.log("train/keep_rate", kept / count, prog_bar=True, logger=False, sync_dist=True)
        if self._quality.update_called:
            values = self._quality.compute()
            for key in (*_QUALITY, *(_LABEL_QUALITY if self._quality.num_labels else ())):
                value = torch.as_tensor(values[key], dtype=torch.float32)
                pl_module.log(f"noise/{key}", value, sync_dist=True)  # equal on all ranks already
            self._quality.reset()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the per-sample ledger next to the checkpoints."""
        first = _filter_callbacks(trainer, self)[0]
        trial = getattr(trainer, "fast_dev_run", False)  # must not overwrite the ledger of a real run
        if self.save_ledger and first is self and trainer.is_global_zero and not trial:
            folder = Path(trainer.default_root_dir)
            ledger = cast(SampleLedger, pl_module.noise_ledger)
            path = write_ledger(ledger, getattr(trainer, "datamodule", None), folder)
            rank_zero_info(f"Per-sample noise ledger: {path}")

    # ---- logging --------------------------------------------------------------------------------

    def _log(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, index: Tensor, selection: Selection
    ) -> None:
        self._log_own(trainer, pl_module, selection, len(index))
        if not self._speaks_for_all(trainer):
            return
        ledger = cast(SampleLedger, pl_module.noise_ledger)
        keep = ledger.keep if self._whole_set(pl_module) else selection.keep
        kept, count = self._kept
        self._kept = (kept + keep.sum(), count + keep.numel())
        pl_module.log("train/keep_rate", keep.float().mean(), prog_bar=True, batch_size=len(index))
        clean = batch.get("clean_label") if isinstance(batch, dict) else None
        if clean is None or self._quality is None or self._whole_set(pl_module):
            return
        sizes = distributed.gather_sizes(len(clean), clean.device)
        own = selection.rows(distributed.own_rows(sizes))
        given = batch["label"] if self._quality.num_labels else None
        self._quality.update(own.keep, clean != batch["label"], own.score, given)

    def _log_own(
        self, trainer: Trainer, pl_module: LightningModule, selection: Selection, batch_size: int
    ) -> None:
        """This filter's threshold, and rates it found without the truth, if no filter before it has them."""
        stats = selection.stats
        threshold = stats.get(f"{self.name}/threshold")
        # only now and then: reading the value waits for the GPU
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if threshold is None or (trainer.global_step + 1) % every or not bool(threshold.isfinite()):
            return
        pl_module.log(f"{self.name}/threshold", threshold, batch_size=batch_size)
        for key, said in _RATES.items():
            if next((k for k in stats if k.endswith(f"/{key}")), None) == f"{self.name}/{key}":
                pl_module.log(said, stats[f"{self.name}/{key}"], batch_size=batch_size)

    def _whole_set(self, pl_module: LightningModule) -> bool:
        """Whether a decision on the whole set is in force: forwarded rows alone would flatter it."""
        return chain_of(pl_module).mode.get(self.name) == "epoch"

    def _speaks_for_all(self, trainer: Trainer) -> bool:
        """Of several filters one logs what is of them together: one by epoch if there is, else the first."""
        own = _filter_callbacks(trainer, self)
        return next((c for c in own if c.granularity == "epoch"), own[0]) is self

    def _judge(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The quality of a whole-set decision, once in an epoch, before the next one is taken."""
        if self._whole_set(pl_module) and self._judged != trainer.current_epoch:
            self._judged = trainer.current_epoch
            judge(trainer, pl_module, cast(FilterQuality, self._quality))


@torch.no_grad()
@float32_default()
def confident_labels(part: NoiseFilter, ctx: FilterContext, selection: Selection) -> Tensor:
    """``(B,)`` suggested labels that score like the kept rows of the batch do with theirs; -1 elsewhere.

    Log-probabilities have no common scale over filters and class numbers, so the level is the median of
    the scores of the kept rows. While the filter applies no threshold (warm-up), nothing is suggested.
    """
    suggested = part.suggest(ctx)
    if suggested is None:
        return torch.full_like(ctx.label, -1)
    own = part.score(ctx).masked_fill(~selection.keep, torch.nan)
    other = part.score(replace(ctx, label=suggested.clamp_min(0)))
    confident = (suggested >= 0) & (other >= own.nanmedian()) & ctx.embedding.isfinite().all(dim=1)
    return suggested.masked_fill(~confident | selection.threshold.isnan(), -1)


def _filter_callbacks(trainer: Trainer, own: NoiseFilterCallback) -> list[NoiseFilterCallback]:
    """Those of the run, in order."""
    callbacks = cast(list[Callback], trainer.callbacks)  # type: ignore[attr-defined]
    return [c for c in callbacks if isinstance(c, NoiseFilterCallback)] or [own]
