"""What a process does with memory that it has used: keep it for the next use.

Blocks of some megabytes, which volumes are made of, come fresh from the system each time, by the C library's defaults, and go back at once.
Each fresh page then costs an interrupt and is filled with zeros. `tools/bench_predict.py` measures how much of a prediction's time that is.
"""

from __future__ import annotations

import ctypes

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST = 2**31 - 1


def keep_freed() -> bool:
    """From now on this process keeps what it frees, and its children made by fork do. Whether that could be asked for: of glibc it can.

    What is held at most does not grow by it, but for what lies between blocks in use.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    taken = [mallopt(option, LARGEST) for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD)]  # both are asked for, whatever the first answers
    return all(taken)
