"""The cut that leaves out an assumed share of a batch, smoothed over batches."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_nrml.state import StateModule


def check_rate(noise_rate: float) -> None:
    """Raise ``ValueError`` unless ``noise_rate`` is a share below 1."""
    if not 0 <= noise_rate < 1:
        raise ValueError(f"noise_rate must lie in [0, 1), e.g. 0.5 for half of the labels; got {noise_rate}.")


def share_cut(score: Tensor, rate: float) -> Tensor:
    """The cut below or at which the share ``rate`` of the scores lies; to keep is what is strictly above.

    ``v`` is the ``int(rate * n)``-th smallest of the ``n`` scores that are not NaN. Scores equal to ``v`` go
    to the side that brings the dropped number closer to ``int(rate * n)``, and never are all dropped.
    Without ties exactly ``int(rate * n)`` are.

    Args:
        score: ``(B,)``, any float type; NaN does not count.
        rate: in [0, 1).

    Returns:
        0-d float32; NaN if ``int(rate * n)`` is 0.
    """
    score = score.float()
    n = (~score.isnan()).sum()
    remove = (n.double() * rate).long()  # the same integer as Python's int(rate * n)
    # sort puts NaN last; the NaN in front serves remove = 0
    value = torch.cat([score.new_full((1,), torch.nan), score.sort().values]).take(remove)
    below, upto = (score < value).sum(), (score <= value).sum()
    with_ties = (upto - remove <= remove - below) & (upto < n)
    return torch.where(with_ties, value, value.nextafter(value.new_full((), -torch.inf)))


class SmoothedCut(StateModule):
    """Mean of the cuts of the last batches.

    Args:
        window: number of batches, this one included; 1 = the cut of the batch itself.

    Attributes:
        window_values: ``(window,)`` float32 cuts, newest last, NaN = empty.

    Raises:
        ValueError: if ``window`` is below 1.
    """

    window_values: Tensor

    def __init__(self, window: int) -> None:
        super().__init__()
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}.")
        self.window = window
        self.register_buffer("window_values", torch.full((window,), torch.nan, dtype=torch.float32))

    def push(self, score: Tensor, rate: float) -> tuple[Tensor, Tensor]:
        """Take in the scores ``(B,)`` of a batch and decide on them.

        A batch whose own cut is NaN (nothing to drop) keeps everything and is not pushed. If nothing of it
        is above the mean, its own cut decides.

        Returns:
            ``(B,)`` bool, True = drop (False for NaN), and the 0-d cut that was applied, NaN = none.
        """
        own = share_cut(score, rate)
        window = self.window_values
        shifted = torch.cat([window[1:], own.unsqueeze(0)])
        torch.where(own.isnan(), window, shifted, out=window)
        # measured from the newest, so that equal values (window = 1) come back bit for bit
        mean = torch.where(own.isnan(), torch.nan, (window - own).nanmean() + own)
        cut = torch.where((score > mean).any(), mean, own)
        return score <= cut, cut
