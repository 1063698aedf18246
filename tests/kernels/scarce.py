"""Run operations of the C++ engine with ever more memory, from almost none: ``python -m tests.kernels.scarce``.

The limit is the kernel's, on the address space of this process (RLIMIT_AS), so that allocations fail for real, in
whichever thread asks for them. Each line printed says how often an operation ran out before it succeeded.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from patchsparse import PatchGrid, patch_conv2d
from patchsparse.backends.cpp import native, plans
from patchsparse.geometry import Stencil

LEAST = 1 << 20  # bytes beyond what the process has
MOST = 20  # doublings


def operations() -> dict[str, Callable[[], object]]:
    """Return operations that allocate in threads of their own, by name."""
    grid = PatchGrid.random(64, (2, 2), keep=1.0)  # 256 patches of 32x32 pixels
    few = PatchGrid.random(2, (2, 2), keep=1.0)

    def plan(lists: int, kernel: int) -> object:
        stencil = Stencil((kernel, kernel), padding=(kernel // 2, kernel // 2))
        return plans.plan_for(grid.slot, grid.coords, (32, 32), stencil, False, lists)

    def conv(channels: int, out: int, groups: int, kernel: int, **options: int) -> Callable[[], object]:
        x, weight = torch.randn(8, channels, 2, 2), torch.randn(out, channels // groups, kernel, kernel)
        x, weight = x.requires_grad_(), weight.requires_grad_()

        def run() -> object:
            y = patch_conv2d(x, weight, None, few, padding=kernel // 2, groups=groups, backend="cpp", **options)
            return torch.autograd.grad(y, (x, weight), torch.ones_like(y))

        return run

    return {
        "squares": lambda: plan(native.SQUARES, 9),
        "groups": lambda: plan(native.GROUPS, 7),
        "Winograd's method": conv(512, 512, 1, 3),
        "depthwise by pixels": conv(2**17, 2**17, 2**17, 3, stride=2),
        "depthwise by squares": conv(2**17, 2**17, 2**17, 5),
    }


def times_without_memory(run: Callable[[], object]) -> int:
    """Return how often ``run`` raised MemoryError as the room was doubled, until it succeeded."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    for failed in range(MOST):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (LEAST << failed), hard))
        try:
            run()
        except MemoryError:
            continue
        except RuntimeError as error:  # torch's own allocator says it so
            if "allocate memory" not in str(error):
                raise
            continue
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        return failed
    raise RuntimeError("never succeeded")


def main() -> None:
    """Run all operations, after one that starts the threads."""
    torch.set_num_threads(2)
    everything = operations()
    patch_conv2d(torch.ones(4, 8, 2, 2), torch.ones(8, 8, 3, 3), None, PatchGrid.random(1, (2, 2), 4), padding=1)
    for name, run in everything.items():
        sys.stdout.write(f"{name}: {times_without_memory(run)}\n")


if __name__ == "__main__":
    main()
