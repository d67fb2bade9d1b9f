"""The promised public names exist, with the promised parameters in order and with their defaults."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from importlib.metadata import entry_points
from typing import Any

import pytest

REQUIRED = inspect.Parameter.empty

#: module -> name -> promised parameters in their order; further ones may only follow with defaults
PROMISED: dict[str, dict[str, dict[str, Any]]] = {
    "types": {
        "FilterContext": {
            "embedding": REQUIRED,
            "label": REQUIRED,
            "index": REQUIRED,
            "logits": None,
            "per_sample_loss": None,
            "epoch": 0,
            "step": 0,
        },
        "Selection": dict.fromkeys(("weight", "score", "threshold"), REQUIRED),
        "StepOutput": dict.fromkeys(("embedding", "label", "index"), REQUIRED),
    },
    "filters": {
        "PRISM": {
            "num_classes": REQUIRED,
            "embedding_dim": REQUIRED,
            "noise_rate": 0.5,
            "memory_size": 8192,
            "window": 30,
            "similarity": "avg",
            "warmup_steps": 0,
            "count_empty_classes": False,
        },
        "NoiseFilter": {},
        "FixedFilter": {"mask": ...},
    },
    "losses": {
        "ContrastiveLoss": {"neg_margin": 0.5},
        "CrossBatchContrastiveLoss": {},
        "SupConLoss": {},
        "MarginLoss": {},
        "DistanceWeightedMiner": {},
        "PMLLoss": {"name": REQUIRED},
        "MultiLabelELRLoss": {"num_samples": REQUIRED, "num_labels": REQUIRED, "lam": 3.0, "beta": 0.7},
        "MultiLabelSATLoss": {"num_samples": REQUIRED, "num_labels": REQUIRED, "momentum": 0.9},
        "MultiLabelJoCoRLoss": {"co_lambda": 0.1},
        "RCMLLoss": {"alpha": 0.2, "beta": 0.8, "disparity_weight": 1.0, "consistency_weight": 0.1},
    },
    "memory": {
        "FeatureQueue": {"size": REQUIRED, "dim": REQUIRED, "with_label": True},
        "SampleLedger": {"num_samples": REQUIRED},
    },
    "metrics": {
        "retrieval_metrics": {
            "embedding": REQUIRED,
            "label": REQUIRED,
            "ks": (1, 2, 4, 8),
            "query": None,
            "gallery": None,
            "chunk": None,
        },
        "RetrievalMetrics": {},
        "nmi_ami": {"embedding": REQUIRED, "label": REQUIRED, "seed": ...},
        "KNNClassifier": {"k": ..., "temperature": ...},
        "FilterQuality": {},
        "MultiLabelMetrics": {"num_labels": REQUIRED},
    },
    "data.noise": {
        "symmetric": {"label": REQUIRED, "rate": REQUIRED, "num_classes": REQUIRED, "seed": ...},
        "asymmetric": {"label": REQUIRED, "rate": REQUIRED, "mapping": REQUIRED, "seed": ...},
        "pair_flip": {"label": REQUIRED, "rate": REQUIRED, "num_classes": REQUIRED, "seed": ...},
        "small_cluster": {"label": REQUIRED, "embedding": REQUIRED, "fraction": REQUIRED, "seed": ...},
        "multilabel": {"target": REQUIRED, "subtractive": 0.0, "additive": 0.0, "seed": 0, "cap": 0.95},
        "multilabel_uniform": {"target": REQUIRED, "rate": REQUIRED, "seed": ...},
        "multilabel_images": {"target": REQUIRED, "rate": REQUIRED, "seed": ...},
        "multilabel_scores": {"target": REQUIRED, "scores": REQUIRED, "rate": REQUIRED},
        "NoisyLabels": {"label": REQUIRED, "clean_label": REQUIRED, "is_noise": REQUIRED},
    },
    "data": {
        name: {}
        for name in (
            "DigitsDataModule",
            "FolderDataModule",
            "TableDataModule",
            "ArrayDataModule",
            "CIFARDataModule",
            "CIFARNDataModule",
            "OmniglotDataModule",
            "CUBDataModule",
            "CarsDataModule",
            "SOPDataModule",
            "MultiLabelRSDataModule",
            "BigEarthNetDataModule",
            "DeepGlobeDataModule",
            "EuroSATDataModule",
            "NoiseConfig",
        )
    },
    "data.views": {
        name: {} for name in ("simclr_views", "moco_views", "byol_views", "multicrop_views", "eval_view")
    },
    "modules": {
        "MetricLearning": {"backbone": ..., "backbone_kwargs": None},
        "EmbeddingModule": {},
        "MultiLabel": {},
        "JoCoR": {},
        "RCML": {},
    },
    "callbacks": {
        "NoiseFilterCallback": {"filter": ..., "granularity": "batch"},
        "PRISM": {},
        "RetrievalEvaluator": {},
        "MultiLabelEvaluator": {},
        "OnlineKNN": {},
        "OnlineLinearProbe": {},
        "NoiseReport": {},
        "EmbeddingMap": {"every_n_epochs": 10, "split": "val", "max_samples": 2000},
    },
}
#: settings of the papers, of the authors' code or of our docs that runs without a word about them rely on
PUBLISHED: dict[tuple[str, str], dict[str, Any]] = {
    ("losses", "SwAVLoss"): {"temperature": 0.1},
    ("losses", "sinkhorn"): {"epsilon": 0.05, "iterations": 3},
    ("losses", "NTXentLoss"): {"temperature": 0.5},
    ("losses", "MoCHiLoss"): {"temperature": 0.2},
    ("losses", "InsCLRLoss"): {"margin": 0.4},
    ("losses", "MultiLabelELRLoss"): {"symmetric": False},
    ("losses", "MultiLabelSATLoss"): {"warmup_epochs": 5},
    ("losses", "MultiLabelASLLoss"): {"gamma_neg": 4.0, "gamma_pos": 1.0, "clip": 0.05},
    ("losses", "MultiLabelJoCoRLoss"): {"ramp_epochs": 10, "exponent": 1.0, "choose": "sample"},
    ("losses", "RCMLLoss"): {"sigma": 10000.0, "swap": True},
    ("losses.rcml", "group_lasso"): {"alpha": 0.2, "beta": 0.8},
    ("losses.rcml", "mmd"): {"sigma": 10000.0},
    ("modules", "SimCLR"): {"temperature": 0.5, "projector_dim": 128, "joint_views": True},
    ("modules", "BYOL"): {"projector_hidden": 4096, "projector_dim": 256, "joint_views": False},
    ("modules.self_supervised", "TaughtModule"): {"tau": 0.996, "tau_schedule": "cosine"},
    ("modules", "MoCo"): {
        "temperature": 0.2, "queue_size": 65536, "projector_dim": 128, "tau": 0.999,
        "tau_schedule": "constant",
    },
    ("modules", "MoCHi"): {
        "temperature": 0.2, "queue_size": 16384, "num_hard": 1024, "num_mixed": 1024, "num_query_mixed": 128,
        "warmup_epochs": 10,
    },
    ("modules", "SwAV"): {
        "num_prototypes": 3000, "temperature": 0.1, "epsilon": 0.05, "sinkhorn_iterations": 3,
        "projector_hidden": 2048, "projector_dim": 128, "freeze_epochs": 1, "queue_size": 0,
        "queue_start_epoch": 15,
    },
    ("modules", "InsCLR"): {
        "margin": 0.4, "neighbours": 3, "pool_size": 500, "pool_every_n_epochs": 0, "memory_size": 100_000,
        "memory_weight": 1.0, "exclude_nearest": 50,
    },
    ("memory", "MiningConfig"): {
        "in_batch": 0.6, "in_batch_relative": False, "always_keep": 0, "positive": 0.75, "negative": 0.5,
        "query": "b+i", "rounds": 4, "score": "avg", "hit": 0.6, "pick": 5, "pick_score": 0.65,
    },
    ("modules", "RCML"): {
        "keep_start": 0.6, "keep_end": 0.6, "alpha": 0.2, "beta": 0.8, "disparity_weight": 1.0,
        "consistency_weight": 0.1, "sigma": 10000.0, "swap": True, "flip_rate": 0.0,
    },
    ("modules", "JoCoR"): {
        "co_lambda": 0.1, "ramp_epochs": 10, "exponent": 1.0, "choose": "sample",
    },
    ("modules.two_networks", "TwoNetworks"): {"evaluate": "mean"},
    ("callbacks", "OnlineKNN"): {"k": 20, "temperature": 0.07, "mode": "exact", "label": "given"},
    ("metrics", "KNNClassifier"): {"k": 20, "temperature": 0.07},
    ("metrics.health", "alignment"): {"alpha": 2.0},
    ("metrics.health", "uniformity"): {"t": 2.0},
    ("optim", "LARS"): {
        "momentum": 0.9, "trust_coefficient": 1e-3, "trust": "joint", "lr_in_momentum": False, "clip": False,
        "adapt": True,
    },
    ("optim", "OptimizerConfig"): {"momentum": 0.9, "loss_weight_decay": 0.0, "decay_all": False},
    ("optim", "ScheduleConfig"): {"name": "cosine", "warmup_steps": 0.05, "min_lr_ratio": 0.0},
    ("data", "BigEarthNetDataModule"): {
        "nomenclature": 19, "bands": "s2", "keep_snow_and_cloud": False, "resample": "bilinear",
        "band_statistics": "published",
    },
}  # fmt: skip
METHODS = {
    ("memory", "FeatureQueue", "enqueue"): ["z", "label", "index"],
    ("memory", "FeatureQueue", "get"): [],
    ("metrics", "KNNClassifier", "fit"): ["bank", "label"],
    ("metrics", "KNNClassifier", "predict"): ["query"],
    ("filters", "NoiseFilter", "score"): ["ctx"],
    ("filters", "NoiseFilter", "select"): ["ctx"],
    ("filters", "NoiseFilter", "update"): ["ctx", "selection"],
    ("losses", "ContrastiveLoss", "forward"): ["embedding", "label", "weight"],
    ("losses", "SupConLoss", "forward"): ["embedding", "label", "weight"],
    ("losses", "PMLLoss", "forward"): ["embedding", "label", "weight"],
    ("losses", "MarginLoss", "forward"): ["embedding", "label", "weight", "triplets"],
    ("losses", "DistanceWeightedMiner", "forward"): ["embedding", "label", "weight"],
}
NAMES = [(module, name) for module, names in PROMISED.items() for name in names]


def public(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"lightning_nrml.{module}"), name)


@pytest.mark.parametrize(("module", "name"), NAMES, ids=[f"{m}.{n}" for m, n in NAMES])
def test_promised_signature(module, name):
    target, promised = public(module, name), PROMISED[module][name]
    assert inspect.getdoc(target)
    assert name in getattr(importlib.import_module(f"lightning_nrml.{module}"), "__all__", [name])
    found = dict(inspect.signature(target).parameters)
    assert list(found)[: len(promised)] == list(promised)
    for parameter, default in promised.items():
        if default is not ...:  # "..." promises the name only
            assert found[parameter].default == default, parameter
    free = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    if all(default is REQUIRED for default in promised.values()) and promised:
        return  # what follows required names may be required, too (stats, loss functions)
    extra = list(found.values())[len(promised) :] if promised else []
    assert [p.name for p in extra if p.default is REQUIRED and p.kind not in free] == []


@pytest.mark.parametrize(("module", "name"), PUBLISHED, ids=[f"{m}.{n}" for m, n in PUBLISHED])
def test_published_settings_are_the_defaults(module, name):
    found = inspect.signature(public(module, name)).parameters
    assert {key: found[key].default for key in PUBLISHED[module, name]} == PUBLISHED[module, name]


@pytest.mark.parametrize(("module", "name", "method"), METHODS)
def test_promised_method(module, name, method):
    found = list(inspect.signature(getattr(public(module, name), method)).parameters)[1:]
    assert found[: len(METHODS[module, name, method])] == METHODS[module, name, method]


def test_every_datamodule_takes_noise():
    from lightning_nrml.data import NRMLDataModule

    assert "noise" in inspect.signature(NRMLDataModule).parameters
    for name in PROMISED["data"]:
        if name.endswith("DataModule"):
            assert issubclass(public("data", name), NRMLDataModule), name


def test_the_callback_takes_the_filters_arguments():
    """PRISM in YAML is as flat as in Python; only the two sizes come from the data."""
    own = set(inspect.signature(public("callbacks", "PRISM")).parameters)
    theirs = set(inspect.signature(public("filters", "PRISM")).parameters)
    assert theirs - {"num_classes", "embedding_dim"} <= own


def test_filters_are_found_by_their_entry_points():
    """Only meaningful where the package is installed; a checkout on the path has none."""
    for point in entry_points(group="lightning_nrml.filters"):
        if point.value.startswith("lightning_nrml."):
            assert point.load() is public("filters", point.name)


def test_importing_the_package_is_cheap():
    """Neither torch nor Lightning comes in, not even for the exceptions of the command line."""
    code = (
        "import sys, lightning_nrml, lightning_nrml.cli, lightning_nrml.data\n"
        "heavy = {'torch', 'lightning', 'numpy', 'timm', 'faiss', 'wandb', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
