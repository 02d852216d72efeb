"""The Triton kernels of the linear cross-entropy.

Tiles of logits, tokens by classes, are made and used up; the forward pass and the tangents fold
them into sums of each token, chunk by chunk of classes. The gradients store the cotangents of a
strip of classes at a time, and multiply them.
"""

from .forward import linear_cross_entropy_fwd_kernel, linear_cross_entropy_merge_kernel
from .gradients import linear_cross_entropy_cotangents_kernel, linear_cross_entropy_gradient_kernel
from .tangents import linear_cross_entropy_jvp_kernel, linear_cross_entropy_tangents_kernel

__all__ = [
    "linear_cross_entropy_cotangents_kernel",
    "linear_cross_entropy_fwd_kernel",
    "linear_cross_entropy_gradient_kernel",
    "linear_cross_entropy_jvp_kernel",
    "linear_cross_entropy_merge_kernel",
    "linear_cross_entropy_tangents_kernel",
]
