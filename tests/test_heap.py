"""Blocks that come back need no fresh pages."""

import subprocess
import sys

import pytest

CODE = """
import resource, sys
import torch
from volssl.heap import keep_freed

if sys.argv[1] == "keep":
    assert keep_freed()
for number in range(16):
    if number == 8:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(8 << 20), torch.ones(12 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc alone it can be asked for")
def test_used_memory_is_used_again_without_a_fault():
    plain, kept = (
        int(subprocess.run([sys.executable, "-c", CODE, how], check=True, capture_output=True, text=True).stdout)
        for how in ("plain", "keep")
    )
    assert plain > 1000 and kept < plain / 10
