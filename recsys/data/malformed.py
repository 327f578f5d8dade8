"""Rows of a text file that have too few or too many cells: they are skipped, and kept for the count."""

from __future__ import annotations

import pyarrow.csv as pcsv


class Malformed(list[pcsv.InvalidRow]):
    """The `invalid_row_handler` of one reading; its length is how many rows were skipped."""

    def __call__(self, row: pcsv.InvalidRow) -> str:
        self.append(row)
        return "skip"
