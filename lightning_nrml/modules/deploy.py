"""A trained module as a net of its own, for programs without this package."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_nrml.files import whole_file
from lightning_nrml.modules.base import EmbeddingModule

#: rows of the comparison with the exported file; not the two that the graph is traced with
_CHECKED_ROWS = 3


class Deployed(nn.Module):
    """``image -> embedding`` (and ``probability``, of multi-label modules) of a trained module.

    Args:
        module: the module; it is switched to evaluation.
        mean, std: of each channel, taken off and divided by first; ``None`` = images come normalised.

    Attributes:
        outputs: names of what ``forward`` returns, in order.
    """

    mean: Tensor | None
    std: Tensor | None

    def __init__(
        self,
        module: EmbeddingModule,
        mean: Sequence[float] | Tensor | None = None,
        std: Sequence[float] | Tensor | None = None,
    ) -> None:
        super().__init__()
        self.module = module
        for name, value in (("mean", mean), ("std", std)):
            row = None if value is None else torch.as_tensor(value, dtype=torch.float32).view(1, -1, 1, 1)
            self.register_buffer(name, row)
        self.eval()

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """``(B, C, H, W)`` float32 to a dict with ``embedding`` ``(B, D)``, rows of unit length."""
        if self.mean is not None and self.std is not None:
            image = (image - self.mean) / self.std
        return self.module.predictions(image)


def export_onnx(net: Deployed, size: tuple[int, int, int], path: Path) -> float | None:
    """Write a net as ONNX, for any number of images of one size, and compare the file with it.

    Args:
        net: input ``image``, outputs by the names of its dict.
        size: channels, height and width of an image.
        path: the file; there as a whole or not at all.

    Returns:
        The largest difference between the file's outputs, by onnxruntime, and the net's on random images;
        ``None`` without onnxruntime.

    Raises:
        ImportError: onnx or onnxscript is not installed.
    """
    for package in ("onnx", "onnxscript"):
        if find_spec(package) is None:
            raise ImportError(
                f"{path} needs the package {package}, which is not installed: "
                "pip install 'lightning-nrml[export]'"
            )
    device = next(net.parameters()).device
    images = torch.rand((_CHECKED_ROWS, *size), generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():
        expected = net(images)
        program: Any = torch.onnx.export(
            net,
            (images[:2],),
            dynamo=True,
            input_names=["image"],
            output_names=list(expected),
            dynamic_shapes={"image": {0: torch.export.Dim("batch")}},
            verbose=False,
        )
    with whole_file(path) as part:
        program.save(part)
        return None if find_spec("onnxruntime") is None else _difference(part, images, expected)


def _difference(path: Path, images: Tensor, expected: dict[str, Tensor]) -> float:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(list(expected), {"image": images.cpu().numpy()})
    return max(
        float((torch.from_numpy(value) - want.cpu()).abs().max())
        for value, want in zip(found, expected.values(), strict=True)
    )
