"""The ops: maths, reference and schema, one file each; and the public functions made of them."""

from . import (  # noqa: F401  they register themselves
    all_finite,
    bn_join,
    bn_norm,
    bn_stats,
    conv_epilogue,
    conv_fused,
    conv_fused_backward,
    conv_wgrad,
    conv_winograd,
    excite,
    fingerprint,
    gated_join,
    join,
    join_backward,
    join_pool,
    rk_combine,
)
from .functional import (  # noqa: F811  the function takes the name; the module stays in sys.modules
    ConvParams,
    NormParams,
    bn_act,
    bn_act_conv,
    conv_affine_act,
    conv_bn_act,
    join,
    residual_block,
)
from .gated_join import gated_join  # noqa: F811
from .rk_combine import rk_combine  # noqa: F811

__all__ = [
    "ConvParams",
    "NormParams",
    "bn_act",
    "bn_act_conv",
    "conv_affine_act",
    "conv_bn_act",
    "gated_join",
    "join",
    "residual_block",
    "rk_combine",
]
