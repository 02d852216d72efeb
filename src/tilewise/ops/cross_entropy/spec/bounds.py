"""How large rounding errors may be, derived from the formulas."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tilewise.base.dtypes import FloatDType, compute_dtype, is_narrow, smallest, unit_roundoff


def error_bound(
    dtype: FloatDType,
    quantity: str,
    C: int,
    *,
    logit_size: float,
    magnitude: Any,
    size: Any,
) -> Any:
    """Bound the rounding error of one result of a row, entry by entry or in the Frobenius norm.

    Derivation, to first order in the unit roundoff u, with rounding errors independent and of mean
    zero: then the root mean square error of a sum of n terms is at most `u sqrt(n) sum |terms|`.
    With L a bound of |s| and G = max(1, L), in units of u:

    - A softcap makes s with the error `8 L`: tanh has 4 ulp, and three more operations round.
    - `s - m`, its conversion to base 2 and exp give `exp(s - m)` the relative error
      `e_s = 20 L + 4`; a row sum adds `sqrt(C)`, and so p and lse have
      `e_p = 2 e_s + sqrt(C) + 3`.
    - `sum t (m - s)` has, relative to `sum |t|`, `2 L (sqrt(C) + 3)` from its own sum and `20 L`
      from s. The loss is it plus `total log_l`: `e_l = e_p + 2 L (sqrt(C) + 13) + 2`, times
      `sum |t|`. The z term has `2 (e_p + 2) |lse| zeta`, and t itself the error 3.
    - `alpha p - g t` has `2 e_p + 3 G + 9`, with the error of lse in alpha, times the formula over
      absolute values. The slope of the softcap has `20`.
    - Tangents are of the same form, with one sum more: `+ sqrt(C) + 3`.

    The sum is doubled for float64, where the oracle has the same errors. With 16 bits u is that of
    float32, and the gradients are rounded once more, `+ v size` with v the unit roundoff of the 16
    bits, and half of their smallest number.

    Args:
        dtype: Dtype of the logits.
        quantity: One of loss, lse, z_loss, dlogits, dtargets, tloss, tlse, tz_loss.
        C: Classes.
        logit_size: L.
        magnitude: The result's formula over absolute values; for the loss `sum |t| + 2 zeta |lse|`,
            for lse 1. One number or one for each entry.
        size: The exact result's absolute value, in the same form.

    Returns:
        The bound, in the form of magnitude.

    Source:
        Higham & Mary 2019, A New Approach to Probabilistic Rounding Error Analysis, SIAM J. Sci.
        Comput. 41(5), theorem 2.4, here for the second moment.
    """
    root, L = math.sqrt(C), logit_size
    e_p = 2 * (20 * L + 4) + root + 3
    e_loss = e_p + 2 * L * (root + 13) + 5
    e_grad = 2 * e_p + 3 * max(1.0, L) + 29
    error = {
        "loss": e_loss,
        "z_loss": 2 * (e_p + 2),
        "lse": e_p,
        "dlogits": e_grad,
        "dtargets": e_p + 5,
        "tloss": e_loss + e_grad + root + 3,
        "tlse": e_grad + root + 3,
        "tz_loss": e_grad + root + 6,
    }[quantity]
    wide = compute_dtype(dtype)
    oracle = 2 if dtype == np.float64 else 1
    flushed = 2 * float(np.finfo(wide).tiny)
    bound = unit_roundoff(wide) * oracle * (error * magnitude + size) + flushed
    if is_narrow(dtype) and quantity in ("dlogits", "dtargets"):
        bound = bound + unit_roundoff(dtype) * size + smallest(dtype) / 2
    return bound
