import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image

from lightning_nrml.data import MPerClassSampler, NoiseConfig, NRMLDataModule, ShuffleSampler, Split, Splits
from lightning_nrml.data.sources import BadImageError, FileSource, MemorySource
from lightning_nrml.data.tables import write_label_table
from lightning_nrml.data.views import EvalView, HorizontalFlip, MetricView, RandomAffine, ViewKey, Views


class Toy(NRMLDataModule):
    """40 train images of 8 classes; 4 x 4 grey; value = row."""

    loads = 0

    def __init__(self, val=False, zero_shot=False, clean=None, **kwargs):
        kwargs = {"batch_size": 8, "eval_batch_size": 16} | kwargs
        super().__init__(**kwargs)
        self.val, self.zero_shot, self.clean = val, zero_shot, clean

    def split(self, n, offset=0):
        images = torch.arange(n, dtype=torch.uint8).reshape(n, 1, 1, 1).expand(n, 1, 4, 4).clone()
        return Split(MemorySource(images), np.arange(n) % 8 + offset, paths=[f"{i}.png" for i in range(n)])

    def load_splits(self):
        self.loads += 1
        train = self.split(40)
        train.clean_label = self.clean
        test = self.split(21, 8 if self.zero_shot else 0)
        names = [f"c{i}" for i in range(8)]
        return Splits(train, test, 8, self.split(10) if self.val else None, names, self.zero_shot)


class FileToy(NRMLDataModule):
    def __init__(self, folder, **kwargs):
        super().__init__(batch_size=4, **kwargs)
        self.folder = folder

    def load_splits(self):
        def part(name, n):
            source = FileSource([self.folder / f"{name}{i}.png" for i in range(n)], 1)
            return Split(source, np.arange(n) % 3, paths=[f"{name}{i}.png" for i in range(n)])

        return Splits(part("train", 12), part("test", 6), 3)


@pytest.fixture
def folder(tmp_path):
    for name, n in (("train", 12), ("test", 6)):
        for i in range(n):
            Image.fromarray(np.full((4, 4), i, dtype=np.uint8)).save(tmp_path / f"{name}{i}.png")
    return tmp_path


class Net(LightningModule):
    """Records the batches it meets."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(16, 2)
        self.seen = {"train": [], "val": [], "test": [], "predict": []}

    def training_step(self, batch, _):
        self.seen["train"].append(batch)
        return self.layer(batch["image"].flatten(1)).square().mean()

    def validation_step(self, batch, _):
        self.seen["val"].append(batch)

    def test_step(self, batch):
        self.seen["test"].append(batch)

    def predict_step(self, batch, _):
        self.seen["predict"].append(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(path, **kwargs):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", default_root_dir=path, enable_checkpointing=False, **quiet, **kwargs)


def fake_trainer(rank=0, epoch=0, batch=0, training=True):
    progress = SimpleNamespace(current=SimpleNamespace(ready=batch))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    return SimpleNamespace(fit_loop=loop, current_epoch=epoch, global_rank=rank, training=training)


AFFINE = MetricView(4, crop_scale=None, flip=0.0, degrees=45, translate=0.3)


# ---- settings and labels ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 10, "m_per_class": 4}, "batch_size 10 must be a multiple of m_per_class 4"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"epoch_length": 64}, "epoch_length needs m_per_class"),
        ({"on_bad_image": "ignore"}, "must be 'raise' or 'skip'"),
        ({"cache": "yes"}, "cache must be 'auto'"),
    ],
)
def test_impossible_settings_are_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        Toy(**settings)


def test_overfit_batches_is_refused(tmp_path):
    """Lightning's sampler in the place of ours ended in an AttributeError."""
    with pytest.raises(ValueError, match=r"overfit_batches .* use trainer\.limit_train_batches"):
        trainer(tmp_path, max_epochs=1, overfit_batches=2).fit(Net(), Toy())


def test_labels_are_loaded_once_and_known_before_setup():
    dm = Toy(noise=NoiseConfig("symmetric", 0.5, seed=1))
    assert dm.loads == 0
    assert (dm.num_classes, dm.in_channels, dm.num_train_samples) == (8, 1, 40)
    before = dm.train_label.clone()
    for stage in ("fit", "fit", "test", None):
        dm.setup(stage)
    assert dm.loads == 1
    assert torch.equal(dm.train_label, before)
    assert dm.class_names[3] == "c3"
    assert dm.train_paths[39] == "39.png"
    assert dm.train_keep.dtype is torch.bool
    assert int(dm.train_keep.sum()) == 40


def test_noise_reaches_train_labels_and_batches_but_no_evaluation_split():
    dm = Toy(val=True, noise=NoiseConfig("symmetric", 0.5, seed=1))
    clean = np.arange(40) % 8
    assert np.array_equal(dm.train_clean_label, clean)
    assert torch.equal(dm.train_is_noise, dm.train_label != dm.train_clean_label)
    assert 5 < int(dm.train_is_noise.sum()) < 35
    for batch in dm.train_dataloader():
        assert torch.equal(batch["label"], dm.train_label[batch["index"]])
        assert torch.equal(batch["clean_label"], dm.train_clean_label[batch["index"]])
        assert torch.equal(batch["image"][:, 0, 0, 0].long(), batch["index"])
    for loader, n in ((dm.val_dataloader(), 10), (dm.test_dataloader(), 21)):
        batches = list(loader)
        assert torch.cat([b["label"] for b in batches]).tolist() == (np.arange(n) % 8).tolist()
        assert "clean_label" not in batches[0]


def test_summary_tells_kind_rate_and_hash():
    plain = Toy().noise_summary
    assert plain["kind"] == "none"
    assert plain["rate_realised"] is None
    noisy = Toy(noise=NoiseConfig("symmetric", 0.5, seed=1)).noise_summary
    assert (noisy["kind"], noisy["rate_requested"], noisy["num_classes"], noisy["num_train"]) == (
        "symmetric",
        0.5,
        8,
        40,
    )
    assert noisy["hash"] == Toy(seed=9, noise=NoiseConfig("symmetric", 0.5, seed=1)).noise_summary["hash"]
    assert noisy["hash"] != Toy(noise=NoiseConfig("symmetric", 0.5, seed=2)).noise_summary["hash"]
    human = Toy(clean=np.zeros(40, dtype=int)).noise_summary
    assert human["kind"] == "given"
    assert human["rate_realised"] == pytest.approx(35 / 40)


def test_noise_on_labels_that_are_noisy_already_is_refused():
    dm = Toy(clean=np.arange(40) % 8, noise=NoiseConfig("symmetric", 0.1))
    with pytest.raises(ValueError, match="the train labels are noisy already"):
        dm.num_classes


@pytest.mark.parametrize("by_path", [False, True])
def test_a_label_table_replaces_the_train_labels(tmp_path, by_path):
    given = (np.arange(40) + (np.arange(40) < 10)) % 8
    order = np.random.default_rng(0).permutation(40)
    name = {"path": [f"{i}.png" for i in order]} if by_path else {"index": order}
    write_label_table(tmp_path / "t.csv", name | {"label": given[order]})
    dm = Toy(noise=str(tmp_path / "t.csv"))
    assert dm.train_label.tolist() == given.tolist()
    assert dm.noise_summary["kind"] == "table"
    # nothing says that the labels which the table replaces were right
    assert (dm.train_clean_label, dm.train_is_noise, dm.noise_summary["rate_realised"]) == (None, None, None)
    assert dm.num_changed_labels == 10


@pytest.mark.parametrize(
    ("says", "known"),
    [
        ({}, False),
        ({"clean_label": np.arange(40) % 8}, True),
        ({"clean_label": np.where(np.arange(40) == 39, -1, np.arange(40) % 8)}, False),
        ({"clean_known": np.ones(40, dtype=bool)}, True),
        ({"clean_known": np.arange(40) < 39}, False),
        ({"is_noise": np.arange(40) < 10}, True),
        ({"given_label": np.arange(40) % 8}, False),  # a corrected table of labels that nobody has checked
    ],
)
def test_the_truth_is_known_where_data_set_or_table_say_so(tmp_path, says, known):
    own = np.arange(40) % 8
    given = (np.arange(40) + (np.arange(40) < 10)) % 8
    write_label_table(tmp_path / "t.csv", {"index": np.arange(40), "label": given} | says)
    dm = Toy(noise=str(tmp_path / "t.csv"))
    assert dm.train_label.tolist() == given.tolist()
    assert (dm.train_clean_label is not None) == known
    if known:
        assert dm.train_is_noise.tolist() == (given != own).tolist()
    # a data set with true labels knows them under any table
    assert Toy(clean=own, noise=str(tmp_path / "t.csv")).train_clean_label.tolist() == own.tolist()


def test_small_cluster_noise_lowers_the_number_of_classes_without_a_network():
    dm = Toy(zero_shot=True, noise=NoiseConfig("small_cluster", 0.25, seed=0))
    assert dm.num_classes == 6
    assert len(dm.class_names) == 6
    assert int(dm.train_label.max()) == 5
    assert int(dm.train_is_noise.sum()) == 10
    assert set(dm.train_clean_label[dm.train_is_noise].tolist()) == {-1}


def test_keep_can_be_read_first_and_the_base_class_says_what_it_lacks():
    assert Toy().train_keep.tolist() == [True] * 40
    with pytest.raises(NotImplementedError, match="must implement load_splits"):
        NRMLDataModule().num_classes


# ---- loaders ---------------------------------------------------------------------------------------


def test_sampler_kinds_epoch_length_and_keep():
    plain, classes = Toy(), Toy(m_per_class=4, epoch_length=16)
    assert isinstance(plain.train_dataloader().sampler, ShuffleSampler)
    assert len(plain.train_dataloader()) == 5
    loader = classes.train_dataloader()
    assert classes.train_sampler is loader.sampler
    assert isinstance(loader.sampler, MPerClassSampler)
    assert len(loader) == 2
    for batch in loader:
        assert torch.unique(batch["label"], return_counts=True)[1].tolist() == [4, 4]
    loader = plain.train_dataloader()
    plain.train_keep[:] = torch.arange(40) >= 16  # in place, while the loader lives
    assert all(int(b["index"].min()) >= 16 for b in loader)
    assert len(loader) == 3


def test_evaluation_is_in_order_and_whole_and_embeds_the_train_split():
    dm = Toy()
    for loader, n in ((dm.test_dataloader(), 21), (dm.predict_dataloader(), 21), (dm.embed_dataloader(), 40)):
        assert torch.cat([b["index"] for b in loader]).tolist() == list(range(n))
    dm.train_keep[:] = False
    assert sum(len(b["index"]) for b in dm.embed_dataloader()) == 40


def test_the_test_split_serves_for_validation_if_there_is_no_other():
    def rows(dm):
        return sum(len(b["index"]) for b in dm.val_dataloader())

    assert rows(Toy()) == 21
    assert rows(Toy(val=True)) == 10
    dm = Toy()
    dm.splits.test = None
    assert dm.val_dataloader() == []
    with pytest.raises(ValueError, match="Toy has no test split"):
        dm.test_dataloader()


def test_workers_give_the_same_batches():
    here = [b["index"].tolist() for b in Toy(seed=4).train_dataloader()]
    assert [b["index"].tolist() for b in Toy(seed=4, num_workers=2).train_dataloader()] == here


# ---- views -----------------------------------------------------------------------------------------


def test_training_sees_the_train_view_and_evaluation_the_other(tmp_path):
    dm = Toy(train_view=Views([[HorizontalFlip(1.0)]], (0.5,), (0.5,)), eval_view=EvalView(2))
    net = Net()
    run = trainer(tmp_path, max_epochs=1)
    run.fit(net, dm)
    run.test(net, dm)
    run.predict(net, dm)
    assert len(net.seen["train"]) == 5
    for batch in net.seen["train"]:
        expected = (batch["index"].float() / 255 - 0.5) / 0.5
        assert torch.allclose(batch["image"], expected[:, None, None, None].expand(-1, 1, 4, 4), atol=1e-6)
    # 2 batches of the sanity check and 2 of the epoch
    for stage, count in (("val", 4), ("test", 2), ("predict", 2)):
        assert len(net.seen[stage]) == count
        for batch in net.seen[stage]:
            assert batch["image"].shape[1:] == (1, 2, 2)
            assert torch.allclose(batch["image"][:, 0, 0, 0] * 255, batch["index"].float(), atol=1e-3)


def test_random_views_are_named_by_epoch_and_batch_in_a_real_run(tmp_path):
    dm, net = Toy(train_view=AFFINE, seed=3), Net()
    trainer(tmp_path, max_epochs=2, limit_val_batches=0).fit(net, dm)
    raw = Toy().splits.train.images
    assert len(net.seen["train"]) == 10
    for number, batch in enumerate(net.seen["train"]):
        key = ViewKey(seed=3, epoch=number // 5, batch=number % 5)
        (expected,) = AFFINE(raw.get(batch["index"].tolist()), key)
        assert torch.equal(batch["image"], expected)


def test_two_ranks_of_four_see_the_views_of_one_process_of_eight():
    images = torch.randint(0, 256, (8, 1, 4, 4), dtype=torch.uint8)
    whole = Toy(batch_size=8, train_view=AFFINE)
    whole.trainer = fake_trainer(batch=2)
    expected = whole.on_after_batch_transfer({"image": images}, 0)["image"]
    parts = []
    for rank in range(2):
        dm = Toy(batch_size=4, train_view=AFFINE)
        dm.trainer = fake_trainer(rank=rank, batch=2)
        parts.append(dm.on_after_batch_transfer({"image": images[4 * rank : 4 * rank + 4]}, 0)["image"])
    assert torch.equal(torch.cat(parts), expected)
    whole.trainer = fake_trainer(batch=3)
    assert not torch.equal(whole.on_after_batch_transfer({"image": images}, 0)["image"], expected)


def test_several_views_come_as_a_list_with_the_first_as_the_image():
    ops = [RandomAffine(degrees=30, translate=0.2)]
    dm = Toy(train_view=Views([ops, ops]))
    dm.trainer = fake_trainer()
    batch = dm.on_after_batch_transfer({"image": dm.splits.train.images.get(range(8)), "label": 1}, 0)
    assert len(batch["views"]) == 2
    assert batch["image"] is batch["views"][0]
    assert not torch.equal(*batch["views"])
    assert batch["label"] == 1


def test_without_a_trainer_and_for_foreign_batches_nothing_random_happens():
    dm = Toy()
    batch = next(iter(dm.test_dataloader()))
    assert torch.allclose(
        dm.on_after_batch_transfer(batch, 0)["image"], batch["image"].float() / 255, atol=1e-6
    )
    assert dm.on_after_batch_transfer([1, 2], 0) == [1, 2]
    empty = {"image": torch.empty(0, 1, 4, 4, dtype=torch.uint8)}
    assert dm.on_after_batch_transfer(empty, 0)["image"].shape == (0, 1, 4, 4)


# ---- unreadable images -----------------------------------------------------------------------------


def test_missing_images_stop_with_the_path_and_the_way_out(folder):
    (folder / "train5.png").unlink()
    (folder / "train7.png").unlink()
    with pytest.raises(
        BadImageError, match=r"2 of 12 train images are missing.*train5\.png.*on_bad_image: skip"
    ):
        FileToy(folder).num_classes


def test_skip_leaves_missing_images_out_without_moving_the_noise(folder, tmp_path):
    noise = NoiseConfig("symmetric", 0.5, seed=2)
    full = FileToy(folder, noise=noise)
    full_label = full.train_label.numpy()
    (folder / "train5.png").unlink()
    (folder / "test0.png").unlink()
    dm = FileToy(folder, noise=noise, on_bad_image="skip")
    dm.trainer = SimpleNamespace(default_root_dir=str(tmp_path / "run"), training=False)
    dm.trainer.fit_loop = SimpleNamespace()
    with pytest.warns(UserWarning, match="left out 1 missing"):
        dm.setup("fit")
    assert dm.num_train_samples == len(dm.train_keep) == 11
    assert dm.train_label.tolist() == np.delete(full_label, 5).tolist()
    assert "train5.png" not in dm.train_paths
    assert torch.cat([b["image"][:, 0, 0, 0] for b in dm.test_dataloader()]).tolist() == [1, 2, 3, 4, 5]
    lines = (tmp_path / "run" / "bad_images.tsv").read_text().splitlines()
    assert [line.split("\t") for line in lines] == [
        ["split", "index", "path", "reason"],
        ["train", "", str(folder / "train5.png"), "missing"],
        ["test", "", str(folder / "test0.png"), "missing"],
    ]


@pytest.mark.filterwarnings("ignore:left out")
@pytest.mark.parametrize("truth", [False, True])
def test_a_table_made_without_the_missing_images_fits_where_they_are_missing(folder, tmp_path, truth):
    """Such as the corrected labels of an audit, whose positions are those of the images that are there."""
    (folder / "train5.png").unlink()
    before = FileToy(folder, on_bad_image="skip")
    label = (before.train_label + 1) % 3
    columns = {"index": range(11), "path": before.train_paths, "label": label, "keep": np.arange(11) != 7}
    if truth:
        columns |= {"clean_label": before.train_label, "is_noise": label >= 0}
    table = write_label_table(tmp_path / "t.csv", columns)
    dm = FileToy(folder, on_bad_image="skip", noise=str(table))
    assert dm.train_paths == before.train_paths
    assert dm.train_label.tolist() == label.tolist()
    assert dm.train_keep.tolist() == [i != 7 for i in range(11)]
    assert dm.num_changed_labels == 11
    assert (dm.noise_summary["rate_realised"], dm.num_classes) == (1.0 if truth else None, 3)
    # one that knows them all fits, too
    full = {"index": range(12), "path": [f"train{i}.png" for i in range(12)], "label": [0] * 12}
    dm = FileToy(folder, on_bad_image="skip", noise=str(write_label_table(tmp_path / "full.csv", full)))
    assert dm.train_label.tolist() == [0] * 11
    # where nothing is skipped every sample needs its row
    Image.new("L", (4, 4)).save(folder / "train5.png")
    for on_bad_image in ("skip", "raise"):
        with pytest.raises(ValueError, match="no row for 1 of 12 training samples, the first is index 5"):
            FileToy(folder, on_bad_image=on_bad_image, noise=str(table)).num_classes


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_training_survives_corrupt_images_and_lists_them(folder, tmp_path, cache, workers):
    for name in ("train3", "test2"):
        (folder / f"{name}.png").write_bytes(b"broken")
    run = tmp_path / "run"
    run.mkdir()
    dm, net = FileToy(folder, on_bad_image="skip", cache=cache, num_workers=workers), Net()
    trainer(run, max_epochs=2, limit_val_batches=0).fit(net, dm)
    index = torch.cat([b["index"] for b in net.seen["train"]])
    assert len(index) == 24
    assert 3 not in index
    assert torch.cat([b["index"] for b in dm.test_dataloader()]).tolist() == [0, 1, 3, 4, 5]
    rows = [line.split("\t") for line in (run / "bad_images.tsv").read_text().splitlines()[1:]]
    assert [row[:3] for row in rows] == [
        ["train", "3", str(folder / "train3.png")],
        ["test", "2", str(folder / "test2.png")],
    ]
    assert all(row[3].startswith(f"cannot read {row[2]} (") for row in rows)
    # another fit in the same folder begins anew
    (folder / "train3.png").write_bytes((folder / "train4.png").read_bytes())
    again = FileToy(folder, on_bad_image="skip", cache=cache)
    trainer(run, max_epochs=2, limit_val_batches=0).fit(Net(), again)
    assert not (run / "bad_images.tsv").exists()


@pytest.mark.parametrize("cache", [True, False])
def test_corrupt_images_stop_with_their_name_by_default(folder, tmp_path, cache):
    (folder / "train3.png").write_bytes(b"broken")
    with pytest.raises(BadImageError, match=r"cannot read .*train3\.png"):
        trainer(tmp_path, max_epochs=1).fit(Net(), FileToy(folder, cache=cache))


# ---- checkpoints and command line ------------------------------------------------------------------


def test_resuming_on_other_labels_warns():
    state = Toy().state_dict()
    other = Toy(noise=NoiseConfig("symmetric", 0.5))
    other.trainer = fake_trainer(training=True)
    with pytest.warns(UserWarning, match="resuming on other train labels"):
        other.load_state_dict(state)
    other.trainer = fake_trainer(training=False)
    same = Toy()
    same.trainer = fake_trainer(training=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(state)
        same.load_state_dict(state)


def test_flat_yaml_reaches_the_base_arguments_and_views(tmp_path):
    from jsonargparse import ArgumentParser

    from lightning_nrml.data import DigitsDataModule

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(NRMLDataModule, "data")
    (tmp_path / "c.yaml").write_text(
        """
data:
  class_path: lightning_nrml.data.DigitsDataModule
  init_args:
    batch_size: 32
    m_per_class: 4
    noise: {kind: symmetric, rate: 0.5, seed: 1}
    train_view: {class_path: lightning_nrml.data.views.MetricView, init_args: {size: 8, flip: 0.0}}
"""
    )
    config = parser.parse_args(["--config", str(tmp_path / "c.yaml"), "--data.cache", "false"])
    dm = parser.instantiate_classes(config).data
    assert isinstance(dm, DigitsDataModule)
    assert (dm.batch_size, dm.m_per_class, dm.cache) == (32, 4, False)
    assert dm.noise == NoiseConfig("symmetric", 0.5, 1)
    assert isinstance(dm._views["train"], MetricView)
    table = parser.parse_args(["--data", "lightning_nrml.data.DigitsDataModule", "--data.noise", "t.csv"])
    assert parser.instantiate_classes(table).data.noise.table == "t.csv"
