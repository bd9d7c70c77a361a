"""fusedres: fused kernels that make convolutional residual networks train and infer faster in less memory."""

from .env import env_report, load_library

load_library()

from . import ops  # noqa: E402  the compiled kernels are known to the selector before any op asks for them
from .select import use_backend  # noqa: E402

__all__ = ["env_report", "ops", "use_backend"]
__version__ = "0.1.0"
