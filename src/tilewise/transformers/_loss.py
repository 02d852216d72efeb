"""The loss of a causal model from its hidden states: the logits are made where somebody asks."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import TracebackType
from typing import Any

from tilewise.base.errors import type_error, unsupported

NAME = "fused_loss"

# What transformers does with the labels of a loss before it compares: by how much it shifts them.
_SHIFTS = {"ForCausalLMLoss": 1, "ForMaskedLMLoss": 0}


class FusedLoss:
    """A model whose loss is fused with its last layer; undone by `remove`, or at the end of a with.

    Made by `fused_loss`.
    """

    def __init__(self, model: Any, options: dict[str, Any]) -> None:
        self._model, self._head, self._options = model, _head_of(model), options
        self._own, self._shift = _loss_of(model)
        self._active = False
        self._hooks = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, always_call=True),
        ]
        self._head.forward = self._logits
        self._had = model.__dict__.get("_loss_function")
        model.loss_function = self._loss

    def remove(self) -> None:
        """Give the model its own loss and last layer back."""
        for hook in self._hooks:
            hook.remove()
        self._head.__dict__.pop("forward", None)
        self._model.__dict__.pop("_loss_function", None)
        if self._had is not None:
            self._model.loss_function = self._had

    def __enter__(self) -> FusedLoss:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()

    def _begin(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._active = model.training and kwargs.get("labels") is not None

    def _end(self, model: Any, args: tuple[Any, ...], output: Any) -> None:
        self._active = False

    def _logits(self, hidden: Any) -> Any:
        if self._active:
            return Logits(self._head, hidden)
        return type(self._head).forward(self._head, hidden)

    def _loss(
        self,
        logits: Any,
        labels: Any,
        vocab_size: int | None = None,
        num_items_in_batch: Any = None,
        ignore_index: int = -100,
        shift_labels: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Compute what transformers would, with the arguments that it gives to its own losses."""
        fused = logits.classifier() if isinstance(logits, Logits) else None
        if fused is None:
            return self._own(
                logits,
                labels,
                vocab_size=vocab_size,
                num_items_in_batch=num_items_in_batch,
                ignore_index=ignore_index,
                shift_labels=shift_labels,
                **kwargs,
            )
        from tilewise.torch import linear_cross_entropy

        shifted = self._shift and shift_labels is None
        loss = linear_cross_entropy(
            fused.pop("hidden"),
            self._head.weight,
            labels if shift_labels is None else shift_labels,
            bias=self._head.bias,
            ignore_index=ignore_index,
            reduction="mean" if num_items_in_batch is None else "sum",
            shift=self._shift if shifted else 0,
            **fused,
            **self._options,
        )
        return loss if num_items_in_batch is None else loss / num_items_in_batch


def fused_loss(model: Any, **options: Any) -> FusedLoss:
    """Let a Hugging Face model compute its loss in training without making its logits.

    In training mode, with `labels`, the loss and its gradients come from
    `tilewise.torch.linear_cross_entropy`. `outputs.logits` are made only where they are read, and
    everywhere else the model is as before. A scale and a soft cap of the logits (Gemma 2, Granite,
    Cohere) are a part of the loss; a model that does anything else with its logits gets them, and
    its own loss.

    Args:
        model: A model of transformers with the loss of a causal or a masked language model, whose
            last layer (`get_output_embeddings`) is a `torch.nn.Linear`.
        **options: label_smoothing, z_loss, token_chunk, vocab_chunk and gradient_filter, as for
            `linear_cross_entropy`.

    Returns:
        A `FusedLoss`: its `remove()` undoes it; so does the end of a `with`.

    Raises:
        TypeError: The model has no last layer of that kind, or an option is unknown.
        Unsupported: The model has another loss.
    """
    known = ("label_smoothing", "z_loss", "token_chunk", "vocab_chunk", "gradient_filter")
    for option in options.keys() - set(known):
        raise TypeError(f"{NAME}() got an unexpected keyword argument {option!r}")
    return FusedLoss(model, options)


def _head_of(model: Any) -> Any:
    """Return the last layer of a model."""
    Linear = import_module("torch").nn.Linear
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if type(head) is not Linear:
        raise type_error(NAME, "model", "end in a torch.nn.Linear", type(head).__name__)
    if "forward" in head.__dict__:
        raise unsupported(NAME, "something else has replaced the last layer's forward already")
    return head


def _loss_of(model: Any) -> tuple[Callable[..., Any], int]:
    """Return the loss function of a model, and by how much it shifts the labels."""
    own = getattr(model, "loss_function", None)
    name = getattr(own, "__name__", type(own).__name__)
    if own is None or name not in _SHIFTS:
        raise unsupported(NAME, f"the loss {name} of {type(model).__name__} is not served")
    return own, _SHIFTS[name]


_STEPS: dict[str, Callable[[Any, Any], Any]] = {
    "times": lambda logits, number: logits * number,
    "over": lambda logits, number: logits / number,
    "tanh": lambda logits, _: logits.tanh(),
    "float": lambda logits, _: logits.float(),
}


class Logits:
    """What the last layer would return: its result where a function is applied to it.

    Multiplication by a number and a soft cap are kept in mind.
    """

    def __init__(self, head: Any, hidden: Any, done: tuple[tuple[str, Any], ...] = ()) -> None:
        self._head, self._hidden, self._done = head, hidden, done
        self._made: Any = None

    def classifier(self) -> dict[str, Any] | None:
        """Return hidden and softcap as `linear_cross_entropy` takes them, or None."""
        done, softcap = [step for step in self._done if step[0] != "float"], None
        if len(done) > 2 and done[-2][0] == "tanh":
            c = done[-1][1]
            if done[-3:] != [("over", c), ("tanh", None), ("times", c)]:
                return None
            done, softcap = done[:-3], c
        if any([kind == "tanh" for kind, _ in done]) or (done and self._head.bias is not None):
            return None
        hidden = self._hidden
        for kind, number in done:
            hidden = hidden * number if kind == "times" else hidden / number
        return {"hidden": hidden, "softcap": softcap}

    def tensor(self) -> Any:
        """Return the logits."""
        if self._made is None:
            made = type(self._head).forward(self._head, self._hidden)
            for kind, number in self._done:
                made = _STEPS[kind](made, number)
            self._made = made
        return self._made

    def _then(self, kind: str, number: Any = None) -> Logits:
        return Logits(self._head, self._hidden, (*self._done, (kind, number)))

    def float(self) -> Any:
        """Return the logits in float32, in which the loss is anyway."""
        return self._then("float")

    def tanh(self) -> Any:
        """Return the logits after tanh."""
        return self._then("tanh")

    def __mul__(self, other: Any) -> Any:
        if isinstance(other, int | float):
            return self._then("times", other)
        return self.tensor() * other

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        if isinstance(other, int | float) and other:
            return self._then("over", other)
        return self.tensor() / other

    def __getitem__(self, index: Any) -> Any:
        return self.tensor()[index]

    def __len__(self) -> int:
        return len(self.tensor())

    def __hash__(self) -> int:
        return id(self)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Apply a function of torch to the logits."""
        # Not by import_module, which torch.compile does not trace.
        import torch

        if function is torch.tanh and len(args) == 1 and not kwargs:
            return args[0].tanh()
        tree = torch.utils._pytree.tree_map(_tensor_of, (args, kwargs or {}))
        return function(*tree[0], **tree[1])


def _applied(name: str) -> Callable[..., Any]:
    def method(self: Logits, *args: Any) -> Any:
        return getattr(self.tensor(), name)(*map(_tensor_of, args))

    return method


# Python looks these up in the class; what is not listed here or above is no operator of a tensor.
_ARITHMETIC = ("add", "sub", "matmul", "pow", "floordiv", "mod")
_OPERATORS = [f"{side}{name}" for name in _ARITHMETIC for side in ("", "r")]
_OPERATORS += ["rtruediv", "neg", "abs", "eq", "ne", "lt", "le", "gt", "ge", "iter", "float", "int"]
for _name in _OPERATORS:
    setattr(Logits, f"__{_name}__", _applied(f"__{_name}__"))


def _tensor_of(x: Any) -> Any:
    return x.tensor() if isinstance(x, Logits) else x
