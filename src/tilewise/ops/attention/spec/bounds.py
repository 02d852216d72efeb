"""How large rounding errors may be, derived from the formulas."""

from __future__ import annotations

import math

import numpy as np

from tilewise.base.dtypes import (
    FloatDType,
    compute_dtype,
    is_bfloat16,
    is_narrow,
    smallest,
    unit_roundoff,
)

from .calls import AttentionCall


def error_bound(
    dtype: FloatDType,
    quantity: str,
    call: AttentionCall,
    *,
    logit_size: float,
    magnitude: float,
    norm: float,
) -> float:
    """Bound the Frobenius norm of the rounding error of one result.

    Derivation, to first order in the unit roundoff u, with rounding errors independent and of mean
    zero: then the root mean square error of a sum of n terms is at most `u sqrt(n) sum |terms|`,
    and Frobenius norms add up those squares. In units of u:

    - A logit is a sum of D products, scaled, capped, biased and converted to base 2: its error is
      at most `(sqrt(D) + 4) L`, with L a bound of `scale sum_d |q_d k_d| + |bias| + ...`.
      Subtracting the maximum adds 2 L, and exp two ulp: `exp(s - m)` has the relative error
      `e_s = (sqrt(D) + 6) L + 4`.
    - A probability divides by a sum of Nk such: `e_p = 2 e_s + sqrt(Nk) + 3`.
    - `o = sum p v` has the error `e_p sum p |v|`.
    - `ds = p (do v - do o + dlse)` has the error of p twice, for o carries it as well, and that of
      sums over Dv: `e_ds = 2 e_p + sqrt(Dv) + 4`, times `p (|do| |v| + |do| sum p |v| + |dlse|)`.
    - dq, dk, dbias and dsinks are sums of ds, and dv is one of p: the square root of their length
      is added, and the magnitude is that of the same sum over absolute values.
    - Each result is rounded once: `+ norm`.

    The sum is doubled for float64, where the oracle has the same errors.

    With 16 bits u is that of float32, in which everything is computed, and each of o and the
    gradients is rounded once more: `+ v norm`, with v the unit roundoff of the 16 bits, and half
    of their smallest number for each entry that underflows. In bfloat16 the probabilities and ds
    may be rounded too, as factors of products: those errors are independent, so that their part of
    a sum without a large common part is that of its terms, and again at most `v norm`.

    Args:
        dtype: Dtype of q.
        quantity: One of o, lse, max_logit, entropy, dq, dk, dv, dbias, dsinks.
        call: The call, for its sizes.
        logit_size: L.
        magnitude: Frobenius norm of the result's formula over absolute values, as
            `reference.magnitudes` computes it; divided by `norm` it is a condition number.
        norm: Frobenius norm of the exact result.

    Returns:
        The bound; divide by `norm` for the relative error.

    Source:
        Higham & Mary 2019, A New Approach to Probabilistic Rounding Error Analysis, SIAM J. Sci.
        Comput. 41(5), theorem 2.4, here for the second moment.
    """
    e_s = (math.sqrt(call.D) + 6) * logit_size + 4
    e_p = 2 * e_s + math.sqrt(call.Nk) + 3
    e_ds = 2 * e_p + math.sqrt(call.Dv) + 4
    spread = 1 if call.bias is None else call.B * call.H * call.N * call.Nk / max(call.bias.size, 1)
    error = {
        "o": e_p,
        "lse": e_p,
        "max_logit": e_s,
        "entropy": 2 * e_p,
        "dq": e_ds + math.sqrt(call.Nk),
        "dk": e_ds + math.sqrt(call.N * call.H / max(call.Hk, 1)),
        "dv": e_p + math.sqrt(call.N * call.H / max(call.Hk, 1)),
        "dbias": e_ds + math.sqrt(spread),
        "dsinks": e_ds + math.sqrt(call.B * call.N),
    }[quantity]
    oracle = 2 if dtype == np.float64 else 1
    computed = unit_roundoff(compute_dtype(dtype)) * oracle * (error * magnitude + norm)
    if not is_narrow(dtype) or quantity not in _sizes(call):
        return computed
    roundings = 2 if is_bfloat16(dtype) else 1
    underflow = smallest(dtype) / 2 * math.sqrt(_sizes(call)[quantity])
    return computed + roundings * unit_roundoff(dtype) * norm + underflow


def _sizes(call: AttentionCall) -> dict[str, int]:
    """Return how many entries each result has that is stored in the dtype of its input."""
    return {
        "o": call.B * call.H * call.N * call.Dv,
        "dq": call.q.size,
        "dk": call.k.size,
        "dv": call.v.size,
        "dbias": 0 if call.bias is None else call.bias.size,
        "dsinks": call.H,
    }
