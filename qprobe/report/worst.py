"""Where the largest single-token error of a layer was, in words a reader can check."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qprobe.models.grid import Grid
from qprobe.records import Linear
from qprobe.runs.folder import RunFolder
from qprobe.runs.layers.table import peaks
from qprobe.runs.shown import ShownSample

_CONTEXT = 6  # tokens shown on either side
_SAME_SHAPE = 1.03  # an image and its patches are one shape up to this ratio; the processor rounds to patches


@dataclass(frozen=True)
class Worst:
    """The worst token of a layer.

    kind: "vision", "text" or "answer"; token: its index. before, text, after: what stands there, for a token
    of the text. place: where in the image, for one of the vision tower; box: the same as shares of the
    image's width and height (left, top, width, height), None where the patches do not cover it exactly.
    """

    sample: str
    kind: str
    token: int
    place: str
    before: str = ""
    text: str = ""
    after: str = ""
    box: tuple[float, float, float, float] | None = None


def worst_tokens(run: RunFolder, samples: Mapping[str, ShownSample]) -> dict[str, Worst]:
    """The worst token of each layer that has one, by layer name.

    samples: of `RunFolder.samples`; of one that is missing only the index of the token is said.
    """
    layers = {x.name: x for x in run.key.inventory.layers}
    found = peaks(run).dropna(subset=["sample"])
    outputs = run.units("outputs")[["sample", "layer", "tokens"]].drop_duplicates(["sample", "layer"])
    joined = found.merge(outputs, on=["layer", "sample"], suffixes=("", "_seen"))
    return {
        str(row["layer"]): _worst(row, samples.get(row["sample"]), layers[row["layer"]])
        for row in joined.to_dict("records")
    }


def _worst(row: Mapping, sample: ShownSample | None, layer: Linear) -> Worst:
    token, kind, reads = int(row["token"]), str(row["kind"]), layer.reads
    tokens = () if sample is None else sample.tokens
    if sample is not None and kind == "answer" and sample.decoded:
        tokens = sample.decoded
    # Units say how many tokens an expert read, and not of how many the sequence is that they are from.
    rows = int(row["tokens"]) if layer.experts is None else len(tokens) if reads == "text" else 0
    of = f" of {rows}" if rows > token else ""
    plain = Worst(str(row["sample"]), kind, token, f"{kind} token {token + 1}{of}")
    if sample is None or not of:
        return plain
    in_text = reads == "text" and rows == len(tokens)
    if in_text and kind != "vision":
        return _in_text(plain, tokens)
    if in_text:  # an image token in the sequence: its place among those of the image
        images = [i for i, text in enumerate(sample.tokens) if text is None]
        if token not in images:
            return plain
        return _in_image(plain, sample, images.index(token), len(images))
    return _in_image(plain, sample, token, rows) if reads == "vision" else plain


def _in_text(plain: Worst, tokens: tuple[str | None, ...]) -> Worst:
    def said(part: tuple[str | None, ...]) -> str:
        return "".join(" [image] " if text is None else text for text in part)

    before, after = (
        tokens[max(0, plain.token - _CONTEXT) : plain.token],
        tokens[plain.token + 1 :][:_CONTEXT],
    )
    text = tokens[plain.token] or ""
    return Worst(plain.sample, plain.kind, plain.token, plain.place, said(before), said((text,)), said(after))


def _in_image(plain: Worst, sample: ShownSample, index: int, rows: int) -> Worst:
    spot = None if sample.grid is None else patch_at(sample.grid, index, rows)
    if sample.grid is None or spot is None:
        return plain
    tile, row, column, height, width = spot
    of_tile = f"tile {tile + 1} of {sample.grid.tiles}, " if sample.grid.tiles > 1 else ""
    if row is None or column is None:
        return Worst(plain.sample, plain.kind, plain.token, f"{of_tile}class token of the vision tower")
    place = f"{of_tile}patch in row {row + 1} of {height}, column {column + 1} of {width}"
    box = (column / width, row / height, 1 / width, 1 / height) if _covers(sample, height / width) else None
    return Worst(plain.sample, plain.kind, plain.token, place, box=box)


Spot = tuple[int, int | None, int | None, int, int]


def patch_at(grid: Grid, index: int, rows: int) -> Spot | None:
    """(tile, row, column, rows and columns of a tile) of number `index` among `rows` vision tokens.

    Row and column are None for a class token. None where the number of tokens does not say how they lie:
    known are the patches alone, merged blocks of them, and a class token before each tile's patches,
    also padded to a multiple of 8 as Mllama does.
    """
    patches, merge = grid.rows * grid.columns, grid.merge
    blocks = (grid.rows // merge, grid.columns // merge)
    each, odd = divmod(rows, grid.tiles)
    if odd or not 0 <= index < rows:
        return None
    tile, at = divmod(index, each)
    if each == patches and merge > 1:
        block, inside = divmod(at, merge * merge)
        row = block // blocks[1] * merge + inside // merge
        return tile, row, block % blocks[1] * merge + inside % merge, grid.rows, grid.columns
    if each == patches:
        return tile, at // grid.columns, at % grid.columns, grid.rows, grid.columns
    if merge > 1 and each == blocks[0] * blocks[1]:
        return tile, at // blocks[1], at % blocks[1], *blocks
    if each in (patches + 1, -(-(patches + 1) // 8) * 8) and at <= patches:
        row, column = divmod(at - 1, grid.columns) if at else (None, None)
        return tile, row, column, grid.rows, grid.columns
    return None


def _covers(sample: ShownSample, aspect: float) -> bool:
    """True if one tile shows the whole image: its patches have the image's own shape (height / width)."""
    if sample.size is None or sample.grid is None or sample.grid.tiles != 1:
        return False
    ratio = sample.size[1] / sample.size[0] / aspect
    return 1 / _SAME_SHAPE < ratio < _SAME_SHAPE
