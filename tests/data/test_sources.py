import io

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_nrml.data.decode import to_tensor
from lightning_nrml.data.sources import (
    BadImageError,
    FileSource,
    JpegSource,
    MemorySource,
    cached,
    decoded_bytes,
    pixel_embedding,
)


def picture(seed, height=12, width=20):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encode(pixels, kind="PNG", **options):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


def concatenated(files):
    offsets = np.cumsum([0, *map(len, files)])
    return np.frombuffer(b"".join(files), dtype=np.uint8), offsets


@pytest.fixture
def files(tmp_path):
    paths = []
    for i in range(4):
        paths.append(tmp_path / f"{i}.png")
        paths[-1].write_bytes(encode(picture(i)))
    return paths


def test_memory_returns_rows_in_the_order_asked_for_and_subsets_keep_bad_rows():
    images = torch.arange(5, dtype=torch.uint8).reshape(5, 1, 1, 1)
    source = MemorySource(images, bad={3: "number three is broken"})
    assert source.get([4, 0, 4]).flatten().tolist() == [4, 0, 4]
    part = source.subset(np.asarray([3, 1]))
    assert part.get([1]).item() == 1
    with pytest.raises(BadImageError, match="number three"):
        part.get([1, 0])
    raster = MemorySource(images.float() * 1000)  # float32 is for rasters, whose values are physical
    assert raster.dtype == torch.float32
    assert raster.get([4]).item() == 4000
    for refused in (torch.float64, torch.float16, torch.complex64, torch.int64):
        with pytest.raises(TypeError, match=f"must be uint8.*got {refused}"):
            MemorySource(images.to(refused))
    with pytest.raises(TypeError, match=r"must be uint8 \(N, C, H, W\)"):
        MemorySource(images[0])


@pytest.mark.parametrize("size", [0, -8, (16, 0)])
def test_sizes_without_pixels_are_refused(files, size):
    with pytest.raises(ValueError, match=r"^image_size must be at least 1 pixel, got "):
        FileSource(files, image_size=size)


def test_encoded_images_decode_to_the_pixels_that_pillow_gives():
    pixels = [picture(i) for i in range(3)]
    jpegs = [encode(p, "JPEG", quality=90) for p in pixels]
    source = JpegSource(*concatenated(jpegs))
    batch = source.get([2, 0])
    assert batch.shape == (2, 3, 12, 20)
    expected = np.asarray(Image.open(io.BytesIO(jpegs[2])))
    assert np.array_equal(batch[0].permute(1, 2, 0).numpy(), expected)
    assert torch.equal(source.subset(np.asarray([2])).get([0])[0], batch[0])
    assert source.subset(np.asarray([2])).name(0) == "image 2 of the array"


def test_offsets_that_leave_the_buffer_are_refused():
    buffer, offsets = concatenated([encode(picture(0))])
    with pytest.raises(ValueError, match="offsets of the array must rise"):
        JpegSource(buffer[:-1], offsets)


def test_crop_keeps_the_centre_square_and_squash_keeps_everything(tmp_path):
    pixels = np.zeros((8, 24, 3), dtype=np.uint8)
    pixels[:, :8, 0], pixels[:, 8:16, 1], pixels[:, 16:, 2] = 255, 255, 255  # red, green, blue thirds
    (tmp_path / "a.png").write_bytes(encode(pixels))
    crop = FileSource([tmp_path / "a.png"], image_size=8).get([0])[0]
    assert crop[1].min() == 255
    assert crop[0].max() == crop[2].max() == 0
    squash = FileSource([tmp_path / "a.png"], image_size=(8, 3), fit="squash").get([0])[0]
    assert squash.shape == (3, 8, 3)
    assert squash.argmax(0)[0].tolist() == [0, 1, 2]
    grey = FileSource([tmp_path / "a.png"], channels=1, image_size=4).get([0])
    assert grey.shape == (1, 1, 4, 4)


@pytest.mark.parametrize("size", [28, 100, 224])
def test_crop_takes_an_image_of_any_sides(size):
    """29 x 42 among them: the centre of some began at -2e-15, which Pillow refuses."""
    for width in range(20, 130):
        for height in (width // 2, width, width + 13):
            image = to_tensor(Image.new("RGB", (width, height)), 3, (size, size))
            assert image.shape == (3, size, size)


def test_large_jpegs_are_shrunk_while_decoding_without_changing_the_picture_much(tmp_path):
    y, x = np.mgrid[0:512, 0:512]
    smooth = np.stack([y // 2, x // 2, (x + y) // 4], -1).astype(np.uint8)
    (tmp_path / "a.jpg").write_bytes(encode(smooth, "JPEG", quality=95))
    ours = FileSource([tmp_path / "a.jpg"], image_size=32).get([0])[0].permute(1, 2, 0).numpy().astype(int)
    plain = np.asarray(Image.fromarray(smooth).resize((32, 32), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(ours - plain).max() <= 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_photographs_stand_upright(tmp_path, kind):
    """As viewers show them: cameras store the picture as the sensor has it, and how to turn it."""
    stored = np.zeros((40, 80, 3), dtype=np.uint8)
    stored[:, :40] = 255
    notes = Image.Exif()
    notes[0x0112] = 6  # turn by a quarter, clockwise: the left half comes to the top
    Image.fromarray(stored).save(tmp_path / f"a.{kind.lower()}", kind, exif=notes, quality=95)
    for size in (None, (20, 10)):
        shown = FileSource([tmp_path / f"a.{kind.lower()}"], 1, size).get([0])[0, 0].float()
        assert shown.shape == (size or (80, 40))
        middle = len(shown) // 2
        assert shown[: middle - 2].min() > 240
        assert shown[middle + 2 :].max() < 15


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_notes_of_a_camera_do_no_harm():
    pixels = picture(0, 32, 32)
    whole = JpegSource(*concatenated([encode(pixels, "JPEG")])).get([0])
    entry = b"II*\0\x08\0\0\0\x01\0\x12\x01"
    for notes in (b"Exif\0\0garbage", b"Exif\0\0", b"Exif\0\0" + entry, b"Exif\0\0MM\0*\xff\xff\xff\xff"):
        file = encode(pixels, "JPEG", exif=notes)
        assert torch.equal(JpegSource(*concatenated([file])).get([0]), whole)


def test_unequal_sizes_ask_for_an_image_size(files):
    files[1].write_bytes(encode(picture(1, 5, 5)))
    with pytest.raises(ValueError, match=r"1\.png is \(5, 5\) but .*0\.png is \(12, 20\): set image_size"):
        FileSource(files).get([0, 1])
    assert FileSource(files, image_size=6).get([0, 1]).shape == (2, 3, 6, 6)
    with pytest.raises(ValueError, match="differs in size"):
        cached(FileSource(files))


@pytest.mark.parametrize("damage", [b"", b"not an image", "truncated"])
def test_damaged_files_are_named(files, damage):
    data = encode(picture(1, 64, 64), "JPEG")
    files[2].write_bytes(data[: len(data) // 2] if damage == "truncated" else damage)
    with pytest.raises(BadImageError, match=r"cannot read .*2\.png .*on_bad_image: skip"):
        FileSource(files, image_size=8).get([0, 2])


def test_cached_equals_uncached_and_remembers_bad_rows(files):
    source = FileSource(files, image_size=8)
    assert decoded_bytes(source) == 4 * 3 * 8 * 8
    assert decoded_bytes(FileSource(files)) == 4 * 3 * 12 * 20
    assert torch.equal(cached(source).images, source.get(range(4)))
    files[0].write_bytes(b"?")
    with pytest.raises(BadImageError, match=r"0\.png"):
        cached(source)
    held = cached(source, "skip")
    assert torch.equal(held.get([1, 2, 3]), source.get([1, 2, 3]))
    with pytest.raises(BadImageError, match=r"0\.png"):
        held.get([0])
    for file in files:
        file.write_bytes(b"?")
    with pytest.raises(BadImageError, match="none of the 4 images"):
        cached(source, "skip")


def test_missing_files_are_found_without_decoding(files):
    files[3].unlink()
    files[1].write_bytes(b"broken, but there")
    assert FileSource(files).missing() == [3]


def test_pixel_embedding_has_unit_rows_and_ignores_brightness():
    images = torch.randint(0, 100, (7, 3, 20, 20), dtype=torch.uint8)
    plain = pixel_embedding(MemorySource(images))
    assert plain.shape == (7, 3 * 16 * 16)
    assert np.allclose(np.linalg.norm(plain, axis=1), 1, atol=1e-5)
    assert np.allclose(pixel_embedding(MemorySource(images + 50), rows=3), plain, atol=1e-4)
