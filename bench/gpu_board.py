"""Check and time the attention kernels on a GPU board, beside PyTorch's and JAX's own.

python bench/gpu_board.py --results bench/results/h100.json
python bench/gpu_board.py --results bench/results/h100.json --tables

A run does the steps that are not done yet, and begins none after `--minutes`: run it again for the
rest. Each contender is compared with a float64 oracle first, on fresh inputs and with results that
begin as NaN; what does not agree is not timed. Exit status: 0 all done, 3 steps are left, 2 there
is no board.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

from tilewise.bench import board, board_steps  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, help="file of results, taken up where it stands")
    parser.add_argument("--minutes", type=float, default=8.5, help="no step begins after these")
    parser.add_argument("--only", default="", help="only steps whose name begins like this")
    parser.add_argument("--tables", action="store_true", help="print the tables and end")
    parser.add_argument("--list", action="store_true", help="print the steps and end")
    parser.add_argument("--only-check", help="one comparison, as compute-sanitizer runs it")
    parser.add_argument("--head-dim", type=int, default=64)
    given = parser.parse_args(arguments)
    if given.list:
        print("\n".join(step.name for step in board.steps()))
        return 0
    if given.tables:
        print(board.tables(board.read(given.results)) if given.results else "no --results")
        return 0
    found, reason = board_steps.board_or_reason()
    if found is None:
        print(f"gpu_board: no GPU board to measure: {reason}", file=sys.stderr)
        return 2
    if given.only_check:
        print(board_steps.check(given.only_check, given.head_dim, causal=True))
        return 0
    if given.results is None:
        parser.error("--results is needed")
    left = board.run_steps(
        given.results,
        board_steps.run,
        time.monotonic,
        60 * given.minutes,
        lambda step: step.name.startswith(given.only),
    )
    print(board.tables(board.read(given.results)))
    return 3 if left else 0


if __name__ == "__main__":
    raise SystemExit(main())
