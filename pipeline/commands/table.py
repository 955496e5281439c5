"""Tables on the terminal."""

from collections.abc import Collection, Sequence


def aligned(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """Align rows of cells in columns; columns numbered in `right` are right-aligned.

    Cells are never shortened.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    signs = [">" if column in right else "<" for column in range(len(widths))]
    forms = [f"{sign}{width}" for sign, width in zip(signs, widths, strict=True)]
    cells = ([format(c, form) for c, form in zip(row, forms, strict=True)] for row in rows)
    return ["  ".join(row).rstrip() for row in cells]
