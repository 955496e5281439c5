"""Packed images as tensors on the network's device."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.nets.device import has_room
from pipeline.stage_runtime.files import Rowwise

PART = 1024  # images sent to the GPU at once


class DeviceImages:
    """Rows of packed images (N, H, W[, 3]) as uint8 tensors on a device.

    If a GPU has room for all images, they are sent to it once and kept there.
    """

    def __init__(self, images: Rowwise, device: torch.device) -> None:
        self._images, self._device = images, device
        self._kept: Tensor | None = None
        n = len(images)
        if n and has_room(n * images[np.zeros(1, np.int64)].nbytes, device):
            parts = (np.arange(i, min(i + PART, n)) for i in range(0, n, PART))
            self._kept = torch.cat([self._sent(rows) for rows in parts])

    def __call__(self, rows: NDArray[np.int64]) -> Tensor:
        """Return these rows."""
        if self._kept is not None:
            return self._kept[torch.from_numpy(rows).to(self._device)]
        return self._sent(rows)

    def _sent(self, rows: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(self._images[rows]).to(self._device)
