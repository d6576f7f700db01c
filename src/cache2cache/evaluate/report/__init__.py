"""What a person reads of an evaluation, from the numbers of `schema.Report`. Computes no statistics itself."""

from __future__ import annotations

from cache2cache.evaluate.report.files import write
from cache2cache.evaluate.report.table import print_table

__all__ = ["print_table", "write"]
