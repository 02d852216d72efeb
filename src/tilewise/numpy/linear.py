"""The linear map and its derivatives on NumPy arrays."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from tilewise.dispatch import choose
from tilewise.ops.linear.spec import (
    NAME,
    LinearCall,
    LinearGrads,
    SecondCall,
    of_output,
    prepare,
    prepare_jvp,
    prepare_vjp,
)

Array = NDArray[Any]


def linear(
    x: Array, w: Array, bias: Array | None = None, *, implementation: str | None = None
) -> Array:
    r"""Compute `y = x w^T + bias`, the convention of `torch.nn.functional.linear`.

    Args:
        x: `(..., C)`, float64, float32, float16 or `ml_dtypes.bfloat16`. Sums are float32 for the
            latter two.
        w: `(V, C)`, dtype of x.
        bias: `(V,)`, dtype of x, or None.
        implementation: `"cpu"`, NumPy's matrix products, or `"reference"`; by default the first.

    Returns:
        y: `(..., V)`, dtype of x.

    Raises:
        TypeError: An argument has a wrong kind or dtype.
        ValueError: An argument has a wrong shape.

    Accuracy:
        `tilewise.ops.linear.spec.error_bound`, which does not depend on the order of sums.
    """
    call = prepare(x, w, bias)
    y: Array = choose(NAME, call, implementation).forward(call, None)
    return _back(call, y)


def linear_vjp(
    dy: Array | None,
    x: Array,
    w: Array,
    bias: Array | None = None,
    *,
    grad_accumulator: Array | None = None,
    implementation: str | None = None,
) -> LinearGrads:
    r"""Compute the gradients: `dx = dy w`, `dw = dy^T x`, `dbias = sum dy`.

    In the latter two the leading dimensions of x are one.

    Args:
        dy: `(..., V)`, dtype of x. Cotangent of y; None is zero, here and below.
        x: As in the forward pass.
        w: As in the forward pass.
        bias: As in the forward pass.
        grad_accumulator: `(V, C)`, dtype of w, or float32 or float64 where that is wider. The
            gradient of w is added to it, by blocks of rows, without an array of its size.
        implementation: As for `linear`.

    Returns:
        `dx`, `dw`, or None with an accumulator, and `dbias`, or None without a bias.

    Raises:
        TypeError: An argument has a wrong kind or dtype.
        ValueError: An argument has a wrong shape, or the accumulator is read-only or an input.
    """
    call = prepare(x, w, bias)
    given = prepare_vjp(call, dy, grad_accumulator)
    return _grads(call, choose(NAME, call, implementation, "vjp").vjp(call, given))


def linear_jvp(
    tx: Array | None,
    tw: Array | None,
    x: Array,
    w: Array,
    bias: Array | None = None,
    *,
    tbias: Array | None = None,
    implementation: str | None = None,
) -> Array:
    r"""Compute the tangent of y: `ty = tx w^T + x tw^T + tbias`.

    Args:
        tx: Shape and dtype of x. Tangent of x; None is zero, here and below.
        tw: Shape and dtype of w. Tangent of w.
        x: As in the forward pass.
        w: As in the forward pass.
        bias: As in the forward pass.
        tbias: Shape and dtype of bias. Tangent of the bias.
        implementation: As for `linear`.

    Returns:
        ty: `(..., V)`, dtype of x.

    Raises:
        TypeError: An argument has a wrong kind or dtype.
        ValueError: An argument has a wrong shape.
    """
    call = prepare(x, w, bias)
    chosen = choose(NAME, call, implementation, "jvp")
    assert chosen.jvp is not None
    ty: Array = chosen.jvp(call, prepare_jvp(call, tx, tw, tbias))
    return _back(call, ty)


def linear_vjp_jvp(
    dy: Array | None,
    tx: Array | None,
    tw: Array | None,
    x: Array,
    w: Array,
    bias: Array | None = None,
    *,
    tbias: Array | None = None,
    tdy: Array | None = None,
    implementation: str | None = None,
) -> LinearGrads:
    r"""Compute the tangents of the gradients: the JVP of `linear_vjp`.

    `tdx = tdy w + dy tw`, `tdw = tdy^T x + dy^T tx`, `tdbias = sum tdy`. With `tdy = None` this is
    the product of the Hessian of `sum dy y` with the tangents.

    Args:
        dy: `(..., V)`, dtype of x. Cotangent of y; None is zero, here and below.
        tx: Shape and dtype of x. Tangent of x.
        tw: Shape and dtype of w. Tangent of w.
        x: As in the forward pass.
        w: As in the forward pass.
        bias: As in the forward pass.
        tbias: Shape and dtype of bias. Tangent of the bias, which no gradient depends on.
        tdy: Shape of dy. Tangent of dy.
        implementation: As for `linear`.

    Returns:
        Tangents of the gradients that `linear_vjp` returns, in the same fields and shapes.

    Raises:
        TypeError: An argument has a wrong kind or dtype.
        ValueError: An argument has a wrong shape.
    """
    call = prepare(x, w, bias)
    second = SecondCall(
        prepare_vjp(call, dy), prepare_jvp(call, tx, tw, tbias), of_output(call, "tdy", tdy)
    )
    chosen = choose(NAME, call, implementation, "vjp_jvp")
    assert chosen.vjp_jvp is not None
    return _grads(call, chosen.vjp_jvp(call, second))


def _back(call: LinearCall, rows: Array) -> Array:
    return rows.reshape(*call.leading, rows.shape[1])


def _grads(call: LinearCall, grads: LinearGrads) -> LinearGrads:
    return grads._replace(dx=_back(call, grads.dx))
