"""Backbones, heads and start weights."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from torch import nn

from lightning_nrml.models import ConvNet, create_backbone, create_head, load_weights


@pytest.mark.parametrize(
    ("name", "channels", "size", "kwargs"),
    [
        ("resnet18", 1, 32, {}),
        ("resnet18", 13, 32, {}),
        ("vit_tiny_patch16_224", 3, 32, {"img_size": 32}),
        ("conv4", 1, 28, {"input_size": 28}),
        ("mobilenetv3_small_050", 3, 32, {}),
    ],
)
def test_num_features_is_the_width_of_the_output(name: str, channels: int, size: int, kwargs: dict) -> None:
    model, features = create_backbone(name, channels, kwargs=kwargs)
    out = model.eval()(torch.randn(2, channels, size, size))
    assert out.shape == (2, features)


def test_unknown_backbone_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'resnt18' is not a timm model.*resnet18"):
        create_backbone("resnt18")


def test_conv4_has_the_benchmark_shapes() -> None:
    assert ConvNet(1, (64, 128, 128, 128), (2, 2, 2, 2), 28).num_features == 512
    assert ConvNet(3, (32, 64, 128, 128), (2, 2, 2, 2), 48).num_features == 1152
    assert ConvNet(1, (32, 64), (1, 2), 8).num_features == 64 * 16


def test_conv4_refuses_another_image_size() -> None:
    with pytest.raises(ValueError, match=r"built for 28 x 28 images and got 32 x 32"):
        ConvNet(1, input_size=28)(torch.zeros(1, 1, 32, 32))


def test_conv4_refuses_one_stride_too_few() -> None:
    with pytest.raises(ValueError, match="4 entries and `strides` has 3"):
        ConvNet(strides=(2, 2, 2))


def test_head_kinds() -> None:
    assert create_head("linear", 8, 4)(torch.randn(3, 8)).shape == (3, 4)
    assert create_head("mlp", 8, 4, 16)(torch.randn(3, 8)).shape == (3, 4)
    x = torch.randn(3, 8)
    assert create_head("none", 8, 8)(x) is x
    with pytest.raises(ValueError, match="embedding_dim = 8"):
        create_head("none", 8, 4)


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = timm.create_model("conv4", in_chans=1, input_size=8, widths=(4,), strides=(2,))
        self.head = nn.Linear(64, 3)


def test_start_weights_from_arrays_fill_backbone_and_head(tmp_path) -> None:
    source, target = _Net(), _Net()
    arrays = {k.removeprefix("backbone."): v.numpy() for k, v in source.state_dict().items()}
    np.savez(tmp_path / "start.npz", **arrays)
    load_weights(target, tmp_path / "start.npz")
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value), name


def test_start_weights_that_do_not_fit_are_named(tmp_path) -> None:
    np.savez(tmp_path / "bad.npz", **{"head.weight": np.zeros((5, 64), np.float32)})
    with pytest.raises(ValueError, match=r"head\.weight \(\(5, 64\) in the file, \(3, 64\) in the model\)"):
        load_weights(_Net(), tmp_path / "bad.npz")
    with pytest.raises(FileNotFoundError, match=r"absent\.npz"):
        load_weights(_Net(), tmp_path / "absent.npz")


def test_start_weights_from_a_checkpoint_ignore_other_parts(tmp_path) -> None:
    source, target = _Net(), _Net()
    state = {**source.state_dict(), "memory.embedding": torch.zeros(3)}
    torch.save({"state_dict": state}, tmp_path / "run.ckpt")
    load_weights(target, tmp_path / "run.ckpt")
    assert torch.equal(target.head.weight, source.head.weight)


def test_omniglot_start_weights_fit_conv4(shared_data) -> None:
    path = shared_data("omniglot") / "simclr_start.npz"

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = ConvNet(1, input_size=28)
            self.head = nn.Linear(512, 128)

    net = Net()
    load_weights(net, path)
    with np.load(path) as data:
        assert np.array_equal(net.backbone.body[9].weight.detach().numpy(), data["body.9.weight"])
        assert np.array_equal(net.head.bias.detach().numpy(), data["head.bias"])
