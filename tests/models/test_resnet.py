"""The ImageNet networks have torchvision's keys, weights and numbers, stock and fused.

``torchvision_keys.json`` holds torchvision's keys and shapes: a digest of them for every network, and the lines
themselves for two, so that a difference can be read.
"""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path

import pytest
import torch

from fusedres import models
from fusedres.patch import explain, patch
from tests.torchvision_shim import torchvision_models

EXPECTED = json.loads((Path(__file__).parent / "torchvision_keys.json").read_text())
IMAGENET = sorted(EXPECTED["digests"])
SMALL = ("resnet18", "resnet50", "resnext50_32x4d")


def on_meta(name, **options):
    with torch.device("meta"):
        return getattr(models, name)(**options)


def lines_of(model):
    return [f"{key} {'x'.join(map(str, value.shape))}" for key, value in model.state_dict().items()]


@pytest.mark.parametrize("name", sorted(EXPECTED["keys"]))
def test_keys_and_shapes_line_by_line(name):
    assert lines_of(on_meta(name, fused=False)) == EXPECTED["keys"][name]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", IMAGENET)
def test_keys_and_shapes_by_digest(name, fused):
    lines = lines_of(on_meta(name, fused=fused))
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == EXPECTED["digests"][name]


@pytest.mark.parametrize("name", IMAGENET)
def test_every_convolution_is_fused(name):
    report = explain(on_meta(name))
    assert report.coverage == 1.0, report
    assert all(site.already for site in report.fused)


@pytest.mark.parametrize("name", IMAGENET)
def test_stock_means_stock(name):
    assert not any(site.already for site in explain(on_meta(name, fused=False)).fused)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("zero_init_residual", [False, True])
def test_the_same_seed_gives_torchvisions_weights_and_outputs(name, zero_init_residual):
    theirs_of, ours_of = getattr(torchvision_models(), name), getattr(models, name)
    torch.manual_seed(0)
    theirs = theirs_of(zero_init_residual=zero_init_residual).eval()
    torch.manual_seed(0)
    ours = ours_of(zero_init_residual=zero_init_residual, fused=False).eval()
    for key, value in theirs.state_dict().items():
        assert torch.equal(value, ours.state_dict()[key]), key
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("training", [True, False])
def test_fused_agrees_with_stock(name, training):
    torch.manual_seed(0)
    stock = getattr(models, name)(num_classes=7, fused=False).train(training)
    fused = getattr(models, name)(num_classes=7).train(training)
    fused.load_state_dict(stock.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        exact = copy.deepcopy(stock).double()(x.double())
        stock_error, fused_error = ((model(x).double() - exact).norm() for model in (stock, fused))
    assert fused_error <= 2 * stock_error + 1e-6 * exact.norm()


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_options(name):
    model = getattr(models, name)(num_classes=5, in_channels=1)
    assert model(torch.randn(2, 1, 64, 64)).shape == (2, 5)


def test_patch_after_the_fact_is_the_same_as_fused():
    model = on_meta("resnet18", fused=False)
    assert patch(model).coverage == 1.0
    assert type(model.layer1[0]) is type(on_meta("resnet18").layer1[0])


def test_a_basic_block_takes_no_groups():
    with pytest.raises(ValueError, match="groups=1"):
        models.resnet18(groups=2)
