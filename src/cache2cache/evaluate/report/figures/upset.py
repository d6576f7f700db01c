"""Who answers what right: an UpSet figure (Lex and others 2014, doi:10.1109/TVCG.2014.2346248)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from matplotlib.figure import Figure

from cache2cache.evaluate.report.figures import style
from cache2cache.evaluate.report.rows import right
from cache2cache.evaluate.schema import Report, RowRecord

SHOWN = ("receiver", "sharer", "t2t", "c2c")
_MOST = 12


def who_is_right(report: Report, rows: Sequence[RowRecord]) -> Figure | None:
    """Sets of systems that are right on the same rows, the largest first, over all tasks whose answers can be right.

    Only rows that every one of the systems present has answered are counted.
    """
    verdicts: dict[tuple[str, str], dict[str, bool]] = {}
    for row in rows:
        verdict = right(row, report.tasks[row.task])
        if row.system in SHOWN and verdict is not None:
            verdicts.setdefault((row.task, row.id), {})[row.system] = verdict
    names = [name for name in SHOWN if any(name in found for found in verdicts.values())]
    whole = [found for found in verdicts.values() if len(found) == len(names)]
    if len(names) < 2 or not whole:
        return None
    sets = Counter(tuple(name for name in names if found[name]) for found in whole)
    order = sorted(sets, key=lambda chosen: (-sets[chosen], chosen))
    return _figure(names, [(chosen, sets[chosen]) for chosen in order[:_MOST]], sets)


def _figure(names: list[str], shown: list[tuple[tuple[str, ...], int]], sets: Counter[tuple[str, ...]]) -> Figure:
    total, looks = sum(sets.values()), style.looks(names)
    figure = style.figure(3.9, width=8.5)
    grid = figure.add_gridspec(
        2, 2, width_ratios=(1, 3.2), height_ratios=(2.2, 0.32 * len(names)), wspace=0.02, hspace=0.02
    )
    bars, matrix, totals = (figure.add_subplot(grid[i]) for i in ((0, 1), (1, 1), (1, 0)))

    columns = range(len(shown))
    bars.bar(columns, [count for _, count in shown], width=0.62, color="#444444")
    for x, (_, count) in enumerate(shown):
        bars.text(
            x, count, f"{count}\n{100 * count / total:.1f} %", ha="center", va="bottom", size=7.5, linespacing=1.1
        )
    bars.set_ylabel("rows")
    bars.margins(y=0.2)
    bars.set_xticks([])
    bars.set_xlim(-0.6, len(shown) - 0.4)
    rest = total - sum(count for _, count in shown)
    bars.set_title(
        f"{total} rows that all have answered" + (f"; {rest} in smaller sets are not shown" if rest else ""),
    )

    right_rows = {name: sum(count for chosen, count in sets.items() if name in chosen) for name in names}
    for y, name in enumerate(names):
        matrix.axhspan(y - 0.5, y + 0.5, color="#f4f4f4" if y % 2 == 0 else "white", lw=0)
        matrix.plot(columns, [y] * len(shown), ls="", marker="o", ms=8, color="#dcdcdc")
        members = [x for x, (chosen, _) in enumerate(shown) if name in chosen]
        matrix.plot(members, [y] * len(members), ls="", marker="o", ms=8, color=looks[name].colour, zorder=3)
        totals.barh(y, right_rows[name], height=0.55, color=looks[name].colour)
        totals.text(right_rows[name], y, f"{100 * right_rows[name] / total:.1f} % ", ha="right", va="center", size=7.5)
    for x, (chosen, _) in enumerate(shown):
        if chosen:
            ends = [names.index(chosen[0]), names.index(chosen[-1])]
            matrix.plot([x, x], ends, color="#666666", lw=1.4, zorder=2)
    for axes in (matrix, totals):
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.spines[:].set_visible(False)
        axes.set_xticks([])
    matrix.set_xlim(bars.get_xlim())
    matrix.set_xlabel("coloured: these are right, the others wrong")
    matrix.set_yticks([])
    totals.set_yticks(range(len(names)), names)
    totals.yaxis.tick_right()
    totals.tick_params(length=0)
    totals.set_xlim(1.4 * max(1, *right_rows.values()), 0)
    totals.set_xlabel("rows right")
    return figure
