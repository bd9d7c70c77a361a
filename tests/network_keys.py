"""The keys and shapes of networks that torchvision and timm have too, in ``models/data/<package>.json``.

Each file holds, for the lines ``key shape`` of a ``state_dict``, a digest for every network, and for some the lines
themselves, so that a difference can be read. To write them again, after a new version of a package::

    PYTHONPATH=tests python tests/network_keys.py
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from torch import nn
from torchvision_shim import timm_models, torchvision_models

__all__ = ["DATA", "NETWORKS", "digest_of", "lines_of"]

DATA = Path(__file__).parent / "models" / "data"

NETWORKS = {
    "torchvision": {
        name: name
        for name in (
            "resnet18",
            "resnet34",
            "resnet50",
            "resnet101",
            "resnet152",
            "wide_resnet50_2",
            "resnext50_32x4d",
            "resnext101_32x8d",
            "densenet121",
            "densenet161",
            "densenet169",
            "densenet201",
        )
    },
    "timm": {"seresnet50": "seresnet50", **{f"preresnet{d}": f"resnetv2_{d}" for d in (18, 34, 50, 101, 152)}},
}
"""Our names, and theirs."""

WRITTEN_OUT = ("resnet18", "resnext50_32x4d", "densenet121", "seresnet50", "preresnet18", "preresnet50")


def lines_of(model: nn.Module) -> list[str]:
    return [f"{key} {'x'.join(map(str, value.shape))}" for key, value in model.state_dict().items()]


def digest_of(model: nn.Module) -> str:
    return hashlib.sha256("\n".join(lines_of(model)).encode()).hexdigest()


def main() -> None:
    for package, models in (("torchvision", torchvision_models()), ("timm", timm_models())):
        with torch.device("meta"):
            built = {ours: getattr(models, theirs)() for ours, theirs in NETWORKS[package].items()}
        found = {
            "digests": {name: digest_of(model) for name, model in built.items()},
            "keys": {name: lines_of(model) for name, model in built.items() if name in WRITTEN_OUT},
        }
        (DATA / f"{package}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
