"""What the tests of the Hopper kernels share: the emulator that runs them on the CPU."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def emulator() -> ModuleType:
    """The module beside this one."""
    path = Path(__file__).with_name("emulator.py")
    spec = importlib.util.spec_from_file_location("hopper_emulator", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
