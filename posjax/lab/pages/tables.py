"""Summaries of results over seeds, as JSON values for pages."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from posjax.lab.statistics import summary


def series_of_seeds(rows: Mapping[str, Mapping[str, Sequence[float]]]) -> list[dict[str, Any]]:
    """Returns the mean and Student's 95 % interval of every cell of a table as JSON values.

    Args:
      rows: {name: {column: values of the seeds}}.

    Returns:
      A dict for every name with the entries name, columns, values (of each column, one per seed), mean, low and high, which are
      None where there are no values, or fewer than two.
    """
    found = []
    for name, row in rows.items():
        each = {column: summary([value for value in values if math.isfinite(value)]) for column, values in row.items()}
        found.append(
            {
                "name": name,
                "columns": list(row),
                "values": [[value if math.isfinite(value) else None for value in values] for values in row.values()],
                "mean": [one.mean for one in each.values()],
                "low": [one.interval and one.interval[0] for one in each.values()],
                "high": [one.interval and one.interval[1] for one in each.values()],
            }
        )
    return found
