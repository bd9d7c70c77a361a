"""The activations' formulas against stock PyTorch's functions and their autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fusedres.ops.activations import ACTIVATIONS, IDENTITY, RELU, Activation, activation

STOCK = {
    "identity": lambda z: z * 1,
    "relu": torch.relu,
    "relu6": F.relu6,
    "leaky_relu": lambda z: F.leaky_relu(z, 0.2),
    "silu": F.silu,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
}
POINTS = torch.cat((torch.linspace(-8, 8, 801), torch.tensor([0.0, -0.0, 3.0, -3.0, 6.0, -6.0]))).double()


def test_every_activation_is_tested():
    assert STOCK.keys() == ACTIVATIONS.keys()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_value_and_derivative(name):
    act, z = Activation(name, 0.2), POINTS.clone().requires_grad_()
    out = STOCK[name](z)
    torch.testing.assert_close(act(z), out)
    torch.testing.assert_close(act.derivative(POINTS), torch.autograd.grad(out.sum(), z)[0])


def test_codes_are_distinct():
    assert sorted(formula.code for formula in ACTIVATIONS.values()) == list(range(len(ACTIVATIONS)))


def test_from_a_name_or_itself():
    assert activation("relu") is not RELU and activation("relu") == RELU
    assert activation(IDENTITY) is IDENTITY
    assert str(Activation("leaky_relu", 0.5)) == "leaky_relu(0.5)" and str(RELU) == "relu"


def test_unknown_ones_raise():
    with pytest.raises(ValueError, match=r"unknown activation 'swish'; known: identity, relu"):
        activation("swish")
    with pytest.raises(TypeError, match="name or an Activation, got function"):
        activation(lambda z: z)
