"""``python -m fusedres <command>``.

A command is a module with ``add_arguments(parser)`` and ``run(args) -> int`` (the exit status), entered in
:data:`COMMANDS`. Only the module of the command that was asked for is imported.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

__all__ = ["COMMANDS", "Command", "main"]


class Command(NamedTuple):
    """Where a command lives, and what it does in a few words."""

    module: str
    help: str


COMMANDS: dict[str, Command] = {
    "bench": Command("fusedres.benchmarking.cli", "time ResNet-50 and a grid of blocks beside eager and torch.compile"),
    "degradation": Command("fusedres.analysis.degradation", "training error by depth, with the skip and without"),
    "demo": Command("fusedres.demo", "real images, stock beside fused: report, agreement, speed, memory, training"),
    "depth": Command("fusedres.analysis.depth", "some real steps of networks of a thousand layers, in little memory"),
    "engines": Command("fusedres.benchmarking.engines", "the speed-up under DDP, compiled, and on one small image"),
    "env": Command("fusedres.env", "versions, backends and why one is absent, hardware"),
    "explain": Command("fusedres.explain_cli", "what would be fused in a model, and what not, and why"),
    "gradient-flow": Command("fusedres.analysis.gradient_flow", "the gradient at every block's output, by depth"),
    "growth": Command(
        "fusedres.benchmarking.growth", "a step's cost as batch and depth grow, and the first step's time"
    ),
    "jacobian-identity": Command("fusedres.analysis.jacobian_identity", "how far blocks are from the identity"),
    "memory": Command("fusedres.analysis.memory", "what a training step keeps and peaks at, by how the model is run"),
    "params-flops": Command("fusedres.analysis.params_flops", "parameters and multiply-adds per block"),
    "report": Command("fusedres.benchmarking.report.cli", "benchmark results as a page with figures, or two compared"),
    "residual-as-ode": Command("fusedres.analysis.residual_as_ode", "a residual stack against its ODE's solution"),
    "soak": Command("fusedres.benchmarking.soak", "whether memory grows over thousands of steps"),
    "traffic": Command(
        "fusedres.analysis.traffic", "bytes that a step or an inference moves, and the time they must take"
    ),
    "tune": Command("fusedres.tune_cli", "measure the tiles of a model's convolutions on this GPU, and keep them"),
    "zoo": Command("fusedres.zoo.cli", "networks of other libraries: what is fused, whether the numbers stay, times"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that ``argv`` (default: the process's arguments) names and returns its exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = ArgumentParser(prog="fusedres", description="Fused kernels for convolutional residual networks.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(name, help=command.help, description=command.help)
        if name in argv[:1]:
            module = import_module(command.module)
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    return args.run(args)
