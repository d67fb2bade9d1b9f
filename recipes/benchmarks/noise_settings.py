"""What noise_table.py runs: methods, settings, and the one command of each run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from runner import REPO

METHODS = {
    "none": "no filter",
    "prism_avg": "PRISM AvgSim",
    "prism_vmf": "PRISM vMF-Sim, a kappa per class",
    "prism_vmf_shared": "PRISM vMF-Sim, one kappa",
    "knn_vote": "kNN vote",
    "tsint": "T-SINT (pairs; no memory)",
    "known_clean": "known clean (upper bound)",
    "cross_entropy": "cross-entropy, no filter",
    "bare": "cross-entropy + BARE (not told the rate)",
    "small_loss": "cross-entropy + small loss",
    "loss_quantile": "cross-entropy + loss quantile",
    "combined": "contrastive + 0.3 cross-entropy, no filter",
    "combined_prism": "contrastive + 0.3 cross-entropy + PRISM AvgSim",
    "consensus": "contrastive + 0.3 cross-entropy + Consensus (not told the rate)",
    "consensus_softmax": "cross-entropy + Consensus (not told the rate)",
    "consensus_told": "contrastive + 0.3 cross-entropy + Consensus",
    "frozen": "cross-entropy, no filter, kept for frozen embeddings",
    "consensus_frozen": "contrastive + 0.3 cross-entropy + Consensus, kept for frozen embeddings",
    "cleaned": "no filter, on labels that `nrml audit` left",
    "cleaned_cross_entropy": "cross-entropy, on labels that `nrml audit` left",
    "shuffled_cross_entropy": "cross-entropy, shuffled batches, no filter",
    "shuffled_bare": "cross-entropy, shuffled batches + BARE (not told the rate)",
    "shuffled_small_loss": "cross-entropy, shuffled batches + small loss",
    "shuffled_consensus_softmax": "cross-entropy, shuffled batches + Consensus (not told the rate)",
    "shuffled_frozen": "cross-entropy, shuffled batches, no filter, kept for frozen embeddings",
    "shuffled_cleaned_cross_entropy": "cross-entropy, shuffled batches, on labels that `nrml audit` left",
    "shuffled_relabelled_cross_entropy": "cross-entropy, shuffled batches, labels turned by `nrml audit`",
    "shuffled_combined": "contrastive + cross-entropy, shuffled batches, no filter",
    "shuffled_combined_prism": "contrastive + cross-entropy, shuffled batches + PRISM AvgSim",
    "shuffled_consensus": "contrastive + cross-entropy, shuffled batches + Consensus (not told the rate)",
    "shuffled_combined_known_clean": "contrastive + cross-entropy, shuffled batches, known clean",
    "shuffled_known_clean": "cross-entropy, shuffled batches, known clean (upper bound)",
    "eac_off": "EAC's net and views, cross-entropy alone",
    "eac": "EAC (drops nothing)",
    "pretrained_none": "SimCLR start, no filter",
    "pretrained_prism_avg": "SimCLR start, PRISM AvgSim",
    "pretrained_known_clean": "SimCLR start, known clean",
}
UNFILTERED = (
    "none", "known_clean", "cross_entropy", "combined", "pretrained_none", "pretrained_known_clean",
    "cleaned", "cleaned_cross_entropy", "eac_off", "eac",
    "shuffled_cross_entropy", "shuffled_cleaned_cross_entropy", "shuffled_relabelled_cross_entropy",
    "shuffled_known_clean",
    "shuffled_combined", "shuffled_combined_known_clean",
)  # fmt: skip
#: EAC is another module, so it has recipes of its own, for the data that a mirror does not change
EAC_RECIPES = {"dml/prism_caltech101": "dml/eac_caltech101", "dml/prism_cifar10n": "dml/eac_cifar10n"}
#: kept with their last checkpoint, whose embeddings are judged afterwards
FROZEN = ("frozen", "consensus_frozen", "shuffled_frozen")
#: run unless --methods says otherwise
USUAL = tuple(m for m in METHODS if m != "combined_prism" and not m.startswith("pretrained"))
SOFTMAX_ONLY = (
    "cross_entropy", "cleaned_cross_entropy", "frozen", "bare", "small_loss", "loss_quantile",
    "consensus_softmax",
)  # fmt: skip
#: in front of a method: cross-entropy has full weight, and batches are drawn without regard to classes, as
#: suits it; class weights learn at the rate that goes with that
SHUFFLED = "shuffled_"
BOTH_LOSSES = (
    "combined", "combined_prism", "consensus", "consensus_told", "consensus_frozen", "shuffled_combined",
    "shuffled_combined_prism", "shuffled_consensus", "shuffled_combined_known_clean",
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """One data set with one kind of noise.

    Args:
        name, title: of folder and table.
        recipe: the recipe that holds net, optimiser and sampler.
        rate: what filters that want a noise rate are told: the true one.
        warmup: steps of PRISM's and kNN vote's warm-up.
        ramp: epochs until small loss drops its full share, about a third of the run.
        classes: classes of the given labels.
        dim: values per embedding.
        noise: overrides that set the noise of a seed; {rate} and {seed} are filled in.
        fixed: further overrides.
        steps: per epoch, as many as the recipe's sampler takes, where shuffled batches are drawn from all
            images; 0: they hold one image of each of as many classes.
        part: a file and how many of its train images :func:`prepare` takes; the run finds them at {part}.
    """

    name: str
    title: str
    recipe: str
    rate: float
    warmup: int
    ramp: int
    classes: int
    dim: int
    noise: tuple[str, ...]
    fixed: tuple[str, ...] = ()
    steps: int = 0
    part: tuple[Path, int] | None = None


def settings(data: Path) -> list[Setting]:
    """All settings, the quick and the central ones first."""
    found = [_digits("digits_50", "50 % symmetric", 0.5, 10, ("noise.seed={seed}",))]
    for rate in (0.5, 0.2):
        found += [_omniglot(data, rate), _caltech(data, rate)]
        if rate == 0.5:
            found += [_cifar(data, "worse", "40 %", 0.4), _cifar_part(data)]
    found += [
        _cifar(data, "random1", "17 %", 0.172),
        _cifar(data, "aggre", "9 %", 0.09),
        _digits("digits_20", "20 % symmetric", 0.2, 10, ("noise.rate=0.2", "noise.seed={seed}")),
        _digits(
            "digits_cluster", "2 of 10 classes dissolved (small-cluster)", 0.2, 8,
            ("noise.kind=small_cluster", "noise.rate=0.2", "noise.seed={seed}"),
        ),
        _caltech_cluster(data),
    ]  # fmt: skip
    return found


def _data(*overrides: str) -> tuple[str, ...]:
    return tuple(f"--data.init_args.{text}" for text in overrides)


def _digits(name: str, noise: str, rate: float, classes: int, overrides: tuple[str, ...]) -> Setting:
    title = f"scikit-learn digits, {noise}"
    return Setting(
        name, title, "quickstart", rate, 40, 10, classes, 64,
        _data(*overrides),
        _data("seed={seed}"), 20,
    )  # fmt: skip


def _omniglot(data: Path, rate: float) -> Setting:
    percent = round(100 * rate)
    return Setting(
        f"omniglot_{percent}", f"Omniglot, {percent} % symmetric: 659 unseen classes",
        "dml/prism_omniglot", rate, 150, 1, 964, 128,
        _data("noise_list=noise_lists.npz:given_r{rate}_s{seed}"),
        (
            f"--data.init_args.path={data}/omniglot/omniglot.npz",
            f"--model.init_args.init_weights={data}/omniglot/simclr_start.npz",
        ),
    )  # fmt: skip


def _caltech(data: Path, rate: float) -> Setting:
    percent = round(100 * rate)
    return Setting(
        f"caltech101_{percent}", f"caltech101_dml, {percent} % symmetric: 49 unseen classes",
        "dml/prism_caltech101", rate, 250, 5, 50, 128,
        _data("noise_list=noise_lists.npz:given_r{rate}_s{seed}"),
        _data(f"path={data}/caltech101_dml/caltech101_dml_96.npz"), 61,
    )  # fmt: skip


def _caltech_cluster(data: Path) -> Setting:
    cluster = ("noise.kind=small_cluster", "noise.rate=0.5", "noise.seed={seed}")
    return Setting(
        "caltech101_cluster",
        "caltech101_dml, 25 of 50 classes dissolved (small-cluster): 49 unseen classes",
        "dml/prism_caltech101", 0.5, 250, 5, 25, 128,
        _data("noise_list=null", *cluster),
        _data(f"path={data}/caltech101_dml/caltech101_dml_96.npz"), 61,
    )  # fmt: skip


def _cifar(data: Path, label: str, wrong: str, rate: float) -> Setting:
    return Setting(
        f"cifar10n_{label}", f"CIFAR-10N {label} (human labels, {wrong} wrong): 10,000 test images",
        "dml/prism_cifar10n", rate, 100, 1, 10, 128, _data("seed={seed}", f"label={label}"),
        (
            *_data(f"path={data}/cifar10n/cifar10n_jpeg.npz"),
            *_data("epoch_length=24960"),  # 390 steps in all: one pass over the images
            "--trainer.max_epochs=2",
        ),
        195,
    )  # fmt: skip


def _cifar_part(data: Path, images: int = 10_000, passes: int = 10) -> Setting:
    """Few images, seen often: the net can learn people's mistakes by heart, as it cannot in one pass."""
    steps = images // 128
    return Setting(
        "cifar10n_10k_worse",
        f"CIFAR-10N worse, {images:,} images, {passes} passes (human labels, 40 % wrong): 10,000 test images",
        "dml/prism_cifar10n", 0.4, 100, 3, 10, 128, _data("seed={seed}", "label=worse"),
        (
            *_data("path={part}", f"epoch_length={steps * 128}"),
            f"--trainer.max_epochs={passes}", f"--trainer.check_val_every_n_epoch={passes}",
        ),
        steps, (data / "cifar10n" / "cifar10n_jpeg.npz", images),
    )  # fmt: skip


def part_of(setting: Setting, out: Path) -> Path:
    """The file of a setting that takes a part of its train images."""
    return out.resolve() / f"{setting.name}.npz"


def prepare(setting: Setting, out: Path) -> None:
    """Write the first train images of a CIFAR-10N file, with all test images, unless they are there."""
    if setting.part is None or part_of(setting, out).exists():
        return
    source, images = setting.part
    with np.load(source, allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    end = arrays["train_offsets"][images]
    for key, length in (("train_jpeg", end), ("train_offsets", images + 1)):
        arrays[key] = arrays[key][:length]
    for key in arrays:
        if "label" in key and not key.startswith("test"):
            arrays[key] = arrays[key][:images]
    out.mkdir(parents=True, exist_ok=True)
    unfinished = out / f".{setting.name}.part.npz"
    np.savez(unfinished, **arrays)
    unfinished.replace(part_of(setting, out))


def callbacks(setting: Setting, method: str) -> list[dict[str, Any]]:
    """Evaluator and filter of a run, as YAML has them."""
    found: list[dict[str, Any]] = [{"class_path": "RetrievalEvaluator"}]
    told = {"noise_rate": setting.rate}
    if "prism" in method:
        init: dict[str, Any] = {**told, "warmup_steps": setting.warmup}
        if "vmf" in method:
            init |= {"similarity": "vmf", "shared_kappa": method.endswith("shared")}
        found.append({"class_path": "PRISM", "init_args": init})
    elif method == "knn_vote":
        found.append({"class_path": "KNNVote", "init_args": {**told, "warmup_steps": setting.warmup}})
    elif method == "tsint":
        found.append({"class_path": "TSINT", "init_args": {**told, "teacher_momentum": 0.99}})
    elif method.endswith(("small_loss", "loss_quantile")):
        name = "SmallLoss" if method.endswith("small_loss") else "LossQuantile"
        found.append({"class_path": name, "init_args": {**told, "ramp_epochs": setting.ramp}})
    elif method.endswith("known_clean"):
        # dropped in advance they would shorten an epoch of shuffled batches
        granularity = "batch" if method.startswith(SHUFFLED) else "epoch"
        found.append({"class_path": "KnownClean", "init_args": {"granularity": granularity}})
    elif method.endswith("bare"):
        found.append({"class_path": "BARE"})
    elif method.removeprefix(SHUFFLED).startswith("consensus"):  # one setting for all
        found.append({"class_path": "Consensus", **({"init_args": told} if "told" in method else {})})
    return found


def _own_noise(noise: list[str], method: str) -> list[str]:
    """Without what a label table stands for."""
    replaced = "cleaned" in method or "relabelled" in method
    return [n for n in noise if not (replaced and n.startswith("--data.init_args.noise."))]


def recipe(setting: Setting, method: str) -> str | None:
    """The recipe that holds net, optimiser and sampler; ``None`` where the method has none for this data."""
    return EAC_RECIPES.get(setting.recipe) if method.startswith("eac") else setting.recipe


def command(setting: Setting, method: str, seed: int, folder: Path) -> list[str]:
    """Arguments of ``nrml`` for one run."""
    extra: list[str] = []
    if method == "eac_off":
        extra = ["--model.init_args.lam=0"]
    softmax = {"num_classes": setting.classes, "embedding_dim": setting.dim, "scale": 16.0}
    loss: dict[str, Any] = {"class_path": "CosineSoftmaxLoss", "init_args": softmax}
    shuffled = method.startswith(SHUFFLED)
    softmax_only = method not in BOTH_LOSSES and (shuffled or method in SOFTMAX_ONLY)
    if softmax_only or method == "tsint":
        extra = ["--model.init_args.memory_size=0"]
    if method in BOTH_LOSSES:
        both = {
            "losses": [{"class_path": "ContrastiveLoss"}, loss],
            "weights": [1.0, 1.0 if shuffled else 0.3],
        }
        loss = {"class_path": "CombinedLoss", "init_args": both}
    elif not softmax_only:
        loss = {}
    if method.startswith("pretrained"):
        # of ssl_table.py --settings caltech101 --methods simclr --seeds 0, beside this table's runs
        start = folder.parents[3] / "ssl_table/caltech101/simclr/seed0/pretrain/checkpoints/last.ckpt"
        extra.append(f"--model.init_args.backbone_ckpt={start}")
    if loss:
        extra += [
            "--model.init_args.loss=" + json.dumps(loss),
            f"--model.init_args.optimizer.loss_lr={0.01 if shuffled else 0.001}",
        ]
    if "relabelled" in method:
        extra.append(f"--data.init_args.noise={folder.resolve() / 'audit' / 'labels_corrected.csv'}")
    if "cleaned" in method:
        # what `nrml audit` made of the kept cross-entropy net of the same seed: run `frozen` first
        kept = f"{SHUFFLED if shuffled else ''}frozen"
        table = folder.resolve().parents[1] / kept / folder.name / "audit" / "labels_corrected.csv"
        extra.append(f"--data.init_args.noise={table}")
    drawn: tuple[str, ...] = ()
    if shuffled:
        drawn = _data("m_per_class=1")
        if setting.steps:
            drawn = (
                *_data("m_per_class=null", "epoch_length=null"),
                f"--trainer.limit_train_batches={setting.steps}",
            )
    filled = {"rate": setting.rate, "seed": seed, "part": part_of(setting, folder.parents[2])}
    noise = [text.format(**filled) for text in (*setting.noise, *setting.fixed)]
    return [
        "fit",
        f"--config={REPO}/recipes/{recipe(setting, method)}.yaml",
        f"--seed_everything={seed}",
        *_own_noise(noise, method),
        *drawn,
        *extra,
        "--trainer.callbacks=null",  # else the list below would inherit options of the recipe's callbacks
        "--trainer.callbacks=" + json.dumps(callbacks(setting, method)),
        f"--trainer.default_root_dir={folder}",
        "--trainer.enable_progress_bar=false",
        "--trainer.accelerator=cpu",
        f"--trainer.enable_checkpointing={str(method in FROZEN).lower()}",
    ]


def stages(setting: Setting, method: str, seed: int, folder: Path) -> list[list[str]]:
    """The commands of one run, of which the last one trains.

    Before labels are turned, the kept cross-entropy net of the same seed (run ``shuffled_frozen`` first) is
    audited once more, with a rule of its own: each doubted label takes the suggestion that is more probable
    than not.
    """
    fit = command(setting, method, seed, folder)
    if "relabelled" not in method:
        return [fit]
    kept = folder.resolve().parents[1] / f"{SHUFFLED}frozen" / folder.name
    audit = [
        "audit",
        f"--config={kept / 'config.yaml'}",
        f"--ckpt_path={kept / 'checkpoints' / 'last.ckpt'}",
        f"--trainer.default_root_dir={folder}",
        f"--out={folder.resolve() / 'audit'}",
        "--rule=relabel",
        "--confident=0.5",
        "--gallery=20",
    ]
    return [audit, fit]
