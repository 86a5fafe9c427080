"""A matplotlib figure, without a window or global state; the package is optional."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class PlotUnavailableError(RuntimeError):
    """matplotlib is not installed; the message says how to get it."""


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that size, in inches.

    Raises:
        PlotUnavailableError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotUnavailableError("the plot needs matplotlib: pip install 'osp-runtime[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")
