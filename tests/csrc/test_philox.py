"""``csrc/cpu/philox.h`` and the masks made of it, for every instruction set, against ``fusedres/ops/dropout.py``."""

from __future__ import annotations

import ctypes

import pytest
import torch
from headers import FLAGS, compiled
from known_answers import PHILOX4X32_10

from fusedres.ops.dropout import philox

SOURCE = """
#include "cpu/dropout_kernel.cpp"

using namespace fusedres;
using namespace fusedres::FUSEDRES_ISA;

// The words of one counter, which every lane holds; returns whether the lanes agree.
extern "C" bool words(const uint32_t* counter, uint64_t seed, uint32_t* out) {
  Words a;
  for (int i = 0; i < 4; ++i) a.w[i] = every(counter[i]);
  a = philox(a, PhiloxKeys(seed));
  bool agree = true;
  for (int i = 0; i < 4; ++i) {
    uint64_t lanes[Lanes::kWidth];
    static_assert(sizeof(lanes) == sizeof(Lanes), "a lane is a 64-bit word");
    std::memcpy(lanes, &a.w[i], sizeof(lanes));
    out[i] = static_cast<uint32_t>(lanes[0]);
    for (uint64_t lane : lanes) agree = agree && static_cast<uint32_t>(lane) == out[i];
  }
  return agree;
}

extern "C" void bits(uint64_t seed, uint32_t threshold, uint64_t first, uint64_t step, int64_t count, uint64_t* out) {
  keep_bits({seed, threshold, first, step, count, out});
}
"""


@pytest.fixture(scope="module", params=FLAGS)
def header(request, tmp_path_factory) -> ctypes.CDLL:
    library = compiled(SOURCE, request.param, tmp_path_factory.mktemp("header"))
    library.words.restype = ctypes.c_bool
    return library


@pytest.mark.parametrize(("counter", "key", "expected"), PHILOX4X32_10)
def test_known_answers(header, counter, key, expected):
    out = (ctypes.c_uint32 * 4)()
    assert header.words((ctypes.c_uint32 * 4)(*counter), ctypes.c_uint64(key[0] | key[1] << 32), out)
    assert tuple(out) == expected


@pytest.mark.parametrize("first", [0, 64, 2**34 - 128, 2**34, 2**40 + 64])  # the counter's second word begins at 2^34
@pytest.mark.parametrize("step", [1, 3, 64, 1000])
@pytest.mark.parametrize("count", [1, 63, 64, 65, 1000])
@pytest.mark.parametrize("threshold", [0, 1, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFF])
def test_bits(header, first, step, count, threshold):
    seed = 0x9E3779B97F4A7C15 - 2**64  # a negative seed: both halves of the key have their highest bit
    first += 0 if step == 1 else 5
    room = torch.zeros((count + 63) // 64, dtype=torch.int64)
    arguments = [ctypes.c_uint64(v) for v in (seed % 2**64,)] + [ctypes.c_uint32(threshold)]
    arguments += [ctypes.c_uint64(first), ctypes.c_uint64(step), ctypes.c_int64(count)]
    header.bits(*arguments, ctypes.c_void_p(room.data_ptr()))
    found = (room[:, None] >> torch.arange(64) & 1).flatten()[:count]
    expected = philox(seed, first, (count - 1) * step + 1, torch.device("cpu"))[::step] >= threshold
    assert torch.equal(found.bool(), expected)


def test_neighbours_from_anywhere(header):
    room = torch.zeros(4, dtype=torch.int64)
    arguments = (ctypes.c_uint64(3), ctypes.c_uint32(1 << 31), ctypes.c_uint64(7), ctypes.c_uint64(1))
    header.bits(*arguments, ctypes.c_int64(200), ctypes.c_void_p(room.data_ptr()))
    found = (room[:, None] >> torch.arange(64) & 1).flatten()[:200]
    assert torch.equal(found.bool(), philox(3, 7, 200, torch.device("cpu")) >= 1 << 31)
