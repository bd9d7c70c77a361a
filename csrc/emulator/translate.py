"""CUDA C++ to C++: what g++ cannot parse, and nothing else.

Works on preprocessed text, where only the user's own lines are touched; line markers keep messages on the original
lines. Five things change:

* ``kernel<<<grid, block, shared, stream>>>(arguments)`` becomes ``emu::launch(...)``;
* ``__shared__`` variables become references into the block's shared memory;
* ``__global__`` goes away, ``__launch_bounds__`` becomes a check in the kernel's first statement;
* ``threadIdx`` and its like become calls;
* ``asm`` statements become calls of the functions of the same name in ``emulator/ptx.h``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

__all__ = ["TranslationError", "translate"]


class TranslationError(ValueError):
    """A construct that the translation does not know."""


def translate(preprocessed: str) -> str:
    """The C++ of a preprocessed CUDA source."""
    counter = iter(range(10**9))
    return "".join(_translate_user_code(text, counter) if user else text for user, text in _pieces(preprocessed))


_MARKER = re.compile(r'# (\d+) "([^"]*)"([ \d]*)')


def _joined(text: str) -> list[str]:
    """The lines, without the markers that interrupt one where a macro of a system header is expanded."""
    lines: list[str] = []
    file, number = "", 0
    given = text.splitlines(keepends=True)
    for line, following in zip(given, [*given[1:], ""]):
        marker = _MARKER.match(line)
        if marker is None:
            lines.append(line)
            number += 1
            continue
        goes_on = marker[2] == file and int(marker[1]) == number - 1
        # Pragmas keep lines of their own.
        if goes_on and lines and not lines[-1].startswith("#") and not following.startswith("#"):
            lines[-1] = lines[-1].rstrip("\n")
            number -= 1
        else:
            lines.append(line)
            file, number = marker[2], int(marker[1])
    return "".join(lines).splitlines(keepends=True)


def _pieces(text: str) -> Iterator[tuple[bool, str]]:
    """Stretches of lines: whether they are the user's, and their text. Markers of system headers end in a 3."""
    user, lines = True, []
    for line in _joined(text):
        marker = _MARKER.match(line)
        if marker:
            system = "3" in marker[3].split()
            if system == user:
                yield user, "".join(lines)
                user, lines = not system, []
        lines.append(line)
    yield user, "".join(lines)


def _translate_user_code(text: str, counter: Iterator[int]) -> str:
    text = _asm(text)
    text = _launches(text)
    text = _kernels(text)
    text = _shared(text, counter)
    for name, call in (("threadIdx", "thread_index"), ("blockIdx", "block_index")):
        text = re.sub(rf"(?<![.\w>]){name}\b", f"::emu::{call}()", text)
    for name, call in (("blockDim", "block_dim"), ("gridDim", "grid_dim")):
        text = re.sub(rf"(?<![.\w>]){name}\b", f"::emu::{call}()", text)
    return text


# ---------------------------------------------------------------------------------------------------------------------
# Balanced text
# ---------------------------------------------------------------------------------------------------------------------

_PAIRS = {"(": ")", "[": "]", "{": "}"}
_LITERAL = re.compile(r'"(?:\\.|[^"\\])*"|\'(?:\\.|[^\'\\])+\'')


def _skip_literal(text: str, at: int) -> int:
    """Past the literal that begins at ``at``; a digit separator is no literal."""
    found = _LITERAL.match(text, at)
    if found and not (text[at] == "'" and at and text[at - 1].isalnum()):
        return found.end()
    return at + 1


def _closing(text: str, opening: int) -> int:
    """The index of the bracket that closes the one at ``opening``."""
    depth, at = 0, opening
    while at < len(text):
        c = text[at]
        if c in "\"'":
            at = _skip_literal(text, at)
            continue
        depth += (c in "([{") - (c in ")]}")
        if depth == 0:
            return at
        at += 1
    raise TranslationError(f"a bracket is never closed: {text[opening : opening + 80]!r}")


def _search(pattern: str, text: str) -> re.Match[str] | None:
    """The first match outside literals."""
    matches = re.finditer(rf"{_LITERAL.pattern}|(?P<code>{pattern})", text)
    return next((m for m in matches if m["code"] is not None), None)


def _split(text: str, separator: str) -> list[str]:
    """Splits at separators outside brackets and literals."""
    parts, start, at = [], 0, 0
    while at < len(text):
        c = text[at]
        if c in "\"'":
            at = _skip_literal(text, at)
        elif c in _PAIRS:
            at = _closing(text, at) + 1
        elif c == separator:
            parts.append(text[start:at])
            at = start = at + 1
        else:
            at += 1
    return [*parts, text[start:]]


# ---------------------------------------------------------------------------------------------------------------------
# Launches and kernels
# ---------------------------------------------------------------------------------------------------------------------


def _launches(text: str) -> str:
    while found := _search("<<<", text):
        at = found.start()
        end = text.find(">>>", at)
        opening = text.index("(", end)
        if end < 0 or text[end + 3 : opening].strip():
            raise TranslationError(f"a launch without arguments: {text[at : at + 80]!r}")
        closing = _closing(text, opening)
        start = _kernel_expression(text, at)
        arguments = text[opening + 1 : closing].strip()
        call = f"::emu::launch(::emu::Config({text[at + 3 : end]}), {text[start:at]}{arguments and ', ' + arguments})"
        text = text[:start] + call + text[closing + 1 :]
    return text


def _kernel_expression(text: str, end: int) -> int:
    """Where the expression before ``<<<`` begins: a qualified name, perhaps with template arguments."""
    at = end
    while at and text[at - 1].isspace():
        at -= 1
    if text[at - 1] == ">":
        depth = 0
        while True:
            at -= 1
            depth += (text[at] == ">") - (text[at] == "<")
            if depth == 0:
                break
    while at and (text[at - 1].isalnum() or text[at - 1] in "_:"):
        at -= 1
    return at


def _kernels(text: str) -> str:
    done = ""
    while found := _search(r"\b__global__\b", text):
        head = text[: found.start()]
        rest = text[found.end() :]
        bounds = re.match(r"[\w\s:]*?\b__launch_bounds__\s*\(", rest)
        limit = ""
        if bounds:
            closing = _closing(rest, bounds.end() - 1)
            limit = rest[bounds.end() : closing]
            rest = re.sub(r"\b__launch_bounds__\s*\($", "", rest[: bounds.end()]) + rest[closing + 1 :]
        parameters = rest.index("(")
        after = _closing(rest, parameters) + 1
        if rest[after:].lstrip().startswith("{") and limit:
            body = rest.index("{", after) + 1
            rest = f"{rest[:body]} ::emu::enter({limit});{rest[body:]}"
        done += head + rest[:after]
        text = rest[after:]
    return done + text


# ---------------------------------------------------------------------------------------------------------------------
# Shared memory
# ---------------------------------------------------------------------------------------------------------------------

_DYNAMIC = re.compile(r"\bextern\s+__shared__\s+((?:alignas\s*\([^)]*\)\s*)?)([^;\[]*?)\s*(\w+)\s*\[\s*\]\s*;")
_STATIC = re.compile(r"\b__shared__\s+((?:alignas\s*\([^)]*\)\s*)?)([^;]*);")


def _shared(text: str, counter: Iterator[int]) -> str:
    text = _DYNAMIC.sub(lambda m: f"{m[2]}* {m[3]} = ::emu::dynamic_shared<{m[2]}>();", text)
    text = _STATIC.sub(lambda m: _static_shared(m[2], m[1], counter), text)
    if "__shared__" in text:
        raise TranslationError(f"a __shared__ declaration that is not known: {text[text.index('__shared__') :][:80]!r}")
    return text


def _static_shared(declaration: str, alignment: str, counter: Iterator[int]) -> str:
    first, *others = _split(declaration, ",") if "<" not in declaration else [declaration]
    found = re.fullmatch(r"(.*?[\s>*])(\w+)\s*((?:\[[^;]*\])*)\s*", first.strip(), re.DOTALL)
    if found is None:
        raise TranslationError(f"a __shared__ declaration that is not known: {declaration!r}")
    kind, *declarators = found[1].strip(), (found[2], found[3])
    for other in others:
        name, dimensions = re.fullmatch(r"\s*(\w+)\s*((?:\[[^;]*\])*)\s*", other, re.DOTALL).groups()
        declarators.append((name, dimensions))
    lines = []
    for name, dimensions in declarators:
        align = re.sub(r"alignas\s*\((.*)\)\s*", r", (\1)", alignment)
        lines.append(f"auto& {name} = ::emu::static_shared<{kind}{dimensions}, {next(counter)}{align}>();")
    return " ".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Inline PTX
# ---------------------------------------------------------------------------------------------------------------------


def _asm(text: str) -> str:
    done = ""
    while found := _search(r"\basm\s*(?:volatile\s*)?\(", text):
        closing = _closing(text, found.end() - 1)
        done += text[: found.start()] + _asm_statement(text[found.end() : closing])
        text = text[closing + 1 :]
    return done + text


def _asm_statement(inside: str) -> str:
    """The C++ of one statement; newlines are kept, so that later lines keep their numbers."""
    template, *sections = _split(inside, ":")
    instructions = "".join(bytes(s[1:-1], "utf-8").decode("unicode_escape") for s in _LITERAL.findall(template))
    outputs, inputs = ([*map(str.strip, _split(s, ","))] if s.strip() else [] for s in [*sections, "", ""][:2])
    statements, operands = [], []
    for i, operand in enumerate([*outputs, *inputs]):
        constraint, expression = re.fullmatch(r'"([=+]?\w)"\s*\((.*)\)', operand, re.DOTALL).groups()
        name = f"emu_operand_{i}"
        operands.append(name)
        if i < len(outputs):
            statements.append(f"auto& {name} = {expression};")
            statements.append(f"(void)::emu::ptx::operand<'{constraint[-1]}'>({name});")
        elif constraint == "n":
            statements.append(f"constexpr auto {name} = {expression};")
        else:
            statements.append(f"const auto {name} = ::emu::ptx::operand<'{constraint}'>({expression});")
    statements += [_instruction(line, operands) for line in _instructions(instructions)]
    return "do { " + " ".join(statements) + "\n" * inside.count("\n") + " } while (0)"


def _instructions(text: str) -> list[str]:
    text = re.sub(r"//[^\n]*", "", text).strip()
    if text.startswith("{") and text.endswith("}"):
        text = text[1:-1]
    return [line.strip() for line in text.split(";") if line.strip()]


def _instruction(line: str, operands: list[str]) -> str:
    declared = re.fullmatch(r"\.reg\s*\.(pred|b32|u32|s32|b64|u64|f32)\s+(.*)", line)
    if declared:
        kinds = {"pred": "bool", "s32": "int32_t", "f32": "float", "b64": "uint64_t", "u64": "uint64_t"}
        return f"{kinds.get(declared[1], 'uint32_t')} {declared[2]}{{}};"
    guard, opcode, arguments = re.fullmatch(r"(?:@(!?\w+)\s+)?([\w.:]+)\s*(.*)", line, re.DOTALL).groups()
    function = "::emu::ptx::" + opcode.replace("::", "_").replace(".", "_")
    values = [_value(a, operands) for a in re.sub(r"[{}]", "", arguments).split(",") if a.strip()]
    call = f"{function}({', '.join(values)});"
    return f"if ({guard}) {call}" if guard else call


def _value(argument: str, operands: list[str]) -> str:
    argument = argument.strip()
    address = re.fullmatch(r"\[\s*(.*?)\s*(?:\+\s*(\d+)\s*)?\]", argument)
    if address:
        base = _value(address[1], operands)
        return f"({base} + {address[2]})" if address[2] else base
    number = re.fullmatch(r"%(\d+)", argument)
    if number:
        return operands[int(number[1])]
    if "%" in argument:
        raise TranslationError(f"an operand of an asm statement that is not known: {argument!r}")
    return argument
