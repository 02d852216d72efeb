"""Print the folder of XLA's headers, if there is one; CMake asks for it."""

import sysconfig
from importlib.util import find_spec
from pathlib import Path

found = find_spec("jaxlib")
# A build in isolation does not see the packages beside which it will be installed.
places = [Path(found.origin).parent] if found and found.origin else []
places += [Path(sysconfig.get_path("platlib"), "jaxlib")]
headers = [place / "include" for place in places]
print(next((path for path in headers if (path / "xla/ffi/api/ffi.h").exists()), ""))
