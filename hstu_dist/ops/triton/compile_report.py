"""Ahead-of-time compile reports: what the kernels cost on chips that are not here.

Triton compiles for a named chip without having one; the assembler then says how many registers, spilled bytes and
tensor-core instructions a kernel has. The arguments and their specialisation come from the same `Launch` that runs.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from hstu_dist.ops.triton.configs import TABLE_PATH, Architecture, Kernel
from hstu_dist.ops.triton.launch import Launch


@dataclass(frozen=True)
class Chip:
    """A chip to compile for.

    Attributes:
        target: Triton's name for it.
        shared_limit: bytes of shared memory that one program may use.
        shared_total: bytes of a multiprocessor.
        registers: 32-bit registers of a multiprocessor (a compute unit, for AMD).
        threads: threads that a multiprocessor holds at most.
        tensor_flops: dense bf16 operations of a multiprocessor per cycle.
        special_ops: exponentials, logarithms or reciprocals of a multiprocessor per cycle.
        tensor_op: what its matrix instructions are called in machine code; not those of older chips that it also has.
    """

    target: GPUTarget
    shared_limit: int
    shared_total: int
    registers: int
    threads: int
    tensor_flops: int
    special_ops: int
    tensor_op: str


CHIPS = {
    Architecture.SM_80: Chip(GPUTarget("cuda", 80, 32), 163 << 10, 164 << 10, 1 << 16, 2048, 2048, 16, "HMMA"),
    Architecture.SM_90: Chip(GPUTarget("cuda", 90, 32), 227 << 10, 228 << 10, 1 << 16, 2048, 4096, 16, "HGMMA"),
    Architecture.SM_100: Chip(GPUTarget("cuda", 100, 32), 227 << 10, 228 << 10, 1 << 16, 2048, 8192, 16, r"UTC\w*MMA"),
    Architecture.GFX942: Chip(GPUTarget("hip", "gfx942", 64), 64 << 10, 64 << 10, 1 << 17, 2048, 2048, 16, "v_s?mfma"),
}
"""Limits as the vendors publish them."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the assembler says of one kernel.

    Attributes:
        registers: 32-bit registers of a thread (vector registers and accumulators together, for AMD).
        spill_bytes: bytes that a thread stores and loads because registers ran out.
        shared_bytes: shared memory of a program.
        warps: warps of a program.
        tensor_ops: matrix instructions of the chip's own generation: HMMA, wgmma, tcgen05 or MFMA.
        special_ops: exponentials, logarithms and reciprocals.
        instructions: all instructions.
        serialized: whether the assembler had to run wgmma instructions one at a time.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    warps: int
    tensor_ops: int
    special_ops: int
    instructions: int
    serialized: bool


def compile_for(launch: Launch, architecture: Architecture) -> Report:
    """Compiles a launch for a chip; nothing is run and nothing is cached."""
    chip = CHIPS[architecture]
    backend = make_backend(chip.target)
    options = {"num_warps": launch.config.warps, "num_stages": launch.config.stages}
    kernel = launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = bind(*launch.arguments)
    parsed, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, options)
    source = ASTSource(kernel, signature, constants, attributes)
    log = io.StringIO()
    with _fresh_compiler(), contextlib.redirect_stdout(log):
        compiled = triton.compile(source, target=chip.target, options=parsed.__dict__)
    if chip.target.backend == "hip":
        return _amd_report(compiled, launch, chip)
    return _nvidia_report(compiled, launch, chip, log.getvalue())


@contextlib.contextmanager
def _fresh_compiler() -> Any:
    """Triton with an empty cache, so that the assembler runs and its log is printed."""
    knobs = triton.knobs
    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope(), knobs.nvidia.scope():
        knobs.cache.dir = folder
        knobs.nvidia.dump_ptxas_log = True
        yield


def _nvidia_report(compiled: Any, launch: Launch, chip: Chip, log: str) -> Report:
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log)]
    registers = re.search(r"Used (\d+) registers", log)
    if registers is None or not spills:
        raise RuntimeError(f"ptxas: got no resource usage in its log: {log!r}")
    operations = _sass(compiled.asm["cubin"])
    return Report(
        registers=int(registers[1]),
        spill_bytes=sum(spills),
        shared_bytes=compiled.metadata.shared,
        warps=launch.config.warps,
        tensor_ops=_count(operations, chip.tensor_op),
        special_ops=_count(operations, r"MUFU"),
        instructions=len(operations),
        serialized="wgmma" in log.lower(),
    )


def _sass(cubin: bytes) -> list[str]:
    """Operations of a kernel in machine code, in order."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tools / "nvdisasm"), "-c", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text, re.MULTILINE)


def _amd_report(compiled: Any, launch: Launch, chip: Chip) -> Report:
    text = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        if found is None:
            raise RuntimeError(f"amdgcn: got no {name} in the kernel's description")
        return int(found[1])

    operations = re.findall(r"^\s+([a-z]+_\w+)", text, re.MULTILINE)
    return Report(
        # on gfx90a and later the count includes the accumulators
        registers=field("vgpr_count"),
        spill_bytes=field("private_segment_fixed_size") + 4 * field("vgpr_spill_count"),
        shared_bytes=compiled.metadata.shared,
        warps=launch.config.warps,
        tensor_ops=_count(operations, chip.tensor_op),
        special_ops=_count(operations, r"v_(exp|log|rcp)_"),
        instructions=len(operations),
        serialized=False,
    )


def _count(operations: list[str], pattern: str) -> int:
    return sum(re.match(pattern, operation) is not None for operation in operations)


def occupancy(report: Report, architecture: Architecture) -> float:
    """Threads that a multiprocessor holds at once, as a share of what it can hold; tensor memory is not counted."""
    chip = CHIPS[architecture]
    threads = report.warps * int(chip.target.warp_size)
    # registers are given to warps in units of 8 a thread
    by_registers = chip.registers // (threads * -(-report.registers // 8) * 8)
    # NVIDIA reserves 1 KiB of shared memory for each program
    reserved = 1024 if chip.target.backend == "cuda" else 0
    by_shared = chip.shared_total // max(1, report.shared_bytes + reserved)
    return min(by_registers, by_shared, chip.threads // threads) * threads / chip.threads


_PRODUCTS = {Kernel.FORWARD: 2, Kernel.QUERY: 3, Kernel.KEY: 4, Kernel.BIAS: 2}
"""Matrix products of each kernel; the bias gradient and the two passes of the backward recompute the scores."""


def roofline(kernel: Kernel, width: int, architecture: Architecture) -> float:
    """Share of the tensor cores' peak that a kernel can reach beside its exponentials and reciprocals.

    A bound, not a prediction: it leaves out every other instruction and all traffic.

    Args:
        kernel: any but `FAR`.
        width: Q = V.
        architecture: the chip.
    """
    chip = CHIPS[architecture]
    tensor_cycles = _PRODUCTS[kernel] * 2 * width / chip.tensor_flops
    # one exponential and one reciprocal square root for each score
    special_cycles = 2 / chip.special_ops
    return tensor_cycles / max(tensor_cycles, special_cycles)


@functools.cache
def source_hash() -> str:
    """Identifies what the reports depend on: the files of this package and the version of Triton."""
    digest = hashlib.sha256(triton.__version__.encode())
    for path in sorted([*TABLE_PATH.parent.glob("*.py"), TABLE_PATH]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
