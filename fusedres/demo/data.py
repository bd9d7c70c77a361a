"""The images of the demo; scikit-learn ships them, so nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Digits", "digits", "photographs"]

_MEAN = torch.tensor([0.485, 0.456, 0.406])
_STD = torch.tensor([0.229, 0.224, 0.225])
_CROPS = (224, 320)


def photographs(size: int = 224) -> Tensor:
    """Eight images ``[8, 3, size, size]`` in channels_last: two photographs, two crops of each, and their mirrors."""
    from sklearn.datasets import load_sample_images

    views = []
    for photograph in load_sample_images().images:
        pixels = torch.from_numpy(photograph.copy()).float().div(255)
        pixels = ((pixels - _MEAN) / _STD).permute(2, 0, 1)[None]
        for crop in _CROPS:
            top, left = ((length - crop) // 2 for length in pixels.shape[2:])
            view = pixels[:, :, top : top + crop, left : left + crop]
            view = F.interpolate(view, size=(size, size), mode="bilinear", antialias=True)
            views += [view, view.flip(3)]
    return torch.cat(views).contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Digits:
    """Handwritten digits, ``[N, 1, 16, 16]``, and their classes."""

    train_images: Tensor
    train_classes: Tensor
    test_images: Tensor
    test_classes: Tensor


def digits(test_share: float = 0.2) -> Digits:
    """scikit-learn's 8x8 digits at twice their size, shuffled and split."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float().div(16)[:, None]
    images = F.interpolate((images - images.mean()) / images.std(), scale_factor=2, mode="bilinear")
    classes = torch.from_numpy(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, train = order.split([round(test_share * len(order)), len(order) - round(test_share * len(order))])
    return Digits(images[train], classes[train], images[test], classes[test])
