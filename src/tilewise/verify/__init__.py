"""The audit: is an implementation of attention right, and as accurate and repeatable as promised?

`run` tries the cases of `tilewise.verify.cases` on an implementation of this library or on a
function of your own and returns a `Report`; `verify_gradients` checks the gradients of one
problem of yours. The command `tilewise verify` is the same.
"""

from .audit import audit_case, run
from .cases.attention import CASES, Case
from .gradients import GradientReport, verify_gradients
from .report import CaseResult, Check, Report

__all__ = [
    "CASES",
    "Case",
    "CaseResult",
    "Check",
    "GradientReport",
    "Report",
    "audit_case",
    "run",
    "verify_gradients",
]
