import multiprocessing
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from lightning_nrml.data.bad_images import BadImageList
from lightning_nrml.data.dataset import IndexedDataset, identity
from lightning_nrml.data.sources import BadImageError, FileSource, MemorySource
from lightning_nrml.data.splits import Split

BROKEN = (1, 4)


@pytest.fixture
def split(tmp_path):
    """Six grey files whose value is their row; rows 1 and 4 are broken."""
    paths = [tmp_path / f"{i}.png" for i in range(6)]
    for i, path in enumerate(paths):
        if i in BROKEN:
            path.write_bytes(b"broken")
        else:
            Image.fromarray(np.full((2, 2), i, dtype=np.uint8)).save(path)
    return Split(FileSource(paths, channels=1), np.asarray([0, 0, 1, 0, 2, 1]))


def test_batches_come_whole_and_in_order():
    images = torch.arange(5, dtype=torch.uint8).reshape(5, 1, 1, 1)
    data = IndexedDataset(Split(MemorySource(images), np.arange(5) * 2, np.arange(5)))
    batch = data.__getitems__([3, 0])
    assert batch["image"].flatten().tolist() == [3, 0]
    assert (batch["label"].tolist(), batch["clean_label"].tolist(), batch["index"].tolist()) == (
        [6, 0],
        [3, 0],
        [3, 0],
    )
    one = data[2]
    assert (one["image"].shape, one["label"].item(), one["index"].item()) == ((1, 1, 1), 4, 2)


def test_multi_label_rows_keep_their_columns():
    label = np.asarray([[0, 1, 1], [1, 0, 0]])
    data = IndexedDataset(Split(MemorySource(torch.zeros(2, 1, 1, 1, dtype=torch.uint8)), label))
    assert data.__getitems__([1, 0])["label"].tolist() == [[1, 0, 0], [0, 1, 1]]


def test_raise_names_the_file_even_out_of_a_worker(split):
    data = IndexedDataset(split)
    with pytest.raises(BadImageError, match=r"1\.png"):
        data.__getitems__([0, 1])
    with pytest.raises(BadImageError, match=r"1\.png"):
        list(DataLoader(data, batch_size=6, collate_fn=identity, num_workers=1))


def test_a_broken_train_row_becomes_another_row_of_its_given_class_as_a_whole(split, tmp_path):
    listed = tmp_path / "bad.tsv"
    data = IndexedDataset(split, "skip", replace=True, bad_list=BadImageList(listed, "train"))
    batch = data.__getitems__([0, 1, 2, 1])
    # row 3 is the next of class 0
    assert batch["index"].tolist() == [0, 3, 2, 3]
    assert batch["image"][:, 0, 0, 0].tolist() == [0, 3, 2, 3]
    assert batch["label"].tolist() == [0, 0, 1, 0]
    # class 2 has no other row: the next readable one serves
    assert data.__getitems__([4])["index"].tolist() == [5]
    lines = listed.read_text().splitlines()
    assert lines[0] == "split\tindex\tpath\treason"
    assert [line.split("\t")[:3] for line in lines[1:]] == [
        ["train", str(i), str(tmp_path / f"{i}.png")] for i in (1, 4)
    ]
    assert lines[1].split("\t")[3].startswith(f"cannot read {tmp_path / '1.png'} (")
    assert "on_bad_image" not in lines[1]
    # another process that meets it does not write it again
    again = IndexedDataset(split, "skip", bad_list=BadImageList(listed, "train"))
    again.__getitems__([0, 1])
    assert listed.read_text().splitlines() == lines
    replace(again.bad_list, split="test").add(str(tmp_path / "1.png"), "missing")
    assert listed.read_text().splitlines()[3:] == [f"test\t\t{tmp_path / '1.png'}\tmissing"]


def test_a_broken_evaluation_row_is_left_out(split):
    data = IndexedDataset(split, "skip")
    assert data.__getitems__([0, 1, 2])["index"].tolist() == [0, 2]
    empty = data.__getitems__([4])
    assert empty["image"].shape == (0, 1, 2, 2)
    assert len(empty["label"]) == len(empty["index"]) == 0


def test_workers_survive_and_all_list_what_they_met(split, tmp_path):
    listed = tmp_path / "bad.tsv"
    data = IndexedDataset(split, "skip", replace=True, bad_list=BadImageList(listed, "train"))
    loader = DataLoader(data, batch_size=3, collate_fn=identity, num_workers=2)
    rows = torch.cat([batch["index"] for batch in loader]).tolist()
    assert rows == [0, 3, 2, 3, 5, 5]
    assert sorted(line.split("\t")[1] for line in listed.read_text().splitlines()[1:]) == ["1", "4"]


def add_many(listed, barrier):
    for i in range(40):
        barrier.wait()
        BadImageList(listed, "train").add(f"{i}.png", "broken", i)


def test_processes_that_list_the_same_images_write_each_once(tmp_path):
    listed = tmp_path / "bad.tsv"
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    processes = [context.Process(target=add_many, args=(listed, barrier)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    rows = [line.split("\t") for line in listed.read_text().splitlines()]
    assert sorted(rows[1:]) == sorted(["train", str(i), f"{i}.png", "broken"] for i in range(40))
    assert rows[0] == ["split", "index", "path", "reason"]


def test_nothing_readable_at_all_is_an_error(tmp_path):
    paths = [tmp_path / "0.png", tmp_path / "1.png"]
    data = IndexedDataset(Split(FileSource(paths), np.zeros(2, dtype=int)), "skip", replace=True)
    with pytest.raises(BadImageError, match="none of the 2 images"):
        data.__getitems__([0])
