"""Parameters and multiply-adds: published numbers, formulas, and the survey's table."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import fusedres
from fusedres import models
from fusedres.analysis import block_types, params_flops
from fusedres.analysis.params_flops import OUTSIDE, Count
from fusedres.cli import main

# As torchvision lists them for its weights: parameters, and multiply-adds at 224 x 224.
PUBLISHED = {
    "resnet18": (11_689_512, 1.814e9),
    "resnet50": (25_557_032, 4.089e9),
    "resnext50_32x4d": (25_028_904, 4.230e9),
    "wide_resnet50_2": (68_883_240, 11.398e9),
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("fused", [False, True])
def test_published_numbers(name, fused):
    params, multiply_adds = PUBLISHED[name]
    total = params_flops(getattr(models, name)(fused=fused), (1, 3, 224, 224)).total
    assert total.params == params
    assert round(total.multiply_adds / 1e6) == round(multiply_adds / 1e6)


def test_blocks_and_the_rest_add_up():
    model = models.cifar_resnet(8)
    found = params_flops(model, (2, 3, 16, 16))
    assert list(found.blocks) == ["layer1.0", "layer2.0", "layer3.0", OUTSIDE]
    assert found.total.params == sum(p.numel() for p in model.parameters())
    assert found.blocks["layer1.0"] == Count(2 * 16 * 16 * 9 + 4 * 16, 2 * 2 * 16 * 16 * 16 * 16 * 9)
    assert found.blocks[OUTSIDE] == Count(3 * 16 * 9 + 2 * 16 + 64 * 10 + 10, 2 * (16 * 16 * 3 * 16 * 9 + 64 * 10))


def test_groups_strides_and_linear_layers():
    model = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, groups=4), nn.Flatten(), nn.Linear(16 * 3 * 3, 5))
    total = params_flops(model, (3, 8, 7, 7)).total
    assert total.multiply_adds == 3 * (16 * 9 * 9 * 8 // 4 + 16 * 9 * 5)
    assert total.params == 16 * 2 * 9 + 16 + 16 * 9 * 5 + 5


def test_a_shared_parameter_counts_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    assert params_flops(model, (1, 4)).total == Count(16, 32)


def test_the_model_is_left_alone():
    model = models.cifar_resnet(8).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    params_flops(model, (1, 3, 32, 32))
    assert model.training
    assert fusedres.explain(model).fused[0].already
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("channels", [64, 256])
def test_the_cells_that_the_survey_leaves_empty(channels):
    c, pixels = channels, 56 * 56
    basic, bottleneck, pre_activation = block_types(channels)
    assert (basic.per_c2, bottleneck.per_c2, pre_activation.per_c2) == (18, 17 / 16, 18)
    for row in (basic, bottleneck, pre_activation):
        assert row.multiply_adds == row.per_c2 * c * c * pixels
        formula = row.weights.replace("9 C^2", "9 * C^2").replace("C^2", f"{c}**2")
        assert eval(formula) == row.per_c2 * c * c
    assert basic.params == 18 * c * c + 4 * c
    assert bottleneck.params == 17 * c * c // 16 + 2 * (c // 4 + c // 4 + c)
    assert pre_activation.params == basic.params


def test_channels_that_do_not_divide():
    with pytest.raises(ValueError, match="multiple of 4, got 6"):
        block_types(6)


def test_the_command(tmp_path, capsys):
    figure, results = tmp_path / "figure.png", tmp_path / "results.json"
    options = ["--shape", "1x3x32x32", "--channels", "8", "--out", str(figure), "--json", str(results)]
    assert main(["params-flops", "cifar_resnet", *options]) == 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    content = json.loads(results.read_text())
    assert content["total"]["params"] == sum(p.numel() for p in models.cifar_resnet(fused=False).parameters())
    assert [row["name"] for row in content["block_types"]] == ["BasicBlock", "Bottleneck", "Pre-activation"]
    assert "1.0625" in capsys.readouterr().out
    assert main(["params-flops", "nothing"]) == 2
