"""Networks of the libraries that people take them from, by name, built untrained; nothing is ever downloaded.

========================================  =============================================================================
``torchvision:resnet50``                  ``torchvision.models.get_model``, also detection and segmentation
``timm:resnet50d``                        ``timm.create_model``
``smp:Unet/resnet34``                     a decoder of segmentation-models-pytorch on one of its encoders
``transformers:ResNetModel``              a class of Hugging Face's transformers, from its default configuration
========================================  =============================================================================
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import nn

from ..vision import import_with_torchvision

__all__ = ["LIBRARIES", "ZOO", "all_networks", "build"]

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
    "Pre-activation ResNet": (
        *("timm:resnetv2_18", "timm:resnetv2_34", "timm:resnetv2_50", "timm:resnetv2_101", "timm:resnetv2_50t"),
    ),
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
    "Segmentation": (
        *("torchvision:fcn_resnet50", "torchvision:deeplabv3_resnet50", "torchvision:lraspp_mobilenet_v3_large"),
        *("smp:Unet/resnet18", "smp:UnetPlusPlus/resnet18", "smp:MAnet/resnet18", "smp:Linknet/resnet18"),
        *("smp:FPN/resnet18", "smp:PSPNet/resnet18", "smp:PAN/resnet18", "smp:DeepLabV3/resnet18"),
        *("smp:DeepLabV3Plus/resnet18", "smp:UPerNet/resnet18", "smp:Unet/se_resnet50", "smp:Unet/densenet121"),
        *("smp:Unet/efficientnet-b0", "smp:Unet/timm-efficientnet-b0", "smp:Unet/mobilenet_v2", "smp:Unet/dpn68"),
    ),
    "Detection": (
        *("torchvision:fasterrcnn_resnet50_fpn", "torchvision:retinanet_resnet50_fpn"),
        *("torchvision:ssdlite320_mobilenet_v3_large", "transformers:DFineForObjectDetection"),
    ),
    "Hugging Face": (
        *("transformers:ResNetForImageClassification", "transformers:RegNetModel", "transformers:MobileNetV1Model"),
        *("transformers:MobileNetV2Model", "transformers:EfficientNetModel", "transformers:HGNetV2Backbone"),
        *("transformers:TextNetModel", "transformers:MobileViTModel", "transformers:BitModel"),
        "transformers:ConvNextModel",
    ),
    "Without batch norm": (
        "timm:resnet50_gn",
        "timm:nf_resnet50",
        "timm:resnetv2_50x1_bit",
        "torchvision:convnext_tiny",
    ),
}
"""Families of networks, for the tables of ``docs/zoo.md``."""


def build(name: str) -> nn.Module:
    """The network that ``library:name`` stands for, untrained.

    Raises:
        ValueError: where there is no such library or network, with the reason.
    """
    library, separator, network = name.partition(":")
    if not separator or library not in LIBRARIES:
        raise ValueError(f"{name!r} is not of the form library:name, with {', '.join(LIBRARIES)} for libraries")
    make, _ = LIBRARIES[library]
    try:
        with _quietly():
            return make(network)
    except (ImportError, RuntimeError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{name} cannot be built: {error}") from error


def all_networks(library: str) -> list[str]:
    """Every network that a library can build, as :func:`build` takes them.

    Raises:
        ValueError: where the library is not known or not installed.
    """
    if library not in LIBRARIES:
        raise ValueError(f"{library!r} is none of {', '.join(LIBRARIES)}")
    try:
        with _quietly():
            return [f"{library}:{name}" for name in LIBRARIES[library][1]()]
    except ImportError as error:
        raise ValueError(f"{library} cannot be imported: {error}") from error


@contextmanager
def _quietly() -> Iterator[None]:
    """Without warnings, and without a trace in the random numbers."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=()):
        warnings.simplefilter("ignore")
        yield


# ---------------------------------------------------------------------------------------------------------------------
# Libraries
# ---------------------------------------------------------------------------------------------------------------------


def _torchvision(name: str) -> nn.Module:
    models = import_with_torchvision("torchvision.models")
    builder = models.get_model_builder(name)
    # Segmentation and detection load a trained backbone unless told not to; the others have no such argument.
    try:
        return builder(weights=None, weights_backbone=None)
    except (TypeError, ValueError):
        return builder(weights=None)


def _torchvision_names() -> list[str]:
    return import_with_torchvision("torchvision.models").list_models()


def _timm(name: str) -> nn.Module:
    return import_with_torchvision("timm").create_model(name, pretrained=False)


def _timm_names() -> list[str]:
    return import_with_torchvision("timm").list_models()


def _smp(name: str) -> nn.Module:
    decoder, separator, encoder = name.partition("/")
    if not separator:
        raise ValueError("a network of smp is named decoder/encoder, as in Unet/resnet34")
    smp = import_with_torchvision("segmentation_models_pytorch")
    return getattr(smp, decoder)(encoder, encoder_weights=None)


_DECODERS = (
    "Unet",
    "UnetPlusPlus",
    "MAnet",
    "Linknet",
    "FPN",
    "PSPNet",
    "PAN",
    "DeepLabV3",
    "DeepLabV3Plus",
    "UPerNet",
)


def _smp_names() -> list[str]:
    """Each decoder on one encoder, and one decoder on every encoder."""
    smp = import_with_torchvision("segmentation_models_pytorch")
    encoders = smp.encoders.get_encoder_names()
    return [*(f"{decoder}/resnet18" for decoder in _DECODERS), *(f"Unet/{e}" for e in encoders if e != "resnet18")]


def _import_transformers() -> ModuleType:
    if find_spec("torchvision") is not None:  # it imports torchvision where that is there, later and out of our reach
        import_with_torchvision("torchvision")
    return import_module("transformers")


def _transformers(name: str) -> nn.Module:
    cls = getattr(_import_transformers(), name)
    return cls(cls.config_class())


_TRANSFORMERS = (
    *("ResNetModel", "ResNetForImageClassification", "ResNetBackbone", "RegNetModel", "RegNetForImageClassification"),
    *("MobileNetV1Model", "MobileNetV2Model", "MobileNetV2ForSemanticSegmentation", "EfficientNetModel", "BitModel"),
    *("BitBackbone", "ConvNextModel", "ConvNextV2Model", "MobileViTModel", "MobileViTV2Model", "LevitModel"),
    *("PoolFormerModel", "SegformerModel", "TextNetModel", "DFineForObjectDetection"),
    *("RTDetrResNetBackbone", "HGNetV2Backbone", "SuperPointForKeypointDetection", "PPLCNetBackbone"),
)


def _transformers_names() -> list[str]:
    transformers = _import_transformers()
    return [name for name in _TRANSFORMERS if hasattr(transformers, name)]


LIBRARIES: dict[str, tuple[Callable[[str], nn.Module], Callable[[], list[str]]]] = {
    "torchvision": (_torchvision, _torchvision_names),
    "timm": (_timm, _timm_names),
    "smp": (_smp, _smp_names),
    "transformers": (_transformers, _transformers_names),
}
"""How a library builds a network, and what it calls those that it has."""
