"""What all tests share: without a GPU, Triton interprets its kernels."""

import os
from pathlib import Path

# Read once, as a kernel is decorated: so it has to be there before any test imports Triton.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
