"""The trainer behind the command line: Lightning's, and the verbs ``audit``, ``embed`` and ``export``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_nrml.audit import AuditOptions, review_marks
from lightning_nrml.callbacks.noise_report import audit_data, summary_lines, write_audit
from lightning_nrml.callbacks.predictions import PredictionCollector, PredictionWriter
from lightning_nrml.cli.errors import UserError
from lightning_nrml.data import NRMLDataModule
from lightning_nrml.files import whole_file
from lightning_nrml.modules import EmbeddingModule
from lightning_nrml.modules.deploy import Deployed, export_onnx


class NRMLTrainer(Trainer):
    """Lightning's trainer with the verbs ``audit``, ``embed`` and ``export``.

    Attributes:
        changed: what the command line changed against its config files, for the run card.
    """

    changed: str = ""

    def audit(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
        out: str | None = None,
        evidence: Literal["auto", "both", "centres", "knn"] = "auto",
        k: int = 20,
        rule: Literal["drop", "relabel"] = "drop",
        below: float = 0.5,
        confident: float = 0.9,
        gallery: int = 200,
        review: str | None = None,
    ) -> None:
        """Rank the training labels by suspicion, with a checkpoint's frozen embeddings.

        Args:
            model: the module.
            datamodule: the data whose train labels are judged.
            ckpt_path: ``best``, ``last``, a file, the folder of a run, or ``init`` for the untrained model.
            weights_only: whether the checkpoint may hold tensors and plain types only, as Lightning's verbs
                have it (a run's saved config names it).
            out: folder to write to; default ``audit`` in the run folder.
            evidence: ``both`` (class centres and nearest neighbours), one of them, or ``auto``.
            k: neighbours that vote.
            rule: what the corrected table does with doubted labels.
            below: labels whose probability of being right is under this are doubted.
            confident: ``relabel`` takes suggestions of at least this probability, and drops the rest.
            gallery: suspicious samples with images in the report.
            review: CSV that was saved from a report; its marks win over the rule.

        Raises:
            UserError: the module has no ``predict_step`` to embed with.
        """
        ledger = f"nrml audit --ledger {shlex.quote(str(self.default_root_dir))}"
        check_embeds(model, f"; or audit the ledger that a noise filter left, without the module: {ledger}")
        options = AuditOptions(evidence, k, rule, below, confident, gallery, review=review)
        review_marks(options, audit_data(datamodule))
        datamodule.predict_dataloader = datamodule.embed_dataloader  # type: ignore[method-assign, attr-defined]
        collector = PredictionCollector()
        self._predict_into(collector, model, datamodule, ckpt_path, weights_only)
        if not self.is_global_zero:
            return
        folder = Path(out) if out else Path(self.default_root_dir, "audit")
        facts = {"checkpoint": ckpt_path or "none (initial weights)"}
        embedding, index = (torch.from_numpy(collector.arrays[key]) for key in ("embedding", "index"))
        result = write_audit(embedding, index, datamodule, folder, options, self.loggers, facts)
        print("\n".join(summary_lines(result)))

    def embed(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
        split: Literal["train", "val", "test"] = "test",
        images: str | None = None,
        out: str | None = None,
        faiss: str | None = "Flat",
    ) -> None:
        """Embed a split of the data, or the images of any folder, and write a search index.

        Args:
            model: the module.
            datamodule: the data, which also says how images are read and prepared.
            ckpt_path: ``best``, ``last``, a file, the folder of a run, or ``init`` for the untrained model.
            weights_only: whether the checkpoint may hold tensors and plain types only, as Lightning's verbs
                have it (a run's saved config names it).
            split: which split to embed, in order and without augmentation.
            images: a folder of images without labels (all below it), or one image, to embed instead.
            out: folder to write to; default ``embed`` in the run folder.
            faiss: how the index of cosines is built, as faiss' ``index_factory`` has it, such as ``Flat``,
                ``HNSW32`` or ``IVF256,Flat``; ``null`` = no index.

        Raises:
            UserError: the module has no ``predict_step``; the datamodule is none of this package; or both a
                split and images are given.
        """
        check_embeds(model)
        if images is not None and split != "test":
            raise UserError(f"--images {images} are part of no split: leave --split {split} out.")
        if not isinstance(datamodule, NRMLDataModule):
            raise UserError(
                f"embed needs a datamodule of this package, not {type(datamodule).__name__}; nrml predict "
                "embeds what its predict_dataloader serves."
            )
        datamodule.predict_from(split, images)
        folder = out or str(Path(self.default_root_dir, "embed"))
        writer = PredictionWriter(folder, faiss)
        self._predict_into(writer, model, datamodule, ckpt_path, weights_only)

    def _predict_into(
        self,
        collector: PredictionCollector,
        model: LightningModule,
        datamodule: LightningDataModule,
        ckpt_path: str | None,
        weights_only: bool | None,
    ) -> None:
        """Embed what the datamodule serves for prediction."""
        self.callbacks.append(collector)  # type: ignore[attr-defined]
        self.predict(
            model,
            datamodule=datamodule,
            ckpt_path=ckpt_path,
            return_predictions=False,
            weights_only=weights_only,
        )

    def export(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
        out: str | None = None,
    ) -> None:
        """Write a checkpoint's net as ONNX, or its backbone as a file for timm.

        Args:
            model: the module.
            datamodule: the data, which says how large and how normalised images are.
            ckpt_path: ``best``, ``last``, a file, the folder of a run, or ``init`` for the untrained model.
            weights_only: whether the checkpoint may hold tensors and plain types only.
            out: file to write; ``.onnx``: from images to embeddings; ``.pt`` or ``.pth``: the backbone's
                state dict with timm's names. Default ``export/model.onnx`` in the run folder.

        Raises:
            UserError: another suffix, or a module or datamodule that is none of this package.
        """
        path = Path(out) if out else Path(self.default_root_dir, "export", "model.onnx")
        if path.suffix not in (".onnx", ".pt", ".pth"):
            raise UserError(f"--out {path}: name a file that ends in .onnx, .pt or .pth.")
        if not isinstance(model, EmbeddingModule) or not isinstance(datamodule, NRMLDataModule):
            other = datamodule if isinstance(model, EmbeddingModule) else model
            raise UserError(f"export needs modules and data of this package, not {type(other).__name__}.")
        if ckpt_path is not None:
            checkpoint = torch.load(ckpt_path, map_location="cpu", weights_only=bool(weights_only))
            model.load_state_dict(checkpoint["state_dict"])
        if not self.is_global_zero:
            return
        if path.suffix == ".onnx":
            print(_write_onnx(model, datamodule, path))
            return
        with whole_file(path) as part:
            torch.save(model.to_backbone().state_dict(), part)
        print(f"backbone {path} (for timm.create_model(...).load_state_dict)")


def _write_onnx(model: EmbeddingModule, datamodule: NRMLDataModule, path: Path) -> str:
    """Returns what to tell: input, outputs, and how far the file is from the module."""
    view = datamodule.eval_view
    image = datamodule.apply_views({"image": datamodule.splits.train.images.get([0])}, training=False)[
        "image"
    ]
    net = Deployed(model.cpu(), view.mean, view.std)
    difference = export_onnx(net, tuple(image.shape[1:]), path)
    units = (
        "as its files have them" if datamodule.splits.train.images.dtype.is_floating_point else "in [0, 1]"
    )
    checked = "not compared: onnxruntime is not installed" if difference is None else f"{difference:.1e}"
    size = " x ".join(map(str, image.shape[1:]))
    return (
        f"net              {path}\n"
        f"image            float32, any number x {size}, values {units}; normalised within\n"
        f"largest difference to PyTorch  {checked}"
    )


def check_embeds(model: LightningModule, instead: str = ".") -> None:
    """See that a module can embed images.

    Raises:
        UserError: it has no ``predict_step``; ends with ``instead``.
    """
    if not is_overridden("predict_step", model):
        raise UserError(
            f"{type(model).__name__} has no predict_step to embed with: let it return "
            "{'embedding': (B, D), 'index': batch['index']}" + instead
        )
