"""Orders of columns in which all rows use up their non-zeros at an even pace.

A kernel that looks inputs up in windows makes a step for every non-zero of its rows that lies in
the window, and rows that are ahead of the others wait (see `windows`). How many non-zeros a row
has used up so far, less what it would have at an even pace, is its lead; an order that keeps all
leads small makes fewer steps. That is the problem of ordering vectors so that all partial sums
stay short (Steinitz), solved greedily: each next column is the one that leaves the shortest vector
of leads.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .layout import IntArray

# What the Gram matrix of the columns may cost, in multiply-adds: about a third of a second.
MOST_WORK = 1 << 35
# Its floats, 256 MB.
MOST_FLOATS = 1 << 26
LEAST_ROWS = 128

Counts = npt.NDArray[np.integer]


def even_order(readers: Sequence[Counts]) -> IntArray | None:
    """An order of columns that keeps all rows at an even pace, or None for too many columns.

    Args:
        readers: for each matrix that reads the columns, how many non-zeros each of its rows has in
            each column, or unit of columns that stay together: integers [N, units].

    Returns:
        int32 [units]: the unit in each place.
    """
    units = readers[0].shape[1]
    if units * units > MOST_FLOATS:
        return None
    rows = sum(len(counts) for counts in readers)
    most = max(LEAST_ROWS, MOST_WORK // (units * units))
    gram = np.zeros((units, units), np.float32)
    for counts in readers:
        share = max(1, min(len(counts), most * len(counts) // rows))
        chosen = np.linspace(0, len(counts) - 1, share).astype(np.intp)
        leads = counts[chosen].astype(np.float32)
        leads -= leads.mean(axis=1, keepdims=True)
        gram += (len(counts) / share) * (leads.T @ leads)
    # Half of how much longer the vector of leads would be, squared, with each column next.
    growth = gram.diagonal() / 2
    order = np.empty(units, np.int32)
    for place in range(units):
        order[place] = column = int(growth.argmin())
        growth += gram[column]
        growth[column] = np.inf
    return order
