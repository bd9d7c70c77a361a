"""The networks have the keys and shapes of torchvision and timm, stock and fused."""

from __future__ import annotations

import json

import pytest
import torch
from network_keys import DATA, NETWORKS, digest_of, lines_of
from torchvision_shim import timm_models, torchvision_models

from fusedres import models
from fusedres.patch import explain

EXPECTED = [json.loads((DATA / f"{package}.json").read_text()) for package in NETWORKS]
DIGESTS = {name: digest for expected in EXPECTED for name, digest in expected["digests"].items()}
LINES = {name: lines for expected in EXPECTED for name, lines in expected["keys"].items()}

# What nothing here can be fused with: a stem that a block follows, a norm whose activation is in another module, a
# classifier.
ALONE = {
    **{name: {"head.fc"} for name in ("preresnet18", "preresnet50")},
    "cifar_preresnet": {"stem.conv", "head.fc"},
    "wrn": {"conv1"},
    "densenet121": {"features.norm5"},
}
FUSED = ("resnet18", "resnext50_32x4d", "wide_resnet50_2", "seresnet50", "densenet121", "preresnet18", "preresnet50")
OWN = ("cifar_resnet", "plain", "cifar_preresnet", "wrn")


def on_meta(name, **options):
    with torch.device("meta"):
        return getattr(models, name)(**options)


@pytest.mark.parametrize("name", LINES)
def test_line_by_line(name):
    assert lines_of(on_meta(name, fused=False)) == LINES[name]


@pytest.mark.parametrize("name", DIGESTS)
def test_by_digest(name):
    assert digest_of(on_meta(name, fused=False)) == DIGESTS[name]


@pytest.mark.parametrize("name", (*FUSED, *OWN))
def test_fusing_changes_no_key_and_reaches_every_block(name):
    stock, fused = on_meta(name, fused=False), on_meta(name)
    assert lines_of(fused) == lines_of(stock)
    report = explain(fused)
    assert all(site.already for site in report.fused)
    assert {declined.path for declined in report.declined} == ALONE.get(name, set()), report
    assert not any(site.already for site in explain(stock).fused)


@pytest.mark.parametrize("name", ["resnet18", "preresnet18", "seresnet50", "densenet121"])
def test_the_files_are_those_of_the_installed_packages(name):
    package = next(package for package in NETWORKS if name in NETWORKS[package])
    theirs = {"torchvision": torchvision_models, "timm": timm_models}[package]()
    with torch.device("meta"):
        model = getattr(theirs, NETWORKS[package][name])()
    assert digest_of(model) == DIGESTS[name]
    assert not on_meta(name, fused=False).load_state_dict(model.state_dict(), assign=True).missing_keys


def test_every_network_is_listed():
    assert set(DIGESTS) | set(OWN) | {"odenet"} == set(models.NETWORKS)
