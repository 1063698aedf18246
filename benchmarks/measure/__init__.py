"""Clocks, the parity gate, rows, scales, the machine and its ceilings; imports no other folder of benchmarks."""
