"""Run under the memory checker: the 4-bit dequantisation at odd sizes, each result held against the reference.

compute-sanitizer --tool memcheck python -m benchmarks.sanitized
"""

from __future__ import annotations

import itertools

import torch

import ept_kernels
from ept_kernels.dev.problems import FourBit

SIZES = ((1, 1), (5, 67), (63, 100), (64, 64), (257, 1000), (1024, 1024))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    schemes = list(itertools.product(SIZES, ("nf4", "fp4"), (False, True)))
    for (rows, columns), quant_type, nested in schemes:
        weight = FourBit(rows, columns, quant_type=quant_type, nested=nested).weight(device)
        for dtype in DTYPES:
            out = ept_kernels.dequantize_4bit(weight, dtype)
            if not torch.equal(out, ept_kernels.dequantize_4bit_reference(weight, dtype)):
                nesting = " nested" if nested else ""
                raise SystemExit(f"{quant_type}{nesting} {rows}×{columns} {dtype}: differs from the reference")
    checked = len(schemes) * len(DTYPES)
    print(f"{checked} dequantisations equal the reference on {device}, run by {ept_kernels.backend(device)}")


if __name__ == "__main__":
    main()
