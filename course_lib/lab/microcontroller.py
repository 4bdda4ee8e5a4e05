"""A C file on the processor of a microcontroller: cross-compiled, run on an emulated core, and measured.

All of it comes from pip: the package ziglang brings a compiler for every processor, unicorn emulates the cores.
Counted are bytes and instructions. How many ticks of its clock a core needs for one is not emulated: one at least.
"""

import importlib.util
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from course_lib.lab.compile import ZIG, CompilerError, as_pixels, run_compiler, score_type, sizes_of

__all__ = ["BOARDS", "CORES", "Board", "BoardTooSmall", "Cost", "Program", "cross_compile", "missing_packages"]

CORES = {
    "Cortex-M0": ("thumb-freestanding-eabi", "cortex_m0"),
    "Cortex-M4": ("thumb-freestanding-eabi", "cortex_m4"),  # floats in software, as on a chip without the unit
    "Cortex-M4F": ("thumb-freestanding-eabihf", "cortex_m4+vfp4d16sp"),
}
"""The cores, each with the compiler's words for it. The Cortex-M4F is the M4 with a unit for floating point."""

EXIT, STACK_TOP, MAILBOX = 0x100, 0x2010_0000, 0x4000_0000
STACK_SIZE, PAINT = 0x1_0000, b"\xa5"


class BoardTooSmall(ValueError):
    """The program needs more flash or RAM than the board has."""


@dataclass(frozen=True)
class Cost:
    """What a program needs: ``flash`` and ``ram`` (its ``stack`` included) in bytes, ``instructions`` an image.

    ``instructions`` is the mean over the images, those of a skipped condition included; None if not counted.
    """

    flash: int
    ram: int
    stack: int
    instructions: int | None


@dataclass(frozen=True)
class Board:
    """A board that one can buy: its core, ``flash`` and ``ram`` in bytes, its clock, and who says so."""

    name: str
    core: str
    flash: int
    ram: int
    megahertz: int
    source: str

    def check(self, cost: Cost) -> None:
        """BoardTooSmall, with the numbers, if a program does not fit."""
        lacks = [
            f"{getattr(cost, kind):,} bytes of {name} are needed, the {self.name} has {getattr(self, kind):,}"
            for kind, name in (("flash", "flash"), ("ram", "RAM"))
            if getattr(cost, kind) > getattr(self, kind)
        ]
        if lacks:
            raise BoardTooSmall("; ".join(lacks))


BOARDS = (
    Board("NUCLEO-F031K6", "Cortex-M0", 32 * 1024, 4 * 1024, 48, "STMicroelectronics, STM32F031x4/x6 datasheet"),
    Board("BBC micro:bit v1", "Cortex-M0", 256 * 1024, 16 * 1024, 16, "Nordic, nRF51822 product specification (QFAA)"),
    # Of its 192 kB of RAM, 64 stand apart.
    Board("STM32F4DISCOVERY", "Cortex-M4F", 1024 * 1024, 128 * 1024, 168, "STMicroelectronics, STM32F407xx datasheet"),
)
"""Three boards, from small to large."""


def missing_packages() -> list[str]:
    """Which of the two packages are not installed here; ``pip install ziglang unicorn`` brings them."""
    return [name for name in ("ziglang", "unicorn") if importlib.util.find_spec(name) is None]


def cross_compile(source: str, core: str = "Cortex-M0", optimize: str = "-Os") -> "Program":
    """Compile a file of :mod:`~course_lib.methods.c_source` for one of :data:`CORES`, with ``optimize`` (-Os, -O3).

    CompilerError: a package is missing, or the compiler refuses, with its words. ValueError: an unknown core.
    """
    if core not in CORES:
        raise ValueError(f"core must be one of {', '.join(CORES)}; got {core!r}")
    if missing := missing_packages():
        need = f"{' and '.join(missing)} must be installed: pip install ziglang unicorn"
        raise CompilerError(f"for microcontrollers {need}")
    target, cpu = CORES[core]
    flags = ["-target", target, f"-mcpu={cpu}", optimize, "-fno-unwind-tables", "-Wl,-e,predict"]
    with tempfile.TemporaryDirectory() as folder:
        elf = Path(folder, "program.elf")
        try:  # without the compiler's own library, which takes seconds to build when it is needed for the first time
            run_compiler(source, elf, [*flags, "-nostdlib"], ZIG)
        except CompilerError as error:
            if "undefined symbol" not in str(error):
                raise
            run_compiler(source, elf, flags, ZIG)
        return Program(elf.read_bytes(), source, core)


class Program:
    """An ELF file for a core, ready to run: call it on grey levels uint8 [N, ...] for the scores [N, K].

    ``flash`` is code and constants, ``static_ram`` the variables; of neither can a run need more. What a whole firmware
    adds (a table of interrupts, a start-up routine, the caller's image) is not in them.
    """

    def __init__(self, elf: bytes, source: str, core: str):
        self.core, self.sizes, self.kind = core, sizes_of(source), score_type(source)
        (self.entry, segments_at, sections_at) = struct.unpack_from("<3I", elf, 24)
        segments, sections = (struct.unpack_from("<H", elf, at)[0] for at in (44, 48))
        headers = [struct.unpack_from("<8I", elf, segments_at + 32 * i) for i in range(segments)]
        self.loaded = [
            (address, elf[at : at + size], room) for kind, at, address, _, size, room, *_ in headers if kind == 1
        ]
        tables = [struct.unpack_from("<6I", elf, sections_at + 40 * i)[1:] for i in range(sections)]
        sizes = [(kind, flags, size) for kind, flags, _, _, size in tables if flags & 2]  # what goes into memory
        self.flash = sum(size for kind, _, size in sizes if kind == 1)
        self.static_ram = sum(size for _, flags, size in sizes if flags & 1)

    def __call__(self, images) -> np.ndarray:
        return self._run(images)[0]

    def measure(self, images, *, count: bool = True) -> Cost:
        """What it costs to answer these images, one after the other: the deepest stack, the mean of instructions.

        Counting slows the emulation down to some millions of instructions a second; ``count=False`` leaves it out.
        """
        _, stack, instructions = self._run(images, count=count)
        return Cost(self.flash, self.static_ram + stack, stack, instructions if count else None)

    def _core(self):
        import unicorn as uc
        from unicorn import arm_const as arm

        core = uc.Uc(uc.UC_ARCH_ARM, uc.UC_MODE_THUMB | uc.UC_MODE_MCLASS)
        m0 = self.core == "Cortex-M0"
        core.ctl_set_cpu_model(arm.UC_CPU_ARM_CORTEX_M0 if m0 else arm.UC_CPU_ARM_CORTEX_M4)
        end = max(address + room for address, _, room in self.loaded)
        core.mem_map(0, (end + 0xFFF) // 0x1000 * 0x1000)
        for address, content, _ in self.loaded:
            core.mem_write(address, content)
        core.mem_map(STACK_TOP - STACK_SIZE, STACK_SIZE)
        core.mem_map(MAILBOX, 0x10_0000)
        if self.core == "Cortex-M4F":
            core.reg_write(arm.UC_ARM_REG_C1_C0_2, 0xF << 20)  # its unit for floating point is off at first
            core.reg_write(arm.UC_ARM_REG_FPEXC, 1 << 30)
        return core, arm

    def _run(self, images, count: bool = False) -> tuple[np.ndarray, int, int]:
        """Scores [N, K], bytes of stack, and mean instructions an image (0 if they are not to be counted)."""
        import unicorn as uc

        pixels, (core, arm) = as_pixels(images, self.sizes), self._core()
        counted, lengths = [0], {}
        scores = np.zeros((len(pixels), self.sizes["SCORES"]), self.kind)
        answer = MAILBOX + self.sizes["PIXELS"] + -self.sizes["PIXELS"] % 4

        def block(core, address, size, _):
            if (address, size) not in lengths:
                lengths[address, size] = count_instructions(bytes(core.mem_read(address, size)))
            counted[0] += lengths[address, size]

        if count:
            core.hook_add(uc.UC_HOOK_BLOCK, block)
        core.mem_write(STACK_TOP - STACK_SIZE, PAINT * STACK_SIZE)
        for image, out in zip(pixels, scores, strict=True):
            core.mem_write(MAILBOX, image.tobytes())
            registers = {"SP": STACK_TOP, "LR": EXIT | 1, "R0": MAILBOX, "R1": answer}
            for name, value in registers.items():
                core.reg_write(getattr(arm, f"UC_ARM_REG_{name}"), value)
            try:
                core.emu_start(self.entry | 1, EXIT)
            except uc.UcError as error:
                need = f"a stack of more than {STACK_SIZE:,} bytes, or an address that does not exist"
                raise BoardTooSmall(f"the emulated core stopped ({error}): the program uses {need}") from error
            out[:] = np.frombuffer(bytes(core.mem_read(answer, out.nbytes)), self.kind)
        painted = bytes(core.mem_read(STACK_TOP - STACK_SIZE, STACK_SIZE))
        return scores, len(painted.lstrip(PAINT)), round(counted[0] / max(len(pixels), 1))


def count_instructions(code: bytes) -> int:
    """How many Thumb instructions stand in ``code``: one of 4 bytes starts with the bits 111 and not 11100.

    >>> count_instructions(bytes.fromhex("7047 00f0 01f8 7047".replace(" ", "")))
    3
    """
    place = found = 0
    while place < len(code):
        place += 4 if code[place + 1] >= 0xE8 else 2
        found += 1
    return found
