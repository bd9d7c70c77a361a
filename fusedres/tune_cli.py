"""``python -m fusedres tune MODEL``: measures a model's blocks on this GPU; see :func:`fusedres.tune`."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace

import torch

from .explain_cli import load_model
from .triton.tuning import device_name, ship
from .tune import tune, untunable

__all__ = ["add_arguments", "run"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", help="a network of fusedres.models, or package.module:callable")
    parser.add_argument("--batch", type=int, default=256, help="images (256)")
    parser.add_argument("--size", type=int, default=224, help="their height and width (224)")
    parser.add_argument("--dtype", choices=sorted(_DTYPES), default="bf16", help="of model and images (bf16)")
    parser.add_argument("--device", default="cuda", help="cpu where TRITON_INTERPRET=1 (cuda)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which no other problem is begun")
    parser.add_argument("--ship", action="store_true", help="also write the package's own table, for a release")
    parser.add_argument("--forward-only", action="store_true", help="leave the gradients' passes out")


def run(args: Namespace) -> int:
    if reason := untunable(torch.device(args.device).type):
        print(f"fusedres tune: {reason}", file=sys.stderr)
        return 2
    try:
        model = load_model(args.model)
    except ValueError as error:
        print(f"fusedres tune: {error}", file=sys.stderr)
        return 2
    dtype = _DTYPES[args.dtype]
    model = model.to(args.device, dtype, memory_format=torch.channels_last)
    images = torch.randn(args.batch, 3, args.size, args.size, device=args.device, dtype=dtype)
    images = images.contiguous(memory_format=torch.channels_last)
    print(tune(model, images, backward=not args.forward_only, seconds=args.seconds))
    if args.ship:
        print(f"shipped in {ship(device_name(images.device))}")
    return 0
