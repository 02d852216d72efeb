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
    """Bound the rounding error of one result, entry by entry or in the Frobenius norm.

    Derivation, to first order in the unit roundoff u, with rounding errors independent and of mean
    zero: then the root mean square error of a sum of n terms is at most `u sqrt(n) sum |terms|`.
    With `s = x / temperature` and L a bound of |s| and of the sink, in units of u:

    - s is converted to base 2: the factor is rounded, and so is the product; the maximum is
      subtracted, and both may be rounded. The argument of exp has the error `4 L`, and exp that
      of two ulp: `exp(s - m)` has the relative error `e_s = 4 L + 4`.
    - A row sum of C such adds `sqrt(C)`, and the division or the logarithm 3:
      `e_p = 2 e_s + sqrt(C) + 3` is the relative error of y and the absolute one of log_y and lse,
      which are rounded once more.
    - `c = sum (p dy + dlog_y) - dlse` has the error of p and that of a sum: `e_c = e_p + sqrt(C) +
      3`, times the sum of absolute values. `ds = p (dy - c) + dlog_y` has `e_p + e_c + 3`.
    - tlse, ty and tlog_y are of the same form as c and ds.
    - The gradient of the sink is a sum over the rows that share it: `+ sqrt(rows)` is below
      `sqrt(C)` here only where few do, so it holds for a sink of its own for each row.

    The sum is doubled for float64, where the oracle has the same errors. With 16 bits u is that of
    float32, in which everything is computed, and y, log_y, their tangents and dx are rounded once
    more: `+ v size`, with v the unit roundoff of the 16 bits, and half of their smallest number.
    A number below twice the smallest normal one may become 0.

    Args:
        dtype: Dtype of x.
        quantity: One of y, log_y, lse, dx, dsink, ty, tlog_y, tlse.
        C: Entries of a row.
        logit_size: L.
        magnitude: The result's formula over absolute values: y itself for y, and 1 for log_y and
            lse. One number or one for each entry.
        size: The exact result's absolute value, in the same form.

    Returns:
        The bound, in the form of magnitude.

    Source:
        Higham & Mary 2019, A New Approach to Probabilistic Rounding Error Analysis, SIAM J. Sci.
        Comput. 41(5), theorem 2.4, here for the second moment.
    """
    e_p = 2 * (4 * logit_size + 4) + math.sqrt(C) + 3
    e_c = e_p + math.sqrt(C) + 3
    error = {
        "y": e_p,
        "log_y": e_p,
        "lse": e_p,
        "tlse": e_c,
        "dx": e_p + e_c + 3,
        "dsink": e_p + e_c + 3,
        "ty": e_p + e_c + 3,
        "tlog_y": e_c + 3,
    }[quantity]
    wide = compute_dtype(dtype)
    oracle = 2 if dtype == np.float64 else 1
    flushed = 2 * float(np.finfo(wide).tiny)
    bound = unit_roundoff(wide) * oracle * (error * magnitude + size) + flushed
    if is_narrow(dtype) and quantity not in ("lse", "tlse", "dsink"):
        bound = bound + unit_roundoff(dtype) * size + smallest(dtype) / 2
    return bound
