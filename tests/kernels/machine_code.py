"""Read what the compiler made of a kernel: instructions of its main loop, by kind."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton

__all__ = ["Loop", "main_loop", "resources"]

# Kinds of machine instructions, by the beginning of their names, for sm_80 to sm_120.
MATRIX = ("HGMMA", "HMMA", "UTCHMMA")
COPIES = "LDGSTS"  # from global into shared memory, past the registers
LOADS = ("LDG",)
SHARED = ("LDS", "STS")


@dataclass(frozen=True)
class Loop:
    """Instructions of one pass through the main loop, for each warp.

    Attributes:
        total: all of them.
        matrix: tensor-core products; on sm_100 and later one is counted for a whole step.
        fused: multiply-adds of full float32.
        copies: asynchronous copies of 16 bytes a thread into shared memory.
        loads: from global memory into registers.
        shared: loads and stores of shared memory.
    """

    total: int
    matrix: int
    fused: int
    copies: int
    loads: int
    shared: int

    @property
    def other(self) -> int:
        """What is left: addresses, masks, the loop itself."""
        return self.total - self.matrix - self.fused - self.copies - self.loads - self.shared


def _tool(name: str, cubin: bytes, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin" / name
        return subprocess.run([tool, *options, file.name], capture_output=True, text=True, check=True).stdout


def resources(cubin: bytes) -> tuple[int, int]:
    """Return registers per thread, and bytes of local memory per thread (spills)."""
    report = _tool("cuobjdump", cubin, "-res-usage")
    registers, stack, local = (int(re.findall(rf"{what}:(\d+)", report)[0]) for what in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


def _name(instruction: str) -> str:
    """Return the name of an instruction, with its modifiers and without its predicate."""
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0]


def _instructions(code: str) -> tuple[list[str], list[list[str]]]:
    """Return all instructions, and for each jump back those from its label on."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    loops = []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L\w+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            instructions.append(instruction[1].strip())
            jump = re.search(r"\bBRA\b.*`\((\.L\w+)\)", instructions[-1])
            if jump and jump[1] in labels:
                loops.append(instructions[labels[jump[1]] :])
    return instructions, loops


def _counted(body: list[str]) -> Loop:
    names = [_name(instruction) for instruction in body]
    kinds = Counter(name.split(".")[0] for name in names)
    copies = sum(name.startswith(COPIES) and name.endswith(".128") for name in names)
    matrix, loads, shared = (sum(kinds[kind] for kind in group) for group in (MATRIX, LOADS, SHARED))
    return Loop(len(body), matrix, kinds["FFMA"], copies, loads, shared)


def main_loop(cubin: bytes) -> tuple[int, Loop | None]:
    """Return the number of instructions of a kernel, and its loop with the most products, the shortest of those.

    There is no such loop if nothing is multiplied, or if the compiler unrolled all steps.
    """
    instructions, loops = _instructions(_tool("nvdisasm", cubin, "-c"))
    counted = [_counted(body) for body in loops]
    multiplying = [loop for loop in counted if loop.matrix + loop.fused]
    best = max(multiplying, key=lambda loop: (loop.matrix, loop.fused, -loop.total), default=None)
    return len([i for i in instructions if _name(i) != "NOP"]), best
