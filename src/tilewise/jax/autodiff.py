"""The door of every operator to JAX: every transformation, without the operator's maths.

An operator is four functions of arrays. Each is a primitive of JAX, and the rules here make the
four differentiable by one another. With the Jacobian J of f and the Hessian H(c) of `<c, f(x)>`,
which is symmetric:

    primitive  value           JVP                                       transpose
    forward    f(x)            jvp
    jvp        J t             in t: jvp           in x: jvp_jvp         t: vjp
    vjp        J'c             in c: vjp           in x: vjp_jvp         c: jvp
    vjp_jvp    J'tc + H(c) t   in tc, t: vjp_jvp                         tc: jvp   t: vjp_jvp
    jvp_jvp    d(J t)          in the tangents: jvp_jvp                  vjp, vjp_jvp

The last one is run in forward mode over forward mode alone: in reverse mode over forward mode it is
transposed, and gone. What is missing in the table needs third derivatives.

Arguments may have more leading dimensions, all equally many; those of size 1 repeat. A symbolic
zero is never made into an array: the function is told that there is no such argument.
"""

from __future__ import annotations

from ast import literal_eval
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from inspect import signature
from itertools import chain, compress
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, partial_eval, xla

from tilewise.base.dtypes import is_narrow
from tilewise.base.errors import unsupported, value_error
from tilewise.base.operator import FORWARD_TWICE, KINDS, FlatOperator
from tilewise.dispatch import named

from . import gpu
from .execution import Function, emit, mark_batch, operators

try:
    from jax._src.interpreters.ad import fallback_linearize_rule, primitive_linearizations
except ImportError:
    _KNOWN = False
else:
    _KNOWN = [*signature(fallback_linearize_rule).parameters][1:3] == ["_is_vjp", "_nonzeros"]

Arrays = Sequence[Any]
Pair = tuple[list[Any], list[Any]]

LINEAR = {"jvp": 1, "vjp": 1, "vjp_jvp": 2, FORWARD_TWICE: 2}
"""How many groups of a function's arguments, the first ones, it is linear in.

Then come constants of the linear map, in `vjp_jvp` and `jvp_jvp` with one more linear group behind
them: the tangents of the outputs, which follow from those of the inputs.
"""


def register(operator: FlatOperator) -> None:
    """Let programs name an operator."""
    operators[operator.name] = operator


def forward(
    operator: FlatOperator, inputs: Arrays, options: str, needed: tuple[bool, ...]
) -> tuple[Any, ...]:
    """Return the outputs of an operator, with every transformation; None where not needed.

    Args:
        operator: A registered operator.
        inputs: Its inputs, arrays or None; trailing ones may be left out.
        options: The other options as the text of a dictionary.
        needed: Which outputs are needed.
    """
    _check_implementation(operator.name, options)
    missing = len(operator.inputs) - len(inputs)
    groups = [(*inputs, *(None,) * missing)]
    found = _bind(operator, "forward", options, groups, needed + (False,) * len(operator.residuals))
    return tuple(found[: len(needed)])


@lru_cache(maxsize=256)
def _check_implementation(operator: str, options: str) -> None:
    """Raise where an implementation is named that does not exist."""
    name = literal_eval(options)["implementation"]
    if name is not None:
        named(operator, name)


def save_results(primitive: Any, *_: Any, **__: Any) -> bool:
    """Policy for `jax.checkpoint`: keep what forward passes of operators return, nothing else."""
    return primitive is _PRIMITIVES["forward"]


def _bind(
    operator: FlatOperator, kind: str, options: str, groups: Sequence[Arrays], needed: Sequence[Any]
) -> list[Any]:
    """Bind a function; arguments that are None, and results that are not needed, are left out."""
    if not any(needed):
        return [None] * len(needed)
    arguments = [*chain(*_read(operator, kind, groups))]
    function = Function(
        operator.name,
        kind,
        options,
        tuple([a is not None for a in arguments]),
        tuple(map(bool, needed)),
    )
    given = _alike([a for a in arguments if a is not None])
    found = iter(_PRIMITIVES[kind].bind(*given, function=function))
    return [next(found) if wanted else None for wanted in needed]


def _read(operator: FlatOperator, kind: str, groups: Sequence[Arrays]) -> Sequence[Arrays]:
    """Return the arguments that a function reads; what nothing else reads is never computed."""
    groups = list(groups)
    if kind != "forward":
        pairs = zip(groups[-2], operator.reads, strict=True)
        groups[-2] = tuple([y if read else None for y, read in pairs])
    if kind in ("vjp_jvp", FORWARD_TWICE):
        groups[-1] = _without_kept(operator, groups[-1])
    if kind == "vjp_jvp" and not operator.output_tangents:
        groups[-4] = (None,) * operator.active_outputs
    return groups


def _without_kept(operator: FlatOperator, residuals: Arrays) -> Arrays:
    """Return residuals without gradients, which hold nothing of another cotangent's."""
    kept = operator.kept_gradients
    return (*residuals[: len(residuals) - kept], *(None,) * kept)


def _alike(arrays: list[Any]) -> list[Any]:
    """Return arrays that vary over the same axes of a mesh, as shard_map asks for."""
    varying = [_axes(jax.typeof(a)) for a in arrays]
    every = frozenset[Any]().union(*varying)
    return [
        jax.lax.pcast(a, tuple(every - axes), to="varying") if every - axes else a
        for a, axes in zip(arrays, varying, strict=True)
    ]


def _axes(aval: Any) -> frozenset[Any]:
    axes: frozenset[Any] = aval.mat.varying if hasattr(aval, "mat") else aval.vma
    return axes


# Shapes


def _abstract(*avals: Any, function: Function) -> list[Any]:
    """Return shapes and dtypes of the results; for wrong shapes of inputs, the operator's error."""
    arguments = function.spread(avals)
    operator, first, extra = (
        function.operator,
        arguments[function.first],
        function.leading(arguments),
    )
    leading = jnp.broadcast_shapes(*[a.shape[:extra] for a in avals])
    inputs = arguments[function.first :][: len(operator.inputs)]
    if function.kind in ("forward", "jvp", FORWARD_TWICE):
        shapes, dtypes = _of_outputs(function, inputs, extra)
    else:
        like = inputs[: operator.active_inputs]
        shapes = [() if a is None else tuple(a.shape[extra:]) for a in like]
        dtypes = [first.dtype if a is None else a.dtype for a in like]
    split = _split(function, arguments, avals)

    def result(shape: tuple[int, ...], dtype: Any) -> Any:
        shape = leading + shape
        spec = jax.P(*split[: len(shape)], *[None] * (len(shape) - len(split)))
        sharding = first.sharding.update(spec=spec)
        return first.update(shape=shape, dtype=dtype, weak_type=False, sharding=sharding)

    # Derivatives of outputs are fewer than outputs and residuals, and the first of them.
    results = zip(shapes, dtypes, function.needed, strict=False)
    return [result(shape, dtype) for shape, dtype, wanted in results if wanted]


def _of_outputs(
    function: Function, inputs: Arrays, extra: int
) -> tuple[list[tuple[int, ...]], list[Any]]:
    """Return shapes and dtypes of outputs and residuals."""
    operator, dtype = function.operator, inputs[0].dtype
    given = [None if a is None else tuple(a.shape[extra:]) for a in inputs]
    shapes = list(operator.shapes(given, function.parsed))
    dtypes = [dtype] * operator.narrow_outputs
    dtypes += [jnp.float32 if is_narrow(dtype) else dtype] * (len(shapes) - len(dtypes))
    for i, name in enumerate((*operator.outputs, *operator.residuals)):
        if name in operator.dtypes:
            dtypes[i] = _dtype_of(operator.dtypes[name], operator, inputs)
    return shapes, dtypes


def _dtype_of(source: str, operator: FlatOperator, inputs: Arrays) -> Any:
    """Return a dtype by its name, with as many bits as JAX has, or by that of an input."""
    if source not in operator.inputs:
        return jax.dtypes.canonicalize_dtype(source)
    array = inputs[operator.inputs.index(source)]
    return (inputs[0] if array is None else array).dtype


def _split(function: Function, arguments: Arrays, avals: Arrays) -> list[Any]:
    """Return over which explicit axes of a mesh the batch is split."""
    specs = [a.sharding.spec for a in avals]
    batch = _batch(function, arguments)
    return [next((s[i] for s in specs if i < len(s) and s[i]), None) for i in range(batch)]


def _batch(function: Function, arguments: Arrays) -> int:
    """Return how many of the first dimensions hold problems that do not know each other."""
    own = function.operator.batch
    extra = function.leading(arguments)
    core = [
        None if a is None else jax.ShapeDtypeStruct(a.shape[extra:], a.dtype) for a in arguments
    ]
    return extra + own(function.kind, core, function.parsed)


# Derivatives


def _is_zero(tangent: Any) -> bool:
    return tangent is None or type(tangent) is ad.Zero or tangent.dtype == jax.dtypes.float0


def _some(arrays: Arrays) -> bool:
    return any([a is not None for a in arrays])


def _all_or_none(arrays: Arrays) -> Arrays:
    """Return tangents of outputs where all are known; otherwise they are computed."""
    return arrays if all([a is not None for a in arrays]) else (None,) * len(arrays)


def _jvp(primals: Arrays, tangents: Arrays, *, function: Function) -> Pair:
    """Apply the JVP of the table."""
    operator, kind = function.operator, function.kind
    groups = function.split(primals)
    dots = function.split([None if _is_zero(t) else t for t in tangents])
    bind = partial(_bind, operator, options=function.options)
    if kind == "forward":
        return _jvp_of_forward(function, groups[0], dots[0])
    base, moved = groups[-3:], dots[-3][: operator.active_inputs]
    _refuse_passive(operator, dots[-3])
    out = bind(kind, groups=groups, needed=function.needed)
    ty = _all_or_none(dots[-2])
    if not _some(moved):
        found = _linear_part(function, groups, dots)
    elif kind == "vjp":
        needed = function.needed
        found = bind("vjp_jvp", groups=[dots[0], moved, groups[0], ty, *base], needed=needed)
    elif kind == "jvp":
        moves = [dots[0], moved, groups[0], out, ty]
        found = bind(FORWARD_TWICE, groups=[*moves, *base], needed=function.needed)
    else:
        raise unsupported(operator.name, "third derivatives are not provided")
    return _moved(function, out, found)


def _linear_part(function: Function, groups: list[Any], dots: list[Any]) -> list[Any]:
    """Return the tangents of a function whose constants do not move."""
    operator, kind = function.operator, function.kind
    linear = LINEAR[kind]
    constants = range(linear, len(groups) - 3 - (len(groups) > 5))
    if any([_some(dots[i]) for i in constants]):
        raise unsupported(operator.name, "third derivatives are not provided")
    if not any([_some(dot) for dot in dots[:linear]]):
        return [None] * len(function.needed)
    moved = [*dots[:linear], *groups[linear:]]
    if kind in ("vjp_jvp", FORWARD_TWICE):
        moved[len(groups) - 4] = _all_or_none(dots[len(groups) - 4])
    return _bind(operator, kind, function.options, moved, function.needed)


def _jvp_of_forward(function: Function, inputs: Arrays, dots: Arrays) -> Pair:
    """Run the forward pass with what derivatives need, and the jvp."""
    out = _with_residuals(function, inputs)
    base = _without_kept(function.operator, out)
    return _moved(function, out, _tangents(function, inputs, base, dots))


def _linearize(is_vjp: bool, moving: Arrays, *primals: Any, function: Function) -> tuple[Any, ...]:
    """Run the forward pass; return results, which of them move, and the jvp as a function.

    Where a vjp is to come, gradients that the forward pass can compute at less cost are residuals.
    """
    operator, (inputs,) = function.operator, function.split(primals)
    moves = [
        move and jax.typeof(primal).to_tangent_aval().dtype != jax.dtypes.float0
        for move, primal in zip(moving, primals, strict=True)
    ]
    active = [bool(move) for move in function.split(moves)[0][: operator.active_inputs]]
    joins = operator.joins if is_vjp else None
    joined = joins is not None and joins(inputs[0].dtype, function.parsed)
    out = _with_residuals(function, inputs, active if joined else ())
    base = out if joined else _without_kept(operator, out)

    def linear(base: Arrays, *tangents: Any) -> list[Any]:
        (dots,) = function.split([None if _is_zero(t) else t for t in tangents])
        return _moved(function, out, _tangents(function, inputs, base, dots))[1]

    of_outputs = [any(active) and i < operator.active_outputs for i in range(len(out))]
    results = list(compress(out, function.needed))
    return results, list(compress(of_outputs, function.needed)), base, linear


def _with_residuals(function: Function, inputs: Arrays, keep: Sequence[bool] = ()) -> list[Any]:
    """Run the forward pass with what derivatives need.

    Args:
        function: The forward pass.
        inputs: Its inputs.
        keep: Which gradients it is to compute besides those that are needed anyway.
    """
    operator = function.operator
    outputs, active = len(operator.outputs), operator.active_outputs
    narrow, kept = operator.narrow_residuals, operator.kept_gradients
    plain = len(operator.residuals) - narrow - kept
    needed = (True,) * active + function.needed[active:outputs] + (True,) * plain
    needed += (is_narrow(inputs[0].dtype),) * narrow
    if kept:
        asked = zip(function.needed[-kept:], keep or (False,) * kept, strict=True)
        needed += tuple([a or b for a, b in asked])
    out = _bind(operator, "forward", function.options, [inputs], needed)
    names = (*operator.outputs, *operator.residuals)
    return [
        None if o is None else checkpoint_name(o, f"{operator.name}.{name}")
        for o, name in zip(out, names, strict=True)
    ]


def _tangents(function: Function, inputs: Arrays, out: Arrays, dots: Arrays) -> list[Any]:
    """Return the tangents of all results of a forward pass; None is zero."""
    operator = function.operator
    _refuse_passive(operator, dots)
    outputs, active = len(operator.outputs), operator.active_outputs
    tangents: list[Any] = [None] * len(out)
    moved = dots[: operator.active_inputs]
    if _some(moved):
        groups = [moved, inputs, out[:active], out[outputs:]]
        tangents[:active] = _bind(operator, "jvp", function.options, groups, (True,) * active)
    return tangents


def _moved(function: Function, out: Arrays, tangents: Arrays) -> Pair:
    """Return the results that are needed with their tangents, symbolic zeros in place of None."""
    wanted = list(compress(out, function.needed))
    moves = list(compress(tangents, function.needed))
    for i, primal in enumerate(wanted):
        if moves[i] is None:
            moves[i] = ad.Zero(jax.typeof(primal).to_tangent_aval())
    return wanted, moves


def _refuse_passive(operator: FlatOperator, dots: Arrays) -> None:
    """Raise where a derivative is asked for that would silently be taken for zero."""
    for name, dot in zip(operator.inputs, dots, strict=True):
        if dot is not None and name not in operator.inputs[: operator.active_inputs]:
            requirement = "be without derivatives (pass it through jax.lax.stop_gradient)"
            raise value_error(operator.name, name, requirement, "one that is differentiated")


def _transpose(cotangents: Arrays, *arguments: Any, function: Function) -> list[Any]:
    """Apply the transpose of the table."""
    operator, kind = function.operator, function.kind
    groups = function.split(arguments)
    given = iter(cotangents)
    g = [next(given) if wanted else None for wanted in function.needed]
    g = [None if _is_zero(c) else c for c in g]
    base = groups[-3:]
    back: list[Sequence[Any]] = [(None,) * len(group) for group in groups]
    none = (None,) * operator.active_outputs

    def call(other: str, into: int | None, *own: Arrays) -> list[Any]:
        """Run a function; of the results, those that group `into` asks for."""
        every = (True,) * operator.active_outputs
        needed = every if into is None else [ad.is_undefined_primal(a) for a in groups[into]]
        return _bind(operator, other, function.options, [*own, *base], needed)

    if not _some(g):
        pass
    elif kind == "jvp":
        back[0] = call("vjp", 0, g)
    elif kind == "vjp":
        back[0] = call("jvp", None, g)
    elif kind == "vjp_jvp":
        jg = call("jvp", None, g)
        back[0], back[1] = jg, call("vjp_jvp", 1, none, g, groups[2], jg)
    else:
        _, _, t, ty, *_ = groups
        back[0], back[1] = call("vjp", 0, g), call("vjp_jvp", 1, none, t, g, _all_or_none(ty))
    pairs = zip(chain(*groups), chain(*back), strict=True)
    return [_cotangent(argument, c) for argument, c in pairs if argument is not None]


def _cotangent(argument: Any, cotangent: Any) -> Any:
    """Return the cotangent of an argument, summed over the leading sizes in which it repeats.

    It lies on the devices as the argument does, as explicit axes of a mesh ask for.
    """
    if not ad.is_undefined_primal(argument):
        return None
    if cotangent is None:
        return ad.Zero(argument.aval)
    pairs = zip(cotangent.shape, argument.aval.shape, strict=True)
    repeated = [i for i, (many, one) in enumerate(pairs) if many != one]
    found = jnp.sum(cotangent, repeated, keepdims=True) if repeated else cotangent
    where = argument.aval.sharding
    alike = where.mesh.empty or jax.typeof(found).sharding.spec == where.spec
    return found if alike else jax.sharding.reshard(found, where)


# Batches, and execution


def _vmap(arguments: Arrays, dims: Arrays, *, function: Function) -> tuple[list[Any], list[int]]:
    """Put the mapped dimension first; an argument that is not mapped repeats over it."""
    moved = [
        jnp.expand_dims(a, 0) if dim is None else jnp.moveaxis(a, dim, 0)
        for a, dim in zip(arguments, dims, strict=True)
    ]
    out = _PRIMITIVES[function.kind].bind(*moved, function=function)
    return out, [0] * len(out)


def _lower(context: Any, *operands: Any, function: Function) -> Any:
    gpu.refuse_on_cpu(function)
    out = _program(context, operands, function, emit)
    call, shapes = out[0].owner, [a.shape for a in (*context.avals_in, *context.avals_out)]
    batch = _batch(function, function.spread(context.avals_in))
    alike = all([shape[:batch] == shapes[0][:batch] for shape in shapes])
    constant = all([isinstance(n, int) for shape in shapes for n in shape])
    if batch and alike and constant and call.name == "stablehlo.custom_call":
        mark_batch(call, batch)
    return out


def _lower_for_cuda(context: Any, *operands: Any, function: Function) -> Any:
    return _program(context, operands, function, gpu.emit)


def _program(context: Any, operands: Arrays, function: Function, emit: Callable[..., Any]) -> Any:
    """Return the results of a function in the program that is being lowered."""
    if function.kind == FORWARD_TWICE and function.operator.jvp_jvp is None:
        raise unsupported(function.name, "forward mode over forward mode is not provided")

    def program(*given: Any) -> Any:
        scaled = _scaled(function, context.avals_out, given)
        return scaled if scaled is not None else emit(function, context.avals_out, *given)

    return mlir.lower_fun(program, multiple_results=True)(context, *operands)


def _scaled(function: Function, results: Arrays, given: Arrays) -> list[Any] | None:
    """Return the gradients that a forward pass kept, times a cotangent, where they are all."""
    kept = function.operator.kept_gradients
    if function.kind != "vjp" or not kept:
        return None
    (first, *others), *_, residuals = function.split(given)
    grads = list(compress(residuals[-kept:], function.needed))
    if first is None or _some(others) or not all([grad is not None for grad in grads]):
        return None
    made = []
    for grad, result in zip(grads, results, strict=True):
        factor = jnp.expand_dims(first, [*range(first.ndim, grad.ndim)])
        product = (grad.astype(first.dtype) * factor).astype(grad.dtype)
        made.append(jnp.broadcast_to(product, result.shape))
    return made


def _dce(used: list[bool], equation: Any) -> tuple[list[bool], Any]:
    """Leave out results that nobody reads, but not the outputs that are always needed."""
    function: Function = equation.params["function"]
    every = len(equation.invars)
    if not any(used):
        return [False] * every, None
    always = {"forward": function.operator.active_outputs, "vjp": 0, "vjp_jvp": 0}
    first = always.get(function.kind, len(function.needed))
    reads = iter(used)
    needed = [wanted and (next(reads) or i < first) for i, wanted in enumerate(function.needed)]
    stays = list(compress(needed, function.needed))
    if all(stays):
        return [True] * every, equation
    slim = replace(function, needed=tuple(needed))
    params, outvars = {"function": slim}, list(compress(equation.outvars, stays))
    return [True] * every, equation.replace(params=params, outvars=outvars)


def _primitive(kind: str) -> Primitive:
    primitive = Primitive(f"tilewise_{kind}")
    primitive.multiple_results = True
    primitive.def_impl(partial(xla.apply_primitive, primitive))
    primitive.def_abstract_eval(_abstract)
    ad.primitive_jvps[primitive] = _jvp
    batching.primitive_batchers[primitive] = _vmap
    mlir.register_lowering(primitive, _lower, platform="cpu")
    mlir.register_lowering(primitive, _lower_for_cuda, platform="cuda")
    partial_eval.dce_rules[primitive] = _dce
    if kind == "forward" and _KNOWN:
        # Without it reverse mode goes by `_jvp`: gradients are computed in the backward pass.
        primitive_linearizations[primitive] = _linearize
    if kind != "forward":
        ad.primitive_transposes[primitive] = _transpose
    return primitive


_PRIMITIVES: dict[str, Primitive] = {kind: _primitive(kind) for kind in (*KINDS, FORWARD_TWICE)}
