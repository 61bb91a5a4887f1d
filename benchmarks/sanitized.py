"""What the memory checker watches: the 4-bit dequantisation at odd sizes, each result held against the reference.

compute-sanitizer --tool memcheck python -m benchmarks.sanitized
"""

from __future__ import annotations

import torch

import ept_kernels

from .four_bit_problems import four_bit_weight, random_weight

SIZES = ((1, 1), (5, 67), (63, 100), (64, 64), (257, 1000), (1024, 1024))
SCHEMES = ("nf4", "nf4 nested", "fp4", "fp4 nested")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    checked = 0
    for rows, columns in SIZES:
        for scheme in SCHEMES:
            weight = four_bit_weight(random_weight(rows, columns, scheme, device))
            for dtype in DTYPES:
                out = ept_kernels.dequantize_4bit(weight, dtype)
                expected = ept_kernels.dequantize_4bit_reference(weight, dtype)
                if not torch.equal(out, expected):
                    raise SystemExit(f"{scheme} {rows}×{columns} {dtype}: differs from the reference")
                checked += 1
    print(f"{checked} dequantisations equal the reference on {device}, run by {ept_kernels.backend(device)}")


if __name__ == "__main__":
    main()
