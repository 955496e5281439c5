"""Packed images as tensors where the network is."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.nets.device import has_room
from pipeline.stage_runtime.files import Rowwise

PART = 1024  # images sent to the GPU at once


class DeviceImages:
    """Gives rows of packed images (N, H, W[, 3]) as uint8 tensors on a device.

    A GPU with room for all of them gets them once, and keeps them.
    """

    def __init__(self, images: Rowwise, device: torch.device) -> None:
        self._images, self._device = images, device
        self._kept: Tensor | None = None
        n = len(images)
        if n and has_room(n * images[np.zeros(1, np.int64)].nbytes, device):
            parts = (np.arange(i, min(i + PART, n)) for i in range(0, n, PART))
            self._kept = torch.cat([self._sent(rows) for rows in parts])

    def __call__(self, rows: NDArray[np.int64]) -> Tensor:
        """Give these rows."""
        if self._kept is not None:
            return self._kept[torch.from_numpy(rows).to(self._device)]
        return self._sent(rows)

    def _sent(self, rows: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(self._images[rows]).to(self._device)
