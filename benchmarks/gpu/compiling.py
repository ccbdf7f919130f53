"""Ahead-of-time compilation of Triton kernels, as the project's own functions launch them, without a GPU.

Triton's driver is replaced by one that only names an architecture, and each launch compiles its kernel instead of
running it, with the ptxas of triton's wheel. Facts about a kernel are read from its machine code.
"""

import hashlib
import math
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.cache import get_cache_manager
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction, MockTensor

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
# Bytes of shared memory that a block may have, from NVIDIA's CUDA C++ Programming Guide.
MAX_SHARED_BYTES = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448}
WARP = 32  # threads
PRODUCTS = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTC"}  # tensor core instructions of each architecture

INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)\s*([^;]*);", re.MULTILINE)
POINTER_USE = re.compile(r"(?:(%\w+) = )?tt\.(addptr|splat|broadcast|expand_dims|load|store) (%\w+)")
TILE = re.compile(r"tensor<((?:\d+x)+)")
DOT = re.compile(r"tt\.dot .*: tensor<(\d+)x(\d+)x\w+> \* tensor<\d+x(\d+)x\w+>")


@dataclass(frozen=True)
class KernelFacts:
    """Resources and instructions of a compiled kernel.

    Attributes:
        flags: names of the compile-time constants that are True, such as HAS_KEEP.
        digest: a hash that is the same for equal specialisations of a kernel.
        instructions: number of instructions that each thread executes, without no-ops. Branches around slow paths are
            assumed not to be taken.
        elements: number of values that each thread computes of the largest tile.
        loads: width in bits of each global load instruction in the code.
        products: number of tensor core instructions in the code, of the architecture's own kind: wgmma on sm_90.
        fused_multiply_adds: number of fma instructions in the code before ptxas, which fuses none if Triton fuses none.
        reads, writes: names of the arguments that the kernel loads from and stores to.
        flops: floating-point operations of matrix products in each program.
    """

    name: str
    flags: tuple[str, ...]
    digest: str
    arch: int
    warps: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    instructions: int
    elements: int
    loads: tuple[int, ...]
    products: int
    fused_multiply_adds: int
    reads: frozenset[str]
    writes: frozenset[str]
    flops: int = 0

    @property
    def instructions_per_element(self) -> float:
        return self.instructions / self.elements

    @property
    def narrow_loads(self) -> int:
        """Number of global loads of at most 32 bits: factors of a tile, or a tile that is not loaded in vectors."""
        return sum(bits <= 32 for bits in self.loads)


class KernelLaunch(NamedTuple):
    """A kernel launch that was compiled but not run.

    Attributes:
        programs: size of the grid.
        arguments: the arguments by name, without compile-time constants.
    """

    facts: KernelFacts
    programs: int
    arguments: dict[str, Any]

    @property
    def bytes(self) -> int:
        """Minimum memory traffic in bytes: each tensor once if it is read, and once if it is written."""
        names = [*self.facts.reads, *self.facts.writes]
        return sum(extent(self.arguments[name]) for name in names)


class _DriverWithoutDevice:
    """A Triton driver that names an architecture and has no device."""

    def __init__(self, arch: int) -> None:
        self._arch = arch

    def get_current_device(self) -> int:
        return self._arch  # kernels are cached by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._arch, WARP)


@contextmanager
def compiling(arch: int, note: Callable[[KernelLaunch], None]) -> Iterator[None]:
    """Within the block, compile each launch of a Triton kernel instead of running it, and pass it to `note`.

    Tensors may be fake or on the meta device; they are assumed to be aligned.
    """
    run: Callable[..., Any] = JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        del warmup
        stand_ins = [MockTensor(a.dtype, list(a.shape)) if isinstance(a, Tensor) else a for a in args]
        compiled = run(kernel, *stand_ins, grid=grid, warmup=True, **options)
        facts = read_facts(compiled, _kernel_name(kernel), arch, options)
        note(KernelLaunch(facts, math.prod(grid), dict(zip(kernel.arg_names, args, strict=False))))

    # Triton's own way to restore the driver fails where there is no GPU.
    without_device = mock.patch.object(driver, "_active", _DriverWithoutDevice(arch))
    with without_device, mock.patch.object(JITFunction, "run", compile_only):
        yield


def extent(tensor: Tensor) -> int:
    """Return the bytes that a tensor occupies; expanded dimensions occupy nothing."""
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return math.prod(sizes) * tensor.itemsize


def _kernel_name(kernel: Any) -> str:
    """Return "mixer.mix" for `_mix` of triton_mixer.py."""
    module = kernel.fn.__module__.rpartition(".")[2].removeprefix("triton_")
    return f"{module}.{kernel.fn.__name__.removeprefix('_')}"


def read_facts(compiled: Any, name: str, arch: int, options: Mapping[str, Any]) -> KernelFacts:
    """Return the facts of a compiled kernel.

    Its longest loop is executed LOOPS times, a constant of the kernel, and has all of its matrix products.
    """
    loops = options.get("LOOPS", 1)
    usage, code = _disassemble(compiled.asm["cubin"])
    reads, writes = _arguments_used(compiled.asm["ttir"])
    tiles = [math.prod(int(side) for side in sides.split("x")[:-1]) for sides in TILE.findall(compiled.asm["ttir"])]
    warps = compiled.metadata.num_warps
    opcodes = [opcode for _, opcode, _ in code]
    return KernelFacts(
        name=name,
        flags=tuple(key for key, value in options.items() if value is True and key.isupper()),
        digest=compiled.hash,
        arch=arch,
        warps=warps,
        registers=usage["REG"],
        stack_bytes=usage["STACK"] + usage["LOCAL"],
        shared_bytes=compiled.metadata.shared,
        instructions=_executed(code, loops),
        elements=max(1, max(tiles, default=1) // (WARP * warps)) * loops,
        loads=tuple(_width(opcode) for opcode in opcodes if opcode.startswith("LDG")),
        products=sum(opcode.startswith(PRODUCTS[arch]) for opcode in opcodes),
        fused_multiply_adds=compiled.asm["ptx"].count("fma."),
        reads=reads,
        writes=writes,
        flops=loops * sum(2 * math.prod(map(int, sides)) for sides in DOT.findall(compiled.asm["ttir"])),
    )


Instruction = tuple[int, str, str]  # address, opcode, operands


@cache
def _disassemble(binary: bytes) -> tuple[dict[str, int], tuple[Instruction, ...]]:
    """Return the resources that the kernel uses (REG, STACK, LOCAL ...), and its instructions without no-ops.

    The disassembler takes longer than the compiler, so its output goes to Triton's cache.
    """
    files = get_cache_manager(hashlib.sha256(binary).hexdigest())
    cached = files.get_file("kernel.sass")
    if cached is None:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary)
            file.flush()
            command = [str(CUOBJDUMP), "-res-usage", "-sass", file.name]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        cached = files.put(text, "kernel.sass", binary=False)
    text = Path(cached).read_text()
    usage = {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", text)}
    code = ((int(address, 16), opcode, operands) for address, opcode, operands in INSTRUCTION.findall(text))
    return usage, tuple(each for each in code if each[1] != "NOP")


def _executed(code: tuple[Instruction, ...], loops: int) -> int:
    """Count instructions: those of the longest loop `loops` times, and all others once."""
    sizes = []
    for address, opcode, operands in code:
        target = re.search(r"0x([0-9a-f]+)", operands)
        if opcode.startswith("BRA") and target and int(target[1], 16) < address:
            sizes.append(sum(int(target[1], 16) <= other <= address for other, _, _ in code))
    return len(code) + max(sizes, default=0) * (loops - 1)


def _width(opcode: str) -> int:
    """Return the bits of a load: LDG.E.128 has 128, LDG.E.U16 has 16, and LDG.E has 32."""
    found = re.search(r"\.(?:[US])?(8|16|64|128|256)\b", opcode)
    return int(found[1]) if found else 32


def _arguments_used(ttir: str) -> tuple[frozenset[str], frozenset[str]]:
    """Return the pointer arguments that a kernel loads from and stores to, from Triton's intermediate code."""
    origins: dict[str, str] = {}  # of a pointer: the argument. Neighbouring loops use the same names again.
    used: dict[str, set[str]] = {"load": set(), "store": set()}
    for result, operation, pointer in POINTER_USE.findall(ttir):
        argument = origins.get(pointer, pointer)
        if operation in used:
            used[operation].add(argument.removeprefix("%"))
        else:
            origins[result] = argument
    return frozenset(used["load"]), frozenset(used["store"])
