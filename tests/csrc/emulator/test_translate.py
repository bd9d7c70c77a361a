"""The translation of CUDA C++ to C++, construct by construct."""

from __future__ import annotations

import pytest
from emulated import emulator

translate = emulator().translate


def test_launch_with_template_arguments():
    assert translate("f<T, g(1)><<<dim3(2, 3), 4, n, s>>>(a, b(c));\n") == (
        "::emu::launch(::emu::Config(dim3(2, 3), 4, n, s), f<T, g(1)>, a, b(c));\n"
    )


def test_launch_without_arguments():
    assert translate("  ns::f<<<1, 2>>>();\n") == "  ::emu::launch(::emu::Config(1, 2), ns::f);\n"


def test_launch_bounds_become_a_check():
    source = "template <int N>\n__global__ void __launch_bounds__(N, 2) f(int (*p)(int)) { p(1); }\n"
    assert translate(source).endswith("f(int (*p)(int)) { ::emu::enter(N, 2); p(1); }\n")
    assert "__global__" not in translate(source)


def test_shared_variables():
    assert translate("__shared__ float a[32][N + 1], b;\n") == (
        "auto& a = ::emu::static_shared<float[32][N + 1], 0>(); auto& b = ::emu::static_shared<float, 1>();\n"
    )
    assert translate("__shared__ alignas(16) Pack<T, 4> p[2];\n") == (
        "auto& p = ::emu::static_shared<Pack<T, 4>[2], 0, (16)>();\n"
    )
    assert translate("extern __shared__ alignas(128) unsigned char all[];\n") == (
        "unsigned char* all = ::emu::dynamic_shared<unsigned char>();\n"
    )


def test_built_in_variables_but_not_members_of_that_name():
    assert (
        translate("threadIdx.x + c.blockDim.x + p->gridDim;\n")
        == "::emu::thread_index().x + c.blockDim.x + p->gridDim;\n"
    )


def test_assembly():
    text = translate('asm volatile("add.s32 %0, %1, 5;\\n" : "=r"(a[0]) : "r"(ns::b) : "memory");\n')
    assert "auto& emu_operand_0 = a[0];" in text
    assert "const auto emu_operand_1 = ::emu::ptx::operand<'r'>(ns::b);" in text
    assert "::emu::ptx::add_s32(emu_operand_0, emu_operand_1, 5);" in text


def test_assembly_with_a_predicate_and_an_address():
    source = 'asm("{.reg .pred p; t.u32 p, [%0+8]; @!p x.y::z.b32 %0, {%0, %0};}" : "+r"(v));\n'
    text = translate(source)
    assert "bool p{};" in text
    assert "::emu::ptx::t_u32(p, (emu_operand_0 + 8));" in text
    assert "if (!p) ::emu::ptx::x_y_z_b32(emu_operand_0, emu_operand_0, emu_operand_0);" in text


def test_system_headers_and_literals_are_left_alone():
    system = '# 1 "/usr/include/x.h" 1 3\nasm("f<<<");\n# 2 "a.cu" 2\n'
    assert translate(system) == system
    assert translate('puts("asm (");\n') == 'puts("asm (");\n'


def test_a_macro_of_a_system_header_does_not_split_a_line():
    source = '# 1 "a.cu"\n__shared__ \n# 1 "a.cu" 3\n          alignas(\n# 1 "a.cu"\n          16\n'
    source += '# 1 "a.cu" 3\n            )\n# 1 "a.cu"\n             float a[4];\n'
    assert "auto& a = ::emu::static_shared<float[4], 0" in translate(source)


def test_what_is_not_known_is_refused():
    with pytest.raises(ValueError, match="__shared__"):
        translate("__shared__ auto&& x\n")
