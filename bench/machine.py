"""What a result depends on besides the code: the machine, the versions, and its memory bandwidth."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from svdk.errors import InputError

CPU_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
FALLBACK_CACHE = 64 << 20
"""Bytes to outgrow where the system does not say how large its last cache is."""


def describe(device: torch.device) -> dict[str, Any]:
    """Machine, versions, commit and thread count, all JSON values."""
    import transformers

    import svdk

    info = {
        "device": device.type,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "last_cache_bytes": last_cache(device),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "svdk": svdk.__version__,
        "commit": commit(),
    }
    if device.type == "cuda":
        info |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    else:
        info["kernel"] = _cpu_kernel()
    return info


def _cpu_kernel() -> str | None:
    from svdk.ops import backends

    if backends.status()["cpu"] != "available":
        return None
    from svdk import _C

    return _C.cpu_arch()


def cpu_name() -> str:
    """The processor's own name for itself, or the architecture."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.M) if info.exists() else None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def checkout() -> Path | None:
    """The source tree that svdk runs from; None for an installed wheel."""
    root = Path(__file__).resolve().parent.parent
    return root if (root / "pyproject.toml").exists() else None


def commit() -> str | None:
    """The commit of the source tree svdk runs from, with ``-dirty`` after changes; None outside of one."""
    root = checkout()
    if root is None or not (root / ".git").exists():
        return None
    try:
        head = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip()


def last_cache(device: torch.device) -> int:
    """Bytes of the last cache before main memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [path.read_text().strip() for path in CPU_CACHES.glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return max(
        (int(size[:-1]) * units[size[-1]] for size in sizes if size[-1] in units), default=FALLBACK_CACHE
    )


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    found = re.search(r"^MemAvailable:\s*(\d+) kB", meminfo.read_text(), re.M) if meminfo.exists() else None
    if found:
        return int(found.group(1)) << 10
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def bandwidth(device: torch.device, size: int | None = None, seconds: float = 1.0) -> dict[str, Any]:
    """Read and copy bandwidth of main memory with all threads, bytes a second: upper quartiles.

    The buffer is many times larger than the last cache. No single PyTorch reduction is the fastest reader
    everywhere, so several are tried. A copy counts the bytes read and written.
    """
    if size is None:
        size = max(16 * last_cache(device), 512 << 20)
    size = min(size, free_memory(device) // 4) // 4096 * 4096
    if size <= 0:
        raise InputError("memory was exhausted; allowed: a few hundred MB free to measure its bandwidth")
    x = torch.ones(size // 4, device=device)  # written, so that every page is a page of its own
    y = torch.empty_like(x)
    rows = x.view(64, -1)
    readers: dict[str, Callable[[], Any]] = {
        "sum": x.sum,
        "amax": x.amax,
        "row sums": lambda: rows.sum(1),
        "dot": lambda: torch.dot(x, x),
    }
    measured = {name: size / _fast_quartile(call, device, seconds) for name, call in readers.items()}
    best = max(measured, key=measured.__getitem__)
    copied = 2 * size / _fast_quartile(lambda: y.copy_(x), device, seconds)
    return {"read": measured[best], "reader": best, "copy": copied, "buffer_bytes": size}


def better(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """One roof out of two measurements: a neighbour on the machine can only have lowered either."""
    reads = max(first, second, key=lambda found: found["read"])
    return reads | {"copy": max(first["copy"], second["copy"])}


def _fast_quartile(call: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Seconds of a call: between two device events, or by the clock on a CPU."""
    samples: list[float] = []
    call()
    end = time.perf_counter() + seconds
    while len(samples) < 3 or (time.perf_counter() < end and len(samples) < 200):
        if device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            call()
            last.record()
            last.synchronize()
            samples.append(first.elapsed_time(last) * 1e-3)
            continue
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    # Not the minimum: on a virtual machine single samples come out impossibly fast.
    return sorted(samples)[len(samples) // 4]
