"""Time attention beside other libraries: the same as `tilewise bench attention`.

python bench/attention.py --suite full --json attention.json --plot attention.png
"""

from __future__ import annotations

import typer

from tilewise.cli.bench import attention

if __name__ == "__main__":
    typer.run(attention)
