"""What the joint prompt's kernels are compiled for: sizes, parts that are on, tiles, the layout of inner products."""

from __future__ import annotations

from dataclasses import dataclass

from ..launch import padded

# Columns of D at a time: the least that a matrix product takes.
SPACE_COLUMNS = 16


@dataclass(frozen=True)
class Shape:
    """What a kernel is compiled for: sizes, parts that are on, and meta-parameters.

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

    @property
    def RANK(self) -> int:
        return padded(self.r)

    @property
    def MAPS(self) -> int:
        return padded(self.a)

    @property
    def GATES(self) -> int:
        return padded(self.K)

    @property
    def h(self) -> int:
        return self.columns // max(self.K, 1)

    # Parts of d.

    @property
    def part(self) -> int:
        """Columns of d in a part: a multiple of BLOCK_K."""
        return _cdiv(_cdiv(self.d, self.PARTS), self.BLOCK_K) * self.BLOCK_K

    @property
    def parts(self) -> int:
        return _cdiv(self.d, self.part)

    # The matrix of inner products: where its rows and columns begin.

    @property
    def grads(self) -> int:
        return self.s if self.backward else 0

    @property
    def row_B(self) -> int:
        return self.s + self.grads

    @property
    def column_U(self) -> int:
        return self.s + self.r

    @property
    def column_D(self) -> int:
        return self.column_U  # only ∂P's rows have products with U, only p's with D: they share the columns

    @property
    def column_G(self) -> int:
        return self.column_D + self.columns

    @property
    def column_q(self) -> int:
        return self.column_G + self.K

    @property
    def column_k(self) -> int:
        return self.column_q + self.a

    @property
    def width(self) -> int:
        return self.column_k + self.a

    @property
    def squares(self) -> int:
        """Where the squares of A·B's rows begin, behind the matrix."""
        return (self.row_B + self.r) * self.width

    @property
    def size(self) -> int:
        """Elements of a part."""
        return self.squares + self.m

    # Tiles.

    def tiles(self, size: int) -> int:
        return _cdiv(size, self.BLOCK_N)

    @property
    def row_tiles(self) -> int:
        return self.tiles(self.s) + self.tiles(self.grads) + self.tiles(self.r)

    @property
    def tiles_p(self) -> int:
        return self.tiles(self.s)

    @property
    def tiles_r(self) -> int:
        return self.tiles(self.r)

    @property
    def tiles_U(self) -> int:
        return self.tiles(self.columns if self.backward else 0)

    @property
    def tiles_D(self) -> int:
        return self.tiles(self.columns)

    @property
    def tiles_G(self) -> int:
        return self.tiles(self.K)

    @property
    def tiles_a(self) -> int:
        return self.tiles(self.a)

    @property
    def column_tiles(self) -> int:
        return self.tiles_p + self.tiles_r + self.tiles_U + self.tiles_D + self.tiles_G + 2 * self.tiles_a

    @property
    def square_tiles(self) -> int:
        return _cdiv(self.m, self.BLOCK_M)

    # Programs of the backward: grad_A's, then one a column tile for each of the others.

    @property
    def programs_A(self) -> int:
        return _cdiv(self.m, self.BLOCK_M)

    @property
    def before_maps(self) -> int:
        return _cdiv(self.r, self.BLOCK_R)

    @property
    def before_prompt(self) -> int:
        return self.before_maps + (self.a > 0)

    @property
    def before_gate(self) -> int:
        return self.before_prompt + _cdiv(self.s, self.BLOCK_S)

    @property
    def before_spaces(self) -> int:
        return self.before_gate + (self.K > 0)

    @property
    def backward_grid(self) -> tuple[int]:
        tiles = self.before_spaces + _cdiv(self.columns, SPACE_COLUMNS)
        return (self.programs_A + tiles * _cdiv(self.d, self.BLOCK_D),)

    @property
    def forward_grid(self) -> tuple[int]:
        return (_cdiv(self.s, self.BLOCK_S) * _cdiv(self.d, self.BLOCK_D),)

    @property
    def products_grid(self) -> tuple[int]:
        return ((self.square_tiles + self.row_tiles * self.column_tiles) * self.parts,)


def _cdiv(size: int, block: int) -> int:
    return -(-size // block)
