"""How large rounding errors may be, derived from the formulas."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tilewise.base.dtypes import FloatDType, compute_dtype, is_narrow, smallest, unit_roundoff


def error_bound(
    dtype: FloatDType,
    quantity: str,
    sizes: tuple[int, int, int],
    *,
    logit_size: float,
    magnitude: Any,
    size: Any,
) -> Any:
    """Bound the rounding error of one result, entry by entry or in the Frobenius norm.

    Derivation, to first order in the unit roundoff u, with rounding errors independent and of mean
    zero: then the root mean square error of a sum of n terms is at most `u sqrt(n) sum |terms|`.
    With L a bound of `sum |hidden weight| + |bias|` of all logits, in units of u:

    - A logit is a sum of C products and a bias, and its soft cap a quotient, tanh to 4 ulp and a
      product: `e_s = (sqrt(C) + 10) L`.
    - The argument of exp is converted to base 2 and loses `4 L` as in the softmax, exp has 2 ulp,
      and a row sum of V such adds `sqrt(V)`, its logarithm or the division 3: lse has the absolute
      error `e_l = e_s + 4 L + sqrt(V) + 7`, and p the relative one `e_p = 2 e_l`.
    - The loss `A log_l + sum t (m - s) + zeta lse^2` moves by A with lse and with s, and is summed
      over the classes: `e_l + e_s + sqrt(V) + 3`, times `A + 2 zeta |lse|`.
    - The entropy is a sum of `p (s - m)`: `e_p + e_s + sqrt(V) + 3`, times `1 + sum p |s - m|`.
    - `dz = alpha p - g t` has `e_z = e_p + e_l + 6`, times `|alpha| p + |g| t`, and the gradients
      are sums of its products: `e_z + sqrt(V) + 2` for hidden, `e_z + sqrt(T) + 2` for weight and
      bias.

    The sum is doubled for float64, where the oracle has the same errors. With 16 bits u is that of
    float32, in which everything is computed, and gradients are rounded once more: `+ v size`, with
    v the unit roundoff of the 16 bits, and half of their smallest number. Where the target has
    products of bfloat16 pairs, dz is rounded to them, but for entries above a sixteenth of the
    token's largest, of which nothing is lost. Of hidden the root of the sum of squares of the
    others is below a quarter of their sum, `v / 4`; the gradient of a class may have no other,
    `v`. A number below twice the smallest normal one may become 0.

    Args:
        dtype: Dtype of hidden.
        quantity: One of loss, lse, entropy, dhidden, dweight, dbias.
        sizes: T, C and V.
        logit_size: L.
        magnitude: The result's formula over absolute values, as named above; for dhidden with the
            largest entry of weight in place of weight. One number or one for each entry. That of a
            reduced loss is reduced in the same way.
        size: The exact result's absolute value, in the same form.

    Returns:
        The bound, in the form of magnitude.

    Source:
        Higham & Mary 2019, A New Approach to Probabilistic Rounding Error Analysis, SIAM J. Sci.
        Comput. 41(5), theorem 2.4, here for the second moment.
    """
    T, C, V = (math.sqrt(n) for n in sizes)
    e_s = (C + 10) * logit_size
    e_l = e_s + 4 * logit_size + V + 7
    e_z = 3 * e_l + 6
    error = {
        "loss": e_l + e_s + V + 3,
        "lse": e_l,
        "entropy": 2 * e_l + e_s + V + 3,
        "dhidden": e_z + V + 2,
        "dweight": e_z + T + 2,
        "dbias": e_z + T + 2,
    }[quantity]
    wide = compute_dtype(dtype)
    oracle = 2 if dtype == np.float64 else 1
    bound = unit_roundoff(wide) * oracle * (error * magnitude + size)
    bound = bound + 2 * float(np.finfo(wide).tiny)
    if is_narrow(dtype) and quantity in ("dhidden", "dweight", "dbias"):
        v = unit_roundoff(dtype)
        lost = v / 4 if quantity == "dhidden" else v
        bound = bound + v * size + lost * magnitude + smallest(dtype) / 2
    return bound
