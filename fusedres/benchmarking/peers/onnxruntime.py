"""ONNX Runtime on a network exported to ONNX."""

from __future__ import annotations

import contextlib
import io
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..workloads import Workload
from .base import Peer, not_installed

__all__ = ["OnnxRuntime"]


class OnnxRuntime(Peer):
    """With the CPU's kernels, or the GPU's where the installed package has them; its layout is NCHW."""

    name = "ONNX Runtime"
    trains = False
    seconds = (0.0, 25.0)

    def available(self) -> str | None:
        return not_installed("onnx", "onnxscript", "onnxruntime")

    def refuses(self, workload: Workload, device: torch.device) -> str | None:
        if reason := super().refuses(workload, device):
            return reason
        if workload.dtype != torch.float32:
            return f"its convolutions do not take {str(workload.dtype).removeprefix('torch.')}"
        import onnxruntime

        provider = _provider(device)
        return None if provider in onnxruntime.get_available_providers() else f"the package has no {provider}"

    def prepare(self, model: nn.Module, example: Tensor) -> Callable[[Tensor], Tensor]:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        images = example.contiguous()
        with tempfile.TemporaryDirectory() as folder:  # large weights lie in a file of their own beside the graph
            path = Path(folder, "network.onnx")
            _export(model, images, path)
            session = onnxruntime.InferenceSession(str(path), options, providers=[_provider(example.device)])
        (given,), (made,) = session.get_inputs(), session.get_outputs()

        def call(images: Tensor) -> Tensor:
            found = session.run([made.name], {given.name: images.contiguous().cpu().numpy()})
            return torch.from_numpy(found[0]).to(images.device)

        return call


def _provider(device: torch.device) -> str:
    return "CPUExecutionProvider" if device.type == "cpu" else "CUDAExecutionProvider"


def _export(model: nn.Module, images: Tensor, path: Path) -> None:
    """Without what the exporter prints."""
    with torch.no_grad(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (images,), path, dynamo=True, verbose=False)
