"""``python -m fusedres zoo``: what :func:`fusedres.patch` finds in the convolutional networks of torchvision and timm.

Every network is built as its package builds it, untrained, and nothing in it is run. The result is ``docs/zoo.md``.
"""

from __future__ import annotations

import re
import sys
import warnings
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from .patch import PatchReport, explain
from .vision import import_with_torchvision

__all__ = ["ZOO", "add_arguments", "build", "document", "run"]

ZOO: dict[str, tuple[str, ...]] = {
    "ResNet": (
        *(f"torchvision:resnet{depth}" for depth in (18, 34, 50, 101, 152)),
        *("timm:resnet18", "timm:resnet18d", "timm:resnet26t", "timm:resnet50", "timm:resnet50d", "timm:resnet101"),
        *("timm:resnetrs50", "timm:resnetblur50", "timm:resnetaa50", "timm:gernet_m"),
    ),
    "Wide ResNet": ("torchvision:wide_resnet50_2", "torchvision:wide_resnet101_2", "timm:wide_resnet50_2"),
    "ResNeXt": (
        *("torchvision:resnext50_32x4d", "torchvision:resnext101_32x8d", "torchvision:resnext101_64x4d"),
        *("timm:resnext50_32x4d", "timm:resnext101_32x4d"),
    ),
    "SE-ResNet": (
        *(
            "timm:seresnet18",
            "timm:seresnet50",
            "timm:seresnet101",
            "timm:seresnext50_32x4d",
            "timm:seresnext26t_32x4d",
        ),
        *("timm:legacy_seresnet50", "timm:legacy_seresnext50_32x4d", "timm:senet154"),
    ),
    "Pre-activation ResNet": ("timm:resnetv2_18", "timm:resnetv2_34", "timm:resnetv2_50", "timm:resnetv2_101"),
    "RegNet": (
        *("torchvision:regnet_x_400mf", "torchvision:regnet_y_400mf", "torchvision:regnet_y_3_2gf"),
        *("timm:regnetx_004", "timm:regnety_004", "timm:regnety_032", "timm:regnetv_040"),
    ),
    "DenseNet": (
        *(f"torchvision:densenet{depth}" for depth in (121, 161, 169, 201)),
        *("timm:densenet121", "timm:densenetblur121d"),
    ),
    "MobileNet": (
        *("torchvision:mobilenet_v2", "torchvision:mobilenet_v3_small", "torchvision:mobilenet_v3_large"),
        *("torchvision:mnasnet1_0", "timm:mobilenetv2_100", "timm:mobilenetv3_large_100", "timm:mobilenetv1_100"),
        *("timm:lcnet_100", "timm:hardcorenas_a", "timm:fbnetc_100"),
    ),
    "EfficientNet": (
        *(
            "torchvision:efficientnet_b0",
            "torchvision:efficientnet_v2_s",
            "timm:efficientnet_b0",
            "timm:efficientnet_b4",
        ),
        *("timm:tf_efficientnetv2_s", "timm:efficientnet_lite0", "timm:tinynet_a"),
    ),
    "Others with residual joins": (
        *("timm:res2net50_26w_4s", "timm:skresnet18", "timm:resnest14d", "timm:ecaresnet50t", "timm:cspresnet50"),
        *(
            "timm:cspdarknet53",
            "timm:darknet53",
            "timm:dla34",
            "timm:hrnet_w18_small",
            "timm:xception41",
            "timm:rexnet_100",
        ),
        *("timm:ghostnet_100", "timm:dpn68", "timm:tresnet_m", "timm:repvgg_a0", "timm:mixnet_s"),
    ),
    "Without residual joins": (
        *("torchvision:vgg16_bn", "torchvision:googlenet", "torchvision:inception_v3", "torchvision:squeezenet1_1"),
        *("torchvision:shufflenet_v2_x1_0", "timm:inception_v4", "timm:vovnet39a", "timm:selecsls42b"),
    ),
    "Without batch norm": (
        "timm:resnet50_gn",
        "timm:nf_resnet50",
        "timm:resnetv2_50x1_bit",
        "torchvision:convnext_tiny",
    ),
}
"""Families of networks, each network by its package and the name that the package gives it."""


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "networks", nargs="*", help="package:name, with torchvision or timm; by default, all of the list"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the tables there, not to the screen")


def run(args: Namespace) -> int:
    families = {"Networks": tuple(args.networks)} if args.networks else ZOO
    try:
        text = document({family: dict(_reports(names)) for family, names in families.items()})
    except ValueError as error:
        print(f"fusedres zoo: {error}", file=sys.stderr)
        return 2
    if args.output is None:
        print(text, end="")
    else:
        args.output.write_text(text)
    return 0


def _reports(names: tuple[str, ...]) -> Iterator[tuple[str, PatchReport]]:
    for name in names:
        print(name, file=sys.stderr)
        yield name, explain(build(name))


def build(name: str) -> nn.Module:
    """The network that ``package:name`` stands for, untrained.

    Raises:
        ValueError: where there is no such package or network, with the reason.
    """
    package, separator, network = name.partition(":")
    if not separator or package not in ("torchvision", "timm"):
        raise ValueError(f"{name!r} is not of the form torchvision:name or timm:name")
    try:
        models = import_with_torchvision(f"{package}.models")
        with warnings.catch_warnings(), torch.random.fork_rng(devices=()):
            warnings.simplefilter("ignore")
            if package == "torchvision":
                return models.get_model(network)
            return import_with_torchvision("timm").create_model(network)
    except (ImportError, RuntimeError, ValueError) as error:
        raise ValueError(f"{name} cannot be built: {error}") from error


# ---------------------------------------------------------------------------------------------------------------------
# The document
# ---------------------------------------------------------------------------------------------------------------------

_HEAD = """# Networks of torchvision and timm

What `fusedres.patch` finds in them: how many convolutions there are, and how many of them lie inside fused sites. What
is left as it is is named with the reason. Written by `python -m fusedres zoo --output docs/zoo.md`.
"""

_COLUMNS = ("network", "convolutions", "fused", "coverage", "sites", "left as it is")


def document(families: dict[str, dict[str, PatchReport]]) -> str:
    """The tables, one for each family, as Markdown."""
    return _HEAD + "".join(_table(family, reports) for family, reports in families.items())


def _table(family: str, reports: dict[str, PatchReport]) -> str:
    rows = [_COLUMNS, ("---", *["---:"] * 4, "---"), *(_row(name, report) for name, report in reports.items())]
    return f"\n## {family}\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _row(name: str, report: PatchReport) -> tuple[str, ...]:
    counts = report.total, report.covered, f"{report.coverage:.0%}", len(report.fused)
    return (name.replace(":", " "), *map(str, counts), _reasons(report))


def _reasons(report: PatchReport) -> str:
    """The reasons by how many convolutions they concern."""
    fused = {path for site in report.fused for path in site.convolutions}
    counts = Counter(_general(d.reason) for d in report.declined if d.path not in fused)
    return "; ".join(f"{reason} ({n})" for reason, n in counts.most_common()).replace("|", "\\|")


# What in a reason is of one layer alone, and what is said of all such layers instead.
_NAMES = (
    (r" \(\S+\.py:\d+: .*\)$", ""),  # the line of the model's code
    (r"^nothing to fuse \S+ with: \S+ is", "what follows is"),
    (r"^nothing to fuse \S+ with: \S+ has", "what follows has"),
    (r"^(the output of )\S+", r"\1it"),
    (r"^[\w.]+:? (?=is |has |stands |shares |its )", ""),
    (r"(the addition) \w+(?= is not fused)", r"\1"),
)


def _general(reason: str) -> str:
    """A reason without the names that tell one layer from another."""
    for pattern, text in _NAMES:
        reason = re.sub(pattern, text, reason)
    return reason
