"""fusedres: fused kernels that make convolutional residual networks train and infer faster in less memory."""

from importlib import import_module

from .env import env_report, load_library

load_library()

# After the library, so that the selector knows the compiled kernels before any op asks for one.
from . import ops  # noqa: E402  isort: skip
from . import models, nn  # noqa: E402
from .capture import capture  # noqa: E402
from .patch import PatchReport, explain, patch, unpatch  # noqa: E402
from .select import use_backend  # noqa: E402
from .tune import tune  # noqa: E402

__all__ = [
    "PatchReport",
    "analysis",
    "capture",
    "env_report",
    "explain",
    "models",
    "nn",
    "ops",
    "patch",
    "tune",
    "unpatch",
    "use_backend",
]
__version__ = "0.1.0"


def __getattr__(name: str):
    if name == "analysis":  # studies, which training and serving need not load
        return import_module(".analysis", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
