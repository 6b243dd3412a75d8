"""What this process holds in memory."""

from pathlib import Path


def held(field: str) -> float:
    """MB now (``"VmRSS"``) or at most so far (``"VmHWM"``); nan where there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return float("nan")
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith(field))
