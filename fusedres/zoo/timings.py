"""How much faster networks are patched than stock: a training step and inference in bfloat16, on small images.

Small because the whole list is to be measured in minutes: what this is for is that no network is slower patched, not
how fast one of them can be, which ``python -m fusedres bench`` measures.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..benchmarking.agreement import verdict
from ..benchmarking.results import Machine, this_machine, times
from ..benchmarking.timing import interleave, speedup
from ..benchmarking.workloads import INFERENCE_BF16, TRAIN_BF16, Batch, Workload, settle
from ..patch import patch
from ..testing import channels_last
from .networks import build

__all__ = ["TIMED", "Measured", "Timings", "WithLogits", "measure"]

TIMED = (
    *("torchvision:resnet18", "torchvision:resnet50", "torchvision:resnet101", "timm:resnet50d", "timm:resnetrs50"),
    *("timm:resnetaa50", "timm:gernet_m", "torchvision:wide_resnet50_2", "torchvision:resnext50_32x4d"),
    *("timm:seresnet50", "timm:seresnext50_32x4d", "timm:legacy_seresnet50", "timm:resnetv2_50", "timm:resnetv2_101"),
    *("torchvision:regnet_x_400mf", "torchvision:regnet_y_3_2gf", "timm:regnety_032", "torchvision:densenet121"),
    *("torchvision:densenet169", "timm:densenetblur121d", "torchvision:mobilenet_v2", "torchvision:mobilenet_v3_large"),
    *("timm:mobilenetv1_100", "timm:lcnet_100", "torchvision:mnasnet1_0", "torchvision:efficientnet_b0"),
    *(
        "timm:efficientnet_b4",
        "timm:tf_efficientnetv2_s",
        "timm:res2net50_26w_4s",
        "timm:skresnet18",
        "timm:resnest14d",
    ),
    *(
        "timm:ecaresnet50t",
        "timm:cspresnet50",
        "timm:darknet53",
        "timm:dla34",
        "timm:hrnet_w18_small",
        "timm:xception41",
    ),
    *("timm:ghostnet_100", "timm:selecsls42b", "torchvision:vgg16_bn", "torchvision:googlenet", "timm:vovnet39a"),
    *("smp:Unet/resnet18", "transformers:ResNetForImageClassification"),
)
"""At least one network of every family."""

BATCH, RESOLUTION, TURNS = 4, 128, 9


@dataclass(frozen=True)
class Measured:
    """One network in one workload: milliseconds of a step, and stock's over ours; no ratio where the check is red."""

    eager: float
    fused: float
    ratio: float | None
    check: str


@dataclass(frozen=True)
class Timings:
    """What was measured, where and how.

    Attributes:
        networks: for each network, what was measured by the name of the workload, or why nothing could be.
    """

    machine: Machine
    settings: dict[str, Any]
    networks: dict[str, dict[str, Measured] | str] = field(default_factory=dict)

    def cells(self, name: str) -> tuple[str, str]:
        """The ratios of a network as text; empty where there are none."""
        measured = self.networks.get(name, {})
        if isinstance(measured, str):
            return "", ""
        found = [measured.get(workload.name) for workload in (TRAIN_BF16, INFERENCE_BF16)]
        return tuple("" if m is None else times(m.ratio) for m in found)

    def save(self, path: Path) -> None:
        """Writes JSON, and the folder that it lies in."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Timings:
        """Raises OSError where there is no such file, and ValueError where it holds something else."""
        try:
            content = json.loads(path.read_text())
            networks = {
                name: found if isinstance(found, str) else {w: Measured(**m) for w, m in found.items()}
                for name, found in content["networks"].items()
            }
            return cls(Machine(**content["machine"]), content["settings"], networks)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} holds no timings of the zoo") from error


def measure(names: Iterable[str] = TIMED) -> Iterator[Timings]:
    """Times the networks one after the other; yields all that is known after each, so that nothing is lost.

    Raises:
        ValueError: for a name that has not the form ``library:name``.
    """
    settings = {"batch": BATCH, "resolution": RESOLUTION, "turns": TURNS}
    networks: dict[str, dict[str, Measured] | str] = {}
    for name in names:
        try:
            networks[name] = _measured(build(name))
        except ValueError as error:
            networks[name] = str(error)
        gc.collect()
        yield Timings(this_machine(), settings, dict(networks))


def _measured(model: nn.Module) -> dict[str, Measured]:
    model = _without_chance(model).to(memory_format=torch.channels_last)
    batch = Batch.random(BATCH, RESOLUTION)
    with torch.random.fork_rng(devices=()):
        settle(model, batch.images)
    model = WithLogits(model)
    with torch.no_grad():
        classes = model.eval()(batch.images).shape[1]
    batch = Batch.random(BATCH, RESOLUTION, num_classes=classes)
    return {w.name: _contest(w, model, batch) for w in (TRAIN_BF16, INFERENCE_BF16)}


def _contest(workload: Workload, model: nn.Module, batch: Batch) -> Measured:
    check = verdict(workload.check(model, _images))
    make_step = workload.stepper(batch)
    stock, ours = workload.prepared(model), workload.prepared(model)
    patch(ours)
    timed = interleave({"eager": make_step(stock), "fused": make_step(ours)}, turns=TURNS)
    ratio = speedup(timed["eager"], timed["fused"]) if check == "ok" else None
    return Measured(1e3 * timed["eager"].median, 1e3 * timed["fused"].median, ratio, check)


def _images(seed: int) -> Tensor:
    return channels_last((BATCH, 3, 96, 96), seed=seed)


def _without_chance(model: nn.Module) -> nn.Module:
    """Dropout and stochastic depth off: two networks that draw different masks cannot be compared."""
    for module in model.modules():
        for name in ("p", "drop_prob", "drop_rate", "dropout"):
            if type(module.__dict__.get(name)) is float:
                setattr(module, name, 0.0)
    return model


class WithLogits(nn.Module):
    """A network whose output is one tensor ``[N, classes]``, whatever it gives."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        out = self.model(x)
        while not isinstance(out, Tensor):
            out = next(iter(out.values())) if hasattr(out, "values") else out[0]
        if out.dim() == 2:
            return out
        # Of a mask of one class every pixel is a class, for a loss that has a gradient.
        return out.flatten(1) if out.shape[1] == 1 else out.flatten(2).mean(2)
