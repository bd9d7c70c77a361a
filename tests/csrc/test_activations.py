"""``csrc/common/activations.h`` against ``fusedres/ops/activations.py``, code by code, for every value type."""

from __future__ import annotations

import ctypes

import pytest
import torch
from headers import FLAGS, compiled

from fusedres.ops.activations import ACTIVATIONS

SOURCE = """
#include "common/activations.h"
#include "cpu/vec.h"

namespace fusedres {
namespace FUSEDRES_ISA {
namespace {

#if defined(TEST_FLOAT)
using V = float;
constexpr int kWidth = 1;
float get(const float* p) { return *p; }
void put(float* p, float v) { *p = v; }
#else
using V = Vec;
constexpr int kWidth = Vec::kWidth;
V get(const float* p) { return load(p); }
void put(float* p, V v) { store(p, v); }
#endif

}  // namespace
}  // namespace FUSEDRES_ISA
}  // namespace fusedres

using namespace fusedres::FUSEDRES_ISA;

extern "C" void run(int64_t code, float param, int64_t n, const float* z, const float* g, float* out, float* gradient) {
  fusedres::dispatch_activation(code, [&](auto act) {
    for (int64_t i = 0; i < n; i += kWidth) {
      put(out + i, decltype(act)::forward(get(z + i), V(param)));
      put(gradient + i, decltype(act)::gradient(get(z + i), get(g + i), V(param)));
    }
  });
}
extern "C" int64_t count() { return fusedres::kActivationCount; }
"""

VALUE_TYPES = {"float": ("scalar", ["-DTEST_FLOAT"]), **{isa: (isa, []) for isa in FLAGS}}
SLOPE = 0.125
COUNT = 4096
KINKS = [float("nan"), 0.0, -0.0, 3.0, -3.0, 6.0, -6.0, 1e-40, -1e-40, 1e30, -1e30]
PIECEWISE_LINEAR = ("identity", "relu", "relu6", "leaky_relu")


@pytest.fixture(scope="module", params=VALUE_TYPES)
def header(request, tmp_path_factory) -> ctypes.CDLL:
    isa, defines = VALUE_TYPES[request.param]
    return compiled(SOURCE, isa, tmp_path_factory.mktemp("header"), *defines)


def run(header: ctypes.CDLL, code: int, z: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    out, gradient = torch.empty_like(z), torch.empty_like(z)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (z, g, out, gradient)]
    header.run(ctypes.c_int64(code), ctypes.c_float(SLOPE), ctypes.c_int64(z.numel()), *pointers)
    return out, gradient


def assert_within_twice_stock(ours: torch.Tensor, stock: torch.Tensor, exact: torch.Tensor) -> None:
    floor = 1e-7 * exact.abs().max()
    assert (ours - exact).abs().max() <= 2 * (stock - exact).abs().max() + floor


def test_lists_have_the_same_length(header):
    assert header.count() == len(ACTIVATIONS)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values(header, name):
    formula = ACTIVATIONS[name]
    z, g = torch.linspace(-9, 9, COUNT), torch.randn(COUNT, generator=torch.Generator().manual_seed(0))
    out, gradient = run(header, formula.code, z, g)
    exact = z.double().requires_grad_()
    exact_out = formula.forward(exact, SLOPE)
    (exact_gradient,) = torch.autograd.grad(exact_out, exact, g.double())
    leaf = z.clone().requires_grad_()
    stock_out = formula.forward(leaf, SLOPE)
    (stock_gradient,) = torch.autograd.grad(stock_out, leaf, g)
    assert_within_twice_stock(out, stock_out.detach(), exact_out.detach())
    assert_within_twice_stock(gradient, stock_gradient, exact_gradient)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_nan_and_kinks(header, name):
    formula = ACTIVATIONS[name]
    z = torch.tensor((KINKS * COUNT)[:COUNT])
    g = torch.full_like(z, 2.0)
    out, gradient = run(header, formula.code, z, g)
    tolerance = {"rtol": 0, "atol": 0} if name in PIECEWISE_LINEAR else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(out, formula.forward(z, SLOPE), equal_nan=True, **tolerance)
    torch.testing.assert_close(gradient, g * formula.derivative(z, SLOPE), equal_nan=True, **tolerance)
