"""Networks by name."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torchvision_shim import timm_models, torchvision_models

from fusedres.zoo import LIBRARIES, ZOO, all_networks, build
from fusedres.zoo.timings import TIMED


def test_building_leaves_the_random_numbers():
    torchvision_models()
    before = torch.get_rng_state()
    build("torchvision:resnet18")
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("name", "package", "kind"),
    [
        ("torchvision:lraspp_mobilenet_v3_large", "torchvision", "LRASPP"),
        ("timm:resnet18", "timm", "ResNet"),
        ("smp:Unet/resnet18", "segmentation_models_pytorch", "Unet"),
        ("transformers:PPLCNetBackbone", "transformers", "PPLCNetBackbone"),
    ],
)
def test_every_library(name, package, kind):
    torchvision_models()
    timm_models()
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    with torch.device("meta"):
        assert type(build(name)).__name__ == kind


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet18", "is not of the form library:name"),
        ("elsewhere:resnet18", "is not of the form library:name"),
        ("torchvision:resnet19", "torchvision:resnet19 cannot be built: Unknown model resnet19"),
        ("smp:Unet", "a network of smp is named decoder/encoder"),
    ],
)
def test_unknown_networks(name, words):
    torchvision_models()
    with pytest.raises(ValueError, match=words):
        build(name)


def test_lists_of_libraries():
    torchvision_models()
    names = all_networks("torchvision")
    assert "torchvision:resnet50" in names
    with pytest.raises(ValueError, match="is none of"):
        all_networks("elsewhere")


def test_the_lists_name_libraries_that_there_are():
    for name in [n for names in ZOO.values() for n in names] + list(TIMED):
        assert name.partition(":")[0] in LIBRARIES
    assert len(set(TIMED)) == len(TIMED) >= 40
