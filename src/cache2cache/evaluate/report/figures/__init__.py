"""The figures of a report, as PNG bytes. Knows nothing of files."""

from __future__ import annotations

from cache2cache.evaluate.report.figures.draw import Drawing, draw

__all__ = ["Drawing", "draw"]
