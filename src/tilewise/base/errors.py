"""The one form every error message takes.

A message names the operator, the argument, what is required of it and what was given instead::

    attention: k must have shape (B, Hk, Nk, D) with D=64 (from q), got (2, 8, 128, 32)

The functions build exceptions and leave the ``raise`` to the caller, so that the traceback ends at
the check that failed and type checkers see the control flow.
"""

from __future__ import annotations


class Unsupported(NotImplementedError):
    """A legal call that one particular implementation does not serve."""


def must(operator: str, name: str, requirement: str, got: object) -> str:
    """Return ``"<operator>: <name> must <requirement>, got <got>"``.

    A string passed as ``got`` is inserted as it is, so quote a user's value with ``repr`` first;
    everything else is shown by its ``repr``.
    """
    shown = got if isinstance(got, str) else repr(got)
    return f"{operator}: {name} must {requirement}, got {shown}"


def type_error(operator: str, name: str, requirement: str, got: object) -> TypeError:
    """Return a ``TypeError`` in the common form."""
    return TypeError(must(operator, name, requirement, got))


def value_error(operator: str, name: str, requirement: str, got: object) -> ValueError:
    """Return a ``ValueError`` in the common form."""
    return ValueError(must(operator, name, requirement, got))


def unsupported(operator: str, reason: str) -> Unsupported:
    """Return an ``Unsupported`` that says why an implementation does not serve a call."""
    return Unsupported(f"{operator}: {reason}")
