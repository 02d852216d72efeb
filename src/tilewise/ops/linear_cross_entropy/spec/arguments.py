"""What the operator takes, as data: arrays, numbers and sizes."""

from __future__ import annotations

import operator as _operator
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tilewise.base.dims import Limit, between
from tilewise.base.errors import type_error, value_error
from tilewise.base.operator import Argument, Number, Values

NAME = "linear_cross_entropy"
REDUCTIONS = ("mean", "sum", "none")

_SIZE = 2**40
LIMITS: Mapping[str, Limit] = {"C": between("C", 1, _SIZE), "V": between("V", 1, _SIZE)}

_finite = Values("be finite", np.isfinite)

HIDDEN = Argument("hidden", (("T", "C"),), "what the classifier reads; has a gradient")
WEIGHT = Argument("weight", (("V", "C"),), "a row for each class; has a gradient")
BIAS = Argument(
    "bias", (("V",),), "added to the logits before the soft cap; has a gradient", precision="either"
)
CLASS_WEIGHT = Argument(
    "class_weight", (("V",),), "what each class counts", values=_finite, precision="either"
)

LABEL_SMOOTHING = Number(
    "label_smoothing", 0.0, 1.0, "the part of the target that all classes share"
)
# The squares of float32 logits up to 1e15 stay finite.
Z_LOSS = Number("z_loss", 0.0, 1e6, "factor of lse^2, which is added to the loss")
# Inside this range softcap and what is computed from it stay normal numbers in float32.
SOFTCAP = Number("softcap", 1e-15, 1e15, "c: a logit z becomes c tanh(z / c)")
GRADIENT_FILTER = Number(
    "gradient_filter", 0.0, 1.0, "probabilities below which gradients may be left out"
)


@dataclass(frozen=True, slots=True)
class Integer:
    """One argument that is an integer from low on, below 2**63."""

    name: str
    low: int
    doc: str

    def check(self, value: object) -> int:
        """Return the number as an int, or raise."""
        if not isinstance(value, bool | np.bool_):
            try:
                number = _operator.index(value)  # type: ignore[arg-type]
            except TypeError:
                pass
            else:
                if self.low <= number < 2**63:
                    return number
                lowest = "-2**63" if self.low == -(2**63) else str(self.low)
                raise value_error(NAME, self.name, f"be from {lowest} to 2**63 - 1", number)
        raise type_error(NAME, self.name, "be an integer", type(value).__name__)


IGNORE_INDEX = Integer("ignore_index", -(2**63), "the target of tokens that have no loss")
SHIFT = Integer("shift", 0, "how many tokens ahead of a hidden state its target is")
TOKEN_CHUNK = Integer("token_chunk", 1, "tokens of a tile of logits")
VOCAB_CHUNK = Integer("vocab_chunk", 1, "classes of a tile of logits")
FIRST_CLASS = Integer("first_class", 0, "number of the first class of a part")
CLASSES = Integer("classes", 1, "how many classes there are in all parts")
