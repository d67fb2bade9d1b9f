"""Start weights fit whole or not at all, and a backbone leaves the package as a plain timm file."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import timm
import torch
from ssl_runs import METHODS, module
from torch import nn

from lightning_nrml.filters.chain import ATTACHED
from lightning_nrml.memory import FeatureBank
from lightning_nrml.models import create_backbone, export_backbone, load_backbone, load_weights
from lightning_nrml.modules import LinearProbe, MetricLearning, MoCo, SwAV

KWARGS = {"input_size": 8, "widths": [8, 16], "strides": [2, 2]}
DEEPER = {"input_size": 8, "widths": [8, 16, 16], "strides": [2, 2, 1]}


def _checkpoint(folder: Path, net: nn.Module) -> Path:
    torch.save({"state_dict": net.state_dict()}, folder / "run.ckpt")
    return folder / "run.ckpt"


def _same(one: nn.Module, two: nn.Module) -> bool:
    a, b = one.state_dict(), two.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("method", list(METHODS))
def test_only_the_backbone_of_a_checkpoint_counts(tmp_path: Path, method: str) -> None:
    source = module(method)
    for p in source.backbone.parameters():
        p.data += 1
    target, _ = create_backbone("conv4", 1, kwargs=KWARGS)
    load_backbone(target, _checkpoint(tmp_path, source))
    assert _same(target, source.backbone)
    probe = LinearProbe("conv4", KWARGS, 1)
    load_weights(probe, tmp_path / "run.ckpt")
    assert _same(probe.backbone, source.backbone)


@pytest.mark.parametrize("pair", [(KWARGS, DEEPER), (DEEPER, KWARGS)])
@pytest.mark.parametrize("plain", [True, False])
def test_another_depth_is_refused_by_name_and_nothing_changes(
    tmp_path: Path, pair: tuple[dict, dict], plain: bool
) -> None:
    source = MetricLearning("conv4", pair[0], 1, embedding_dim=4)
    target = MetricLearning("conv4", pair[1], 1, embedding_dim=4)
    path = _checkpoint(tmp_path, source)
    if plain:
        torch.save(source.backbone.state_dict(), path)
    before = {k: v.clone() for k, v in target.state_dict().items()}
    where = "file" if pair[0] is KWARGS else "model"
    name = r"body\.6\.weight \(not in the " + where
    with pytest.raises(ValueError, match=f"backbone_ckpt '.*' does not fit the backbone: .*{name}"):
        load_backbone(target.backbone, path)
    with pytest.raises(ValueError, match=f"init_weights '.*' does not fit the model: .*{name}"):
        load_weights(target, path)
    assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items())


def test_another_depth_of_resnet_is_refused(tmp_path: Path) -> None:
    small, _ = create_backbone("resnet18")
    large, _ = create_backbone("resnet34")
    torch.save(small.state_dict(), tmp_path / "small.pt")
    torch.save(large.state_dict(), tmp_path / "large.pt")
    with pytest.raises(ValueError, match=r"layer1\.2\.conv1\.weight \(not in the file\), .* and \d+ more"):
        load_backbone(large, tmp_path / "small.pt")
    with pytest.raises(ValueError, match=r"layer1\.2\.conv1\.weight \(not in the model\), .* and \d+ more"):
        load_backbone(small, tmp_path / "large.pt")


def test_a_stem_or_band_count_that_differs_is_named(tmp_path: Path) -> None:
    cifar, _ = create_backbone("resnet18", stem="cifar")
    torch.save(cifar.state_dict(), tmp_path / "cifar.pt")
    usual, _ = create_backbone("resnet18")
    with pytest.raises(ValueError, match=r"conv1\.weight \(\(64, 3, 3, 3\) in the file, \(64, 3, 7, 7\) in"):
        load_backbone(usual, tmp_path / "cifar.pt")


def test_a_foreign_checkpoint_is_refused_with_its_names(tmp_path: Path) -> None:
    torch.save({"state_dict": {"encoder.conv1.weight": torch.zeros(3)}}, tmp_path / "other.ckpt")
    net, _ = create_backbone("conv4", 1, kwargs=KWARGS)
    with pytest.raises(ValueError, match=r"without a part named 'backbone' .*encoder\.conv1\.weight"):
        load_backbone(net, tmp_path / "other.ckpt")
    with pytest.raises(FileNotFoundError, match=r"backbone_ckpt: there is no file '.*absent\.ckpt'"):
        load_backbone(net, tmp_path / "absent.ckpt")


def test_timms_own_file_with_its_classifier_is_read(tmp_path: Path) -> None:
    plain = timm.create_model("resnet18", num_classes=7)
    torch.save(plain.state_dict(), tmp_path / "timm.pt")
    net, _ = create_backbone("resnet18")
    load_backbone(net, tmp_path / "timm.pt")
    assert torch.equal(net.layer4[1].conv2.weight, plain.layer4[1].conv2.weight)


def test_exported_backbone_is_plain_timm_and_comes_back(tmp_path: Path) -> None:
    net = module("SimCLR", backbone="mobilenetv3_small_050", backbone_kwargs=None, in_channels=3).eval()
    written = export_backbone(_checkpoint(tmp_path, net), tmp_path / "out" / "backbone.pt")
    read = torch.load(tmp_path / "out" / "backbone.pt", weights_only=True)
    assert read.keys() == written.keys() == net.backbone.state_dict().keys()
    plain = timm.create_model("mobilenetv3_small_050", num_classes=0).eval()
    plain.load_state_dict(read)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(plain(x), net.backbone(x))
    again, _ = create_backbone("mobilenetv3_small_050")
    load_backbone(again, tmp_path / "out" / "backbone.pt")
    assert _same(again, plain)


def test_two_start_files_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Give backbone_ckpt .* or init_weights .*, not both"):
        MetricLearning("conv4", KWARGS, 1, init_weights="a.pt", backbone_ckpt="b.pt")


def test_pixels_are_the_image_itself() -> None:
    net, width = create_backbone("pixels", 2, kwargs={"input_size": 4})
    x = torch.rand(3, 2, 4, 4)
    assert width == 32
    assert torch.equal(net(x), x.flatten(1))
    with pytest.raises(ValueError, match="pixels has neither weights"):
        create_backbone("pixels", 2, pretrained=True)


class Evil:
    """Runs code when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("modern", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_a_file_that_would_run_code_is_not_run(tmp_path: Path, modern: bool, inside: bool) -> None:
    """Neither a pickled object nor one beside good weights."""
    net = MetricLearning("conv4", KWARGS, 1, embedding_dim=4)
    evil = Evil(tmp_path / "ran")
    content = {"state_dict": net.state_dict(), "extra": evil} if inside else evil
    torch.save(content, tmp_path / "evil.ckpt", _use_new_zipfile_serialization=modern)
    for load in (
        lambda: load_backbone(net.backbone, tmp_path / "evil.ckpt"),
        lambda: load_weights(net, tmp_path / "evil.ckpt"),
        lambda: export_backbone(tmp_path / "evil.ckpt", tmp_path / "out.pt"),
    ):
        with pytest.raises(
            ValueError, match=r"evil\.ckpt' holds more than tensors, .* save the state_dict\(\)"
        ):
            load()
    assert [p.name for p in tmp_path.iterdir()] == ["evil.ckpt"]


def test_files_of_older_torch_and_torn_ones(tmp_path: Path) -> None:
    net, _ = create_backbone("conv4", 1, kwargs=KWARGS)
    torch.save(net.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    target, _ = create_backbone("conv4", 1, kwargs=KWARGS)
    load_backbone(target, tmp_path / "old.pt")
    assert _same(target, net)
    for torn in (b"hello there", (tmp_path / "old.pt").read_bytes()[:-300], b""):
        (tmp_path / "torn.pt").write_bytes(torn)
        with pytest.raises(ValueError, match=r"torn\.pt' is no readable torch file: it is damaged"):
            load_backbone(target, tmp_path / "torn.pt")


def test_another_width_names_each_weight_once(tmp_path: Path) -> None:
    """A weight of another shape is in the file."""
    source = MetricLearning("conv4", {**KWARGS, "widths": [4, 16]}, 1, embedding_dim=4)
    target = MetricLearning("conv4", KWARGS, 1, embedding_dim=4)
    path = _checkpoint(tmp_path, source)
    for load in (lambda: load_backbone(target.backbone, path), lambda: load_weights(target, path)):
        with pytest.raises(
            ValueError, match=r"weight \(\(4, 1, 3, 3\) in the file, \(8, 1, 3, 3\) in"
        ) as told:
            load()
        assert "not in the file" not in str(told.value)
        assert "and 3 more" in str(told.value)  # first convolution and norm, and the second convolution


def test_a_training_file_of_timm_is_read(tmp_path: Path) -> None:
    """Its arguments lie beside the weights, as an argparse.Namespace."""
    net = MetricLearning("conv4", KWARGS, 1, embedding_dim=4)
    weights = {k: v + 1 for k, v in net.backbone.state_dict().items()}
    torch.save({"state_dict": weights, "args": Namespace(lr=0.1), "epoch": 3}, tmp_path / "timm.pth.tar")
    load_weights(net.backbone, tmp_path / "timm.pth.tar")
    assert all(torch.equal(v, weights[k]) for k, v in net.backbone.state_dict().items())


@pytest.mark.parametrize("method", ["MoCo", "SwAV", "MetricLearning"])
def test_what_belongs_to_another_run_is_made_anew(tmp_path: Path, method: str) -> None:
    """Memories and teachers, and what callbacks had attached, of whatever size; the rest must fit."""
    size = "memory_size" if method == "MetricLearning" else "queue_size"
    make = {"MoCo": MoCo, "SwAV": SwAV, "MetricLearning": MetricLearning}[method]
    source = make("conv4", KWARGS, 1, **{size: 24})
    for p in source.parameters():
        p.data += 1
    for name, value in source.state_dict().items():
        if name.startswith(("queue", "memory")):
            value.fill_(1)
    source.knn_bank, source.probes = FeatureBank(7, 3), nn.ModuleDict({"label": nn.Linear(3, 2)})
    path = _checkpoint(tmp_path, source)
    for length in (24, 40):
        target = make("conv4", KWARGS, 1, **{size: length})
        target.knn_bank = FeatureBank(9, 3)
        target.probes = nn.ModuleDict({"label": nn.Linear(3, 5)})
        before = {k: v.clone() for k, v in target.state_dict().items()}
        load_weights(target, path, made_anew=(*ATTACHED, *target.made_anew))
        for name, value in target.state_dict().items():
            own = name.startswith((*target.made_anew, "knn_bank", "probes"))
            assert torch.equal(value, before[name] if own else source.state_dict()[name]), name


def test_the_part_that_does_not_fit_is_named(tmp_path: Path) -> None:
    path = _checkpoint(tmp_path, MoCo("conv4", KWARGS, 1, projector_dim=16))
    words = r"projector\.\S+ .*Give projector the sizes that the file was made with"
    with pytest.raises(ValueError, match=words):
        load_weights(MoCo("conv4", KWARGS, 1, projector_dim=8), path, made_anew=MoCo.made_anew)
