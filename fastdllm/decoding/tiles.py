"""How the decoding kernels are cut up: the choices measured on an H100, and a rule where none is measured."""

from typing import NamedTuple

PROGRAMS = 264  # aimed at in a product: two for each of an H100's multiprocessors


class Tiles(NamedTuple):
    """How a product is cut up: each program multiplies `rows` rows and `columns` weight rows over a part of K."""

    rows: int
    """16 or more; a power of two, as are columns and depth."""
    columns: int
    """Of the result; gate and up count one each. 64 fill a Hopper product."""
    depth: int
    """Of K in one step; 64 or more."""
    parts: int
    """Programs that share K."""
    warps: int = 4
    stages: int = 4


class Settings(NamedTuple):
    """How the kernels between the products are cut up, best on an H100; heads, rows and places are powers of two."""

    normalize_warps: int = 32
    rotate_heads: int = 1
    """Heads of a row that a program turns, with a warp for each."""
    attend_rows: int = 16
    """Rows of a program, at most; 16 or more, as are places."""
    attend_places: int = 128
    attend_programs: int = PROGRAMS
    """Aimed at by the parts that the places are cut into."""
    attend_warps: int = 4
    attend_stages: int = 2
    reduce_columns: int = 32
    """Of a product that reduces rows to an update's rank; this and the next two are not measured."""
    reduce_depth: int = 2048
    """Of K for one of its programs, at most: what is behind reads every part of its result."""
    starts_early: bool = True
    """Whether such a product and the next one run at the same time: it is small, and the next reads the same rows."""


TileTable = dict[tuple[int, int, int], Tiles]  # (rows rounded up to a power of two, N, K) -> best in half precision
TILES: TileTable = {  # measured on an H100 by benchmarks/decode_kernels.py, for the shape of the 1.5B
    (16, 2048, 1536): Tiles(16, 64, 64, 4, 4, 6), (32, 2048, 1536): Tiles(32, 64, 64, 4, 4, 6),
    (64, 2048, 1536): Tiles(64, 64, 64, 4, 4, 6), (128, 2048, 1536): Tiles(128, 64, 64, 4, 4, 5),
    (256, 2048, 1536): Tiles(128, 64, 64, 2, 4, 5), (16, 1536, 1536): Tiles(16, 128, 128, 6, 8, 3),
    (32, 1536, 1536): Tiles(32, 64, 128, 6, 4, 3), (64, 1536, 1536): Tiles(64, 64, 64, 8, 4, 6),
    (128, 1536, 1536): Tiles(128, 128, 64, 8, 4, 4), (256, 1536, 1536): Tiles(128, 64, 64, 4, 4, 5),
    (16, 17920, 1536): Tiles(16, 64, 128, 1, 4, 4), (32, 17920, 1536): Tiles(32, 64, 128, 1, 4, 3),
    (64, 17920, 1536): Tiles(64, 128, 64, 1, 4, 4), (128, 17920, 1536): Tiles(128, 64, 64, 1, 4, 5),
    (256, 17920, 1536): Tiles(128, 128, 64, 1, 8, 4), (16, 1536, 8960): Tiles(16, 64, 128, 6, 4, 4),
    (32, 1536, 8960): Tiles(32, 64, 64, 6, 4, 6), (64, 1536, 8960): Tiles(64, 64, 64, 6, 4, 6),
    (128, 1536, 8960): Tiles(128, 128, 128, 10, 8, 3), (256, 1536, 8960): Tiles(256, 128, 64, 11, 8, 4),
    (16, 151936, 1536): Tiles(16, 128, 128, 1, 8, 3), (32, 151936, 1536): Tiles(32, 64, 128, 1, 4, 4),
    (64, 151936, 1536): Tiles(64, 128, 64, 1, 4, 4), (128, 151936, 1536): Tiles(128, 128, 64, 1, 8, 4),
    (256, 151936, 1536): Tiles(128, 128, 64, 1, 8, 4),
}  # fmt: skip


def default_tiles(num_rows: int, columns: int, depth: int, item_bytes: int) -> Tiles:
    """Return tiles for rows [R, K] times weight [N, K], where none are measured: R, N, K."""
    rows = min(max(16, 1 << (num_rows - 1).bit_length()), 128)
    width, step = (64, 128) if rows < 128 else (128, 64)
    programs = -(-columns // width) * -(-num_rows // rows)
    in_part = -(-depth // (max(1, min(PROGRAMS // programs, 8, depth // 128)) * 128)) * 128
    return Tiles(rows, width, step, -(-depth // in_part), stages=8 // item_bytes)  # what shared memory holds


def reducing_tiles(num_rows: int, depth: int, item_bytes: int, settings: Settings) -> Tiles:
    """Return tiles for rows [R, K] times the few weight rows that an update reduces to: R, K."""
    rows = 16 if num_rows <= 64 else 32
    parts = -(-depth // settings.reduce_depth)
    return Tiles(rows, settings.reduce_columns, 128, parts, stages=8 // item_bytes)
