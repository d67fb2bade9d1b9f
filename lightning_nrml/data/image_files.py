"""Which files below a folder are images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif"}


def image_files(folder: Path) -> Iterator[Path]:
    """The images anywhere below ``folder``, unordered.

    Names that start with a dot are no images, and there are none below folders of such names: macOS leaves
    ``._a.jpg`` on foreign disks, other programs keep copies in ``.thumbnails`` or ``.ipynb_checkpoints``.
    """
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in IMAGE_SUFFIXES and not hidden:
            yield path


def found_images(place: Path) -> dict[str, Path]:
    """The image files of a folder by their names relative to it, in sorted order; of a file, itself.

    Raises:
        FileNotFoundError: there is no such folder or file.
        ValueError: the folder holds no images.
    """
    if place.is_file():
        return {place.name: place}
    if not place.is_dir():
        raise FileNotFoundError(f"no folder or image {place}: name a folder of images, or one image")
    found = {path.relative_to(place).as_posix(): path for path in image_files(place)}
    if not found:
        raise ValueError(f"{place} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return dict(sorted(found.items()))
