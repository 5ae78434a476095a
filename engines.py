"""What computes: a batch of uint8 films in, logits or features out, on one device at one precision.

Training, prediction and measurement all turn uint8 films into network input through `to_input`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models import Classifier
from preprocess import PreprocessSpec
from runtime import autocast


class InputScaling:
    """uint8 films (B, H, W, 1 or 3) to the network's input (B, 3, H, W), normalised, channels-last, on the device."""

    def __init__(self, spec: PreprocessSpec, device: torch.device) -> None:
        mean, std = torch.tensor(spec.mean), torch.tensor(spec.std)
        self.device = device
        self.scale = (1.0 / (255.0 * std)).view(1, 3, 1, 1).to(device)
        self.shift = (-mean / std).view(1, 3, 1, 1).to(device)

    def __call__(self, images_BHWC: Tensor) -> Tensor:
        """float32 (B, 3, H, W)."""
        images_BCHW = images_BHWC.to(self.device, non_blocking=True).permute(0, 3, 1, 2).float()
        return torch.addcmul(self.shift, images_BCHW, self.scale).contiguous(memory_format=torch.channels_last)


class TorchEngine:
    """Eager torch inference."""

    def __init__(self, model: Classifier, spec: PreprocessSpec, *, device: torch.device, precision: str) -> None:
        self.model = model.to(device).to(memory_format=torch.channels_last).eval()
        self.device, self.precision = device, precision
        self.to_input = InputScaling(spec, device)

    def logits(self, images_BHWC: npt.NDArray[np.uint8] | Tensor) -> npt.NDArray[np.float32]:
        """Logits (B, classes) of uint8 films (B, H, W, C)."""
        return self._run(self.model, images_BHWC)

    def features(self, images_BHWC: npt.NDArray[np.uint8] | Tensor) -> npt.NDArray[np.float32]:
        """Pooled backbone features (B, F) of uint8 films (B, H, W, C)."""
        return self._run(self.model.features, images_BHWC)

    @torch.inference_mode()
    def _run(
        self, function: Callable[[Tensor], Tensor], images_BHWC: npt.NDArray[np.uint8] | Tensor
    ) -> npt.NDArray[np.float32]:
        images = torch.as_tensor(images_BHWC)
        with autocast(self.device, self.precision):
            return function(self.to_input(images)).float().cpu().numpy()
