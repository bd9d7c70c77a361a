"""The ops: maths, reference and schema, one file each."""

from . import bn_norm, bn_stats, join, join_backward
