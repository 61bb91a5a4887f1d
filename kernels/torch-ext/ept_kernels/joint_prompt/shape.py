"""The joint prompt's shape, for which its kernels are compiled: sizes, parts, tiles, the layout of inner products."""

from __future__ import annotations

from dataclasses import dataclass

from ..launch import padded

# Columns of D at a time: the least that a matrix product takes.
SPACE_COLUMNS = 16


@dataclass(frozen=True)
class Shape:
    """Sizes, parts that are on, and meta-parameters, and what follows from them.

    All of it is fixed for the life of an adapter and independent of the batch, so all of it is a constant: one argument
    a launch in place of twenty-odd, and loops, tiles and switched-off parts are settled by the compiler.
    """

    s: int
    d: int
    m: int  # rows of A that the fusion attends to: 0 without an update
    r: int  # 0 without an update
    a: int  # width of W_q and W_k: 0 without maps
    columns: int  # K·h: 0 without spaces
    K: int  # 0 without a gate
    fusion: bool
    backward: bool
    activation: str
    # Meta-parameters
    PRECISION: str
    PARTS: int  # of d, at most
    BLOCK_N: int  # rows and columns of a tile of inner products
    BLOCK_K: int  # of d, in one step of it
    BLOCK_S: int  # prompt rows a program writes; in the backward also those whose softmax is rebuilt at a time
    BLOCK_D: int  # output columns a program
    BLOCK_M: int  # rows of A at a time
    BLOCK_R: int  # rows of grad_B a program

    # Paddings to what a matrix product takes.
    RANK = property(lambda z: padded(z.r))
    MAPS = property(lambda z: padded(z.a))
    GATES = property(lambda z: padded(z.K))
    h = property(lambda z: z.columns // max(z.K, 1))

    # Parts of d: columns of a part, a multiple of BLOCK_K, and how many there are.
    part = property(lambda z: _cdiv(_cdiv(z.d, z.PARTS), z.BLOCK_K) * z.BLOCK_K)
    parts = property(lambda z: _cdiv(z.d, z.part))

    # The matrix of inner products: where its rows [p; ∂P; B] and columns [p; B; U or D; G; W_q; W_k] begin. Only ∂P's
    # rows have products with U, only p's with D: they share the columns.
    grads = property(lambda z: z.s if z.backward else 0)
    row_B = property(lambda z: z.s + z.grads)
    column_U = property(lambda z: z.s + z.r)
    column_D = column_U
    column_G = property(lambda z: z.column_D + z.columns)
    column_q = property(lambda z: z.column_G + z.K)
    column_k = property(lambda z: z.column_q + z.a)
    width = property(lambda z: z.column_k + z.a)
    # Behind the matrix the squares of A·B's rows begin; and so many elements a part has.
    squares = property(lambda z: (z.row_B + z.r) * z.width)
    size = property(lambda z: z.squares + z.m)

    # Its tiles.
    tiles_p = property(lambda z: _cdiv(z.s, z.BLOCK_N))
    tiles_r = property(lambda z: _cdiv(z.r, z.BLOCK_N))
    tiles_U = property(lambda z: _cdiv(z.columns, z.BLOCK_N) if z.backward else 0)
    tiles_D = property(lambda z: _cdiv(z.columns, z.BLOCK_N))
    tiles_G = property(lambda z: _cdiv(z.K, z.BLOCK_N))
    tiles_a = property(lambda z: _cdiv(z.a, z.BLOCK_N))
    row_tiles = property(lambda z: z.tiles_p + _cdiv(z.grads, z.BLOCK_N) + z.tiles_r)
    column_tiles = property(lambda z: z.tiles_p + z.tiles_r + z.tiles_U + z.tiles_D + z.tiles_G + 2 * z.tiles_a)
    square_tiles = property(lambda z: _cdiv(z.m, z.BLOCK_M))

    # Programs of the backward: grad_A's, then one a column tile for each of the others.
    programs_A = property(lambda z: _cdiv(z.m, z.BLOCK_M))
    before_maps = property(lambda z: _cdiv(z.r, z.BLOCK_R))
    before_prompt = property(lambda z: z.before_maps + (z.a > 0))
    before_gate = property(lambda z: z.before_prompt + _cdiv(z.s, z.BLOCK_S))
    before_spaces = property(lambda z: z.before_gate + (z.K > 0))

    @property
    def products_grid(self) -> tuple[int]:
        return ((self.square_tiles + self.row_tiles * self.column_tiles) * self.parts,)

    @property
    def forward_grid(self) -> tuple[int]:
        return (_cdiv(self.s, self.BLOCK_S) * _cdiv(self.d, self.BLOCK_D),)

    @property
    def backward_grid(self) -> tuple[int]:
        tiles = self.before_spaces + _cdiv(self.columns, SPACE_COLUMNS)
        return (self.programs_A + tiles * _cdiv(self.d, self.BLOCK_D),)


def _cdiv(size: int, block: int) -> int:
    return -(-size // block)
