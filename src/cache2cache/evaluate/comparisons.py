"""Systems against each other on the rows that both answered: pairs, the gap recovered, example-specific transfer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cache2cache.evaluate import stats
from cache2cache.evaluate.schema import Estimate, PairSummary, Transfer
from cache2cache.evaluate.scores import Scores, common, limits
from cache2cache.evaluate.tasks.base import Metric

BASELINES = ("receiver", "sharer")


def pairs(scores: Scores, metrics: Sequence[Metric]) -> list[PairSummary]:
    """Every system against receiver and sharer, and c2c against every other, in the metrics that both have.

    Pairs without a common row are left out.
    """
    return [pair for a, b in _compared(scores) for metric in metrics if (pair := _pair(scores, a, b, metric))]


def gaps(scores: Scores, metric: Metric) -> dict[str, Estimate]:
    """By system, the share of the gap between receiver and sharer that it recovers, on the rows that all three answered.

    Systems are left out where `stats.gap_recovered` says that the ratio means nothing.
    """
    found = {}
    for system in scores.keys() - set(BASELINES):
        own, receiver, sharer = common(scores, metric, system, *BASELINES)
        if own and (gap := stats.gap_recovered(own, receiver, sharer, limits(metric))):
            found[system] = gap
    return dict(sorted(found.items()))


def transfers(scores: Scores, metrics: Sequence[Metric], title: str) -> list[Transfer]:
    """Whether c2c is better with the sharer's cache of the row than with another row's, metric by metric.

    Empty without c2c or its mismatched control.

    Args:
        title: the task's, for the sentences.
    """
    found = []
    for metric in metrics:
        order = ("mismatched", "c2c") if metric.lower_is_better else ("c2c", "mismatched")
        if pair := _pair(scores, *order, metric):
            shown, sentence = pair.difference.low > 0, _sentence(pair.difference, metric, title)
            found.append(Transfer(metric=metric.name, difference=pair.difference, shown=shown, sentence=sentence))
    return found


def _compared(systems: Scores) -> Iterator[tuple[str, str]]:
    for a in sorted(systems):
        for b in sorted(systems):
            if a != b and (a == "c2c" or (b in BASELINES and a != "receiver")):
                yield a, b


def _pair(scores: Scores, a: str, b: str, metric: Metric) -> PairSummary | None:
    first, second = common(scores, metric, a, b)
    if not first:
        return None
    pair = PairSummary(a=a, b=b, metric=metric.name, difference=stats.paired(first, second, limits(metric)))
    if metric.binary:
        pair.p, pair.only_a, pair.only_b = stats.mcnemar(first, second)
    return pair


def _sentence(difference: Estimate, metric: Metric, title: str) -> str:
    better, worse = difference.low > 0, difference.high < 0
    bounds = difference.value, difference.low, difference.high
    if worse:  # said with a "less", so without signs
        bounds = -difference.value, -difference.high, -difference.low
    value, low, high = (_amount(bound, metric) for bound in bounds)
    value = value if metric.lower_is_better else f"{value} points"
    if metric.binary:
        effect = f"C2C is right {value} {'more' if better else 'less'} often"
    else:
        effect = f"C2C scores {value} {'lower' if better == metric.lower_is_better else 'higher'}"
    rows = f"n = {difference.n}"
    finding = f"{effect} with the row's own cache than with another row's ({low} to {high}, {rows})"
    if not better and not worse:
        ahead = f"the row's own cache is ahead of another row's by {value}"
        finding = f"{ahead}, and the interval includes zero ({low} to {high}, {rows})"
    shown = "shown" if better else "not shown"
    return f"Example-specific transfer is {shown} on {title} ({metric.label}): {finding}."


def _amount(number: float, metric: Metric) -> str:
    """Shares in points with one decimal, other numbers with three; more where that would read as zero."""
    scaled, decimals = (number, 3) if metric.lower_is_better else (100 * number, 1)
    text = f"{scaled:.{decimals}f}"
    if float(text) == 0:
        text = f"{scaled:.1g}" if scaled else f"{0:.{decimals}f}"
    return text.replace("-", "−")
