"""Machine: what the processor can do that matters for the course's timings, asked of the operating system."""

import platform
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

__all__ = ["cpu_flags", "cpu_name", "int8_support", "relevant_flags"]

CPUINFO = Path("/proc/cpuinfo")

# Fast int8 dot products: x86 calls them VNNI and AMX, Arm dot product and i8mm.
_INT8 = {
    "avx512_vnni": "AVX512-VNNI",
    "avx_vnni": "AVX-VNNI",
    "amx_int8": "AMX-INT8",
    "asimddp": "DotProd",
    "i8mm": "I8MM",
}
_WIDE = {"avx2": "AVX2", "avx512f": "AVX512", "amx_bf16": "AMX-BF16", "asimd": "NEON", "sve": "SVE"}
_APPLE = {"hw.optional.arm.FEAT_DotProd": "asimddp", "hw.optional.arm.FEAT_I8MM": "i8mm", "hw.optional.neon": "asimd"}


def cpu_flags() -> frozenset[str] | None:
    """The processor's features under their Linux names, or None where the system does not tell (Windows)."""
    if sys.platform == "linux":
        return frozenset(_cpuinfo("flags", "Features").lower().split())
    if sys.platform == "darwin":
        told = _sysctl("machdep.cpu.features", "machdep.cpu.leaf7_features").lower()
        arm = {flag for name, flag in _APPLE.items() if _sysctl(name).strip() == "1"}
        return frozenset(told.replace("avx512vnni", "avx512_vnni").split()) | arm
    return None


def cpu_name() -> str:
    """What the processor calls itself, as far as the system tells."""
    if sys.platform == "linux":
        told = _cpuinfo("model name", "Model")
    else:
        told = _sysctl("machdep.cpu.brand_string") if sys.platform == "darwin" else platform.processor()
    return told.strip() or platform.machine()


def int8_support(flags: Iterable[str]) -> list[str]:
    """The features among the flags that make int8 arithmetic fast.

    >>> int8_support({"avx2", "avx512_vnni"})
    ['AVX512-VNNI']
    """
    return [shown for flag, shown in _INT8.items() if flag in set(flags)]


def relevant_flags(flags: Iterable[str]) -> list[str]:
    """The features among the flags that the course's timings depend on."""
    return [shown for flag, shown in (_WIDE | _INT8).items() if flag in set(flags)]


def _cpuinfo(*names: str) -> str:
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    fields = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in fields if name.strip() in names), "")


def _sysctl(*names: str) -> str:
    try:
        # Names that this Mac does not know are left out of its answer.
        told = subprocess.run(["sysctl", "-n", *names], capture_output=True, text=True, timeout=5, check=False)
    except OSError:
        return ""
    return told.stdout
