"""``nrml embed`` and ``nrml export``: a trained net leaves the package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from lightning_nrml import MetricLearning
from lightning_nrml.callbacks.predictions import cosine_index, write_index
from lightning_nrml.metrics import topk_search
from lightning_nrml.modules import MultiLabel
from lightning_nrml.modules.deploy import Deployed, export_onnx

CONFIG = """\
data:
  class_path: FolderDataModule
  init_args:
    root: photos
    split: images
    image_size: 8
    batch_size: 4
    eval_view:
      class_path: lightning_nrml.data.views.EvalView
      init_args: {size: 8, mean: [0.5, 0.4, 0.3], std: [0.2, 0.3, 0.4]}
model:
  class_path: MetricLearning
  init_args:
    backbone: conv4
    backbone_kwargs: {input_size: 8, widths: [4, 6], strides: [2, 2]}
    embedding_dim: 5
    memory_size: 16
trainer:
  max_epochs: 1
  accelerator: cpu
  enable_progress_bar: false
  callbacks:
    - class_path: PRISM
checkpoint_best: {monitor: null}
run_card: {show: false}
"""
RUN = "--ckpt_path=runs/photos"


@pytest.fixture
def photos(folder):
    """A folder of images and a config for them."""
    g = np.random.default_rng(0)
    for i in range(20):
        path = folder / "photos" / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(g.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(path)
    (folder / "photos.yaml").write_text(CONFIG)
    return folder


@pytest.fixture
def trained(nrml, photos):
    """A run in ``runs/photos`` with a filter, whose state no other verb attaches."""
    code, _, err = nrml("fit", "--config", "photos.yaml")
    assert code == 0, err
    return photos


def read(place: Path) -> tuple[np.ndarray, pd.DataFrame]:
    return np.load(place / "embeddings.npy"), pd.read_parquet(place / "index.parquet")


def test_splits_and_other_images_are_embedded_alike(nrml, trained):
    for args in (("--split=train", "--out=train"), ("--images=photos/b", "--out=b"), ()):
        code, _, err = nrml("embed", RUN, *args)
        assert code == 0, err
    rows, index = read(trained / "train")
    others, named = read(trained / "b")
    assert read(trained / "runs/photos/embed")[0].shape == (10, 5)
    assert list(index.columns) == ["index", "label", "path"]
    assert list(named.columns) == ["index", "path"]
    assert named["path"].tolist() == [f"{i:02d}.png" for i in range(1, 20, 2)]
    own = {f"b/{name}": row for name, row in zip(named["path"], others, strict=True)}
    both = [name for name in index["path"] if name in own]
    assert len(both) == 5
    for row, name in zip(rows, index["path"], strict=True):
        if name in own:
            np.testing.assert_allclose(row, own[name], atol=1e-6)


def test_the_index_finds_what_exact_search_finds(nrml, trained):
    faiss = pytest.importorskip("faiss")
    assert nrml("embed", RUN, "--split=train")[0] == 0
    rows, _ = read(trained / "runs/photos/embed")
    cosine, found = faiss.read_index(str(trained / "runs/photos/embed/embeddings.faiss")).search(rows, 3)
    expected, neighbours = topk_search(torch.from_numpy(rows), torch.from_numpy(rows), 3)
    np.testing.assert_allclose(cosine, expected, atol=1e-6)
    assert (found == neighbours.numpy()).mean() > 0.9  # but for ties
    assert nrml("embed", RUN, "--out=bare", "--faiss=null")[0] == 0
    assert not (trained / "bare/embeddings.faiss").exists()


def test_an_index_holds_cosines_whatever_the_length_of_the_rows(tmp_path):
    faiss = pytest.importorskip("faiss")
    rows = np.array([[3.0, 0.0], [0.0, 0.5], [2.0, 2.0]], dtype=np.float32)
    write_index(tmp_path / "x.faiss", rows, "Flat")
    cosine, found = faiss.read_index(str(tmp_path / "x.faiss")).search(np.array([[1.0, 0]], np.float32), 3)
    assert found.tolist() == [[0, 2, 1]]
    np.testing.assert_allclose(cosine, [[1, 0.5**0.5, 0]], atol=1e-6)
    assert rows[0, 0] == 3
    with pytest.raises(ValueError, match=r"'IVF64,Flat' of 3 rows \(Number of training points \(3\)"):
        write_index(tmp_path / "y.faiss", rows, "IVF64,Flat")
    with pytest.raises(ValueError, match="cannot build the index 'Quark' for 2 numbers"):
        cosine_index("Quark", 2)
    assert [path.name for path in tmp_path.iterdir()] == ["x.faiss"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("embed", "--images=nonesuch"), "no folder or image nonesuch"),
        (("embed", "--images=photos", "--split=train"), "--images photos are part of no split"),
        (("embed", "--split=7"), "split cannot be '7'; accepted: test, train, val."),
        (("embed", "--faiss=Quark"), "faiss cannot build the index 'Quark'"),
        (("export", "--out=net.zip"), "--out net.zip: name a file that ends in .onnx, .pt or .pth."),
    ],
)
def test_slips_are_told_in_a_sentence(nrml, photos, args, words):
    code, _, err = nrml(args[0], "--config=photos.yaml", "--ckpt_path=init", *args[1:])
    assert code == 2
    assert words in err.strip().splitlines()[-1]
    assert not list(photos.rglob("embeddings.npy"))


def test_the_exported_net_gives_the_embeddings_of_the_run(nrml, trained):
    ort = pytest.importorskip("onnxruntime")
    code, out, err = nrml("export", RUN)
    assert code == 0, err
    assert "float32, any number x 3 x 8 x 8, values in [0, 1]; normalised within" in out
    assert float(out.split()[-1]) < 1e-5
    assert nrml("embed", RUN, "--images=photos")[0] == 0
    rows, index = read(trained / "runs/photos/embed")
    images = [np.asarray(Image.open(trained / "photos" / name)) for name in index["path"]]
    batch = np.stack(images).transpose(0, 3, 1, 2).astype(np.float32) / 255
    session = ort.InferenceSession(trained / "runs/photos/export/model.onnx")
    for part in (slice(0, 1), slice(0, 20)):
        (found,) = session.run(["embedding"], {"image": batch[part]})
        np.testing.assert_allclose(found, rows[part], atol=1e-5)


def test_the_exported_backbone_is_the_runs(nrml, trained):
    assert nrml("export", RUN, "--out=deep/backbone.pt")[0] == 0
    state = torch.load(trained / "deep/backbone.pt", weights_only=True)
    saved = torch.load(trained / "runs/photos/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert state
    assert all(torch.equal(value, saved[f"backbone.{key}"]) for key, value in state.items())
    assert len(state) == sum(key.startswith("backbone.") for key in saved)


def test_probabilities_are_exported_too(tmp_path):
    ort = pytest.importorskip("onnxruntime")
    small = {"input_size": 8, "widths": [4, 6], "strides": [2, 2]}
    net = Deployed(MultiLabel(backbone="conv4", backbone_kwargs=small, num_classes=3, in_channels=4))
    assert export_onnx(net, (4, 8, 8), tmp_path / "net.onnx") < 1e-5
    images = torch.randn(5, 4, 8, 8)
    names = ["embedding", "probability"]
    found = ort.InferenceSession(tmp_path / "net.onnx").run(names, {"image": images.numpy()})
    with torch.no_grad():
        expected = net(images)
    assert list(expected) == names
    for value, want in zip(found, expected.values(), strict=True):
        np.testing.assert_allclose(value, want, atol=1e-5)


def test_a_net_for_export_evaluates_and_normalises():
    module = MetricLearning(
        backbone="conv4",
        backbone_kwargs={"input_size": 8, "widths": [4], "strides": [2]},
        embedding_dim=4,
        num_classes=2,
    )
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])
    net = Deployed(module.train(), mean, std)
    image = torch.rand(2, 3, 8, 8)
    expected = module.eval().embed((image - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1))
    assert torch.equal(net(image)["embedding"], expected)
    assert not net.training
