"""The audit: is an implementation of attention right, and as accurate and repeatable as promised?

`run` tries the cases of `tilewise.verify.cases` on an implementation of this library or on a
function of your own and returns a `Report`; `derivatives` compares every derivative with every
option and returns a `Grid`; `verify_gradients` checks the gradients of one problem of yours. The
command `tilewise verify` is the first two.
"""

from .audit import audit_case, run
from .cases.attention import CASES, Case
from .gradients import GradientReport, verify_gradients
from .grid import Cell, Grid
from .report import CaseResult, Check, Report
from .sweep import derivatives

__all__ = [
    "CASES",
    "Case",
    "CaseResult",
    "Cell",
    "Check",
    "GradientReport",
    "Grid",
    "Report",
    "audit_case",
    "derivatives",
    "run",
    "verify_gradients",
]
