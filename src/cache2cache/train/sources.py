"""Reading what a recipe names: rows of files, hub data sets and evaluation tasks, as examples.

Knows nothing of models or tokens.
"""

from __future__ import annotations

import glob
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

from cache2cache.errors import C2CError, DataError, MissingExtraError
from cache2cache.evaluate import tasks
from cache2cache.evaluate.tasks.files import rows_of
from cache2cache.evaluate.tasks.hub import open_rows
from cache2cache.train.batch import Example
from cache2cache.train.config import Machine, Source
from cache2cache.train.forms import Turns, examples_of

Keep = Callable[[Example], bool]

ENDINGS = (".jsonl", ".jsonl.zst", ".parquet")
"""Files that can be read."""


def read(
    sources: Sequence[Source],
    machine: Machine,
    *,
    seed: int,
    turns: Turns,
    keep: Keep | None = None,
    apart: bool = False,
) -> list[Example]:
    """Rows of all sources: the samples one after the other or, with weights, mixed.

    Every row is checked, those too that a sample leaves out. With weights, rows are drawn from the samples in these
    proportions until one of them is used up.

    Args:
        seed: of samples and mixture.
        keep: which rows may be chosen, such as `Contamination.keep`; a limit counts those.
        apart: put samples that keep the order of their source in a random one, so that rows of one conversation or about one
            passage do not follow one another. Validation pairs each row with the one after it.

    Raises:
        DataError: no such file, a row of another form, or fewer rows than a limit asks for.
        DownloadError, MissingExtraError: of hub data sets; see `evaluate.tasks.hub.open_rows`.
    """
    weights = _weights(sources)
    samples = []
    for source in sources:
        every = list(_examples(source, machine, turns, seed))
        rows = every if keep is None else [row for row in every if keep(row)]
        if len(rows) < (source.limit or 1):
            got = f"{len(rows)}, and {len(every) - len(rows)} that are kept out"
            raise DataError(f"{source.name} has too few rows", got=got, allowed=f"at least {source.limit or 1}")
        draw = random.Random(seed)
        sample = _sample(rows, source, draw)
        in_order = sample is rows or source.neighbours > 1
        samples.append(draw.sample(sample, len(sample)) if apart and in_order else sample)
    if weights is None:
        return [row for sample in samples for row in sample]
    return list(_mixed([iter(sample) for sample in samples], weights, random.Random(seed), [None] * len(samples)))


def _sample(rows: list[Example], source: Source, draw: random.Random) -> list[Example]:
    if source.limit is None:  # of a mixture the first rows may be all that is taken, and files are often sorted
        return rows if source.weight is None else draw.sample(rows, len(rows))
    if source.neighbours == 1:
        return draw.sample(rows, source.limit)
    starts = range(0, len(rows), source.neighbours)
    runs = (rows[start : start + source.neighbours] for start in draw.sample(starts, len(starts)))
    return list(islice(chain.from_iterable(runs), source.limit))


def stream(
    sources: Sequence[Source], machine: Machine, *, seed: int, turns: Turns, buffer: int, keep: Keep | None = None
) -> Iterator[Iterator[Example]]:
    """As `read`, but rows are read as they come, mixed and shuffled: passes without end, each to be read to its end.

    Each pass has an order of its own, drawn by seed and pass. A limit takes a source's first rows. Without weights each row comes
    once per pass, from sources drawn evenly. With weights a pass ends when one source is used up, which then begins anew; the
    others go on where they were.

    Args:
        buffer: rows among which the next is drawn.

    Raises:
        DataError, DownloadError, MissingExtraError: see `read`; what is wrong with rows is raised when they come.
    """
    weights = _weights(sources)

    def kept(source: Source) -> Iterator[Example]:
        found, taken = False, 0
        for row in _examples(source, machine, turns, seed, streaming=True):
            if keep is None or keep(row):
                found, taken = True, taken + 1
                yield row
            if taken == source.limit:
                return
        if not found:
            raise DataError(f"{source.name} has no rows to train on")

    left: list[Iterator[Example] | None] = [None] * len(sources)
    for number in count():
        draw = random.Random(f"{seed}, pass {number}")
        parts = [kept(source) if rest is None else rest for source, rest in zip(sources, left, strict=True)]
        yield _shuffled(_mixed(parts, weights, draw, left), buffer, draw)


def raw_rows(source: Source, machine: Machine, *, streaming: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and row, for each row of a file or a hub data set, unchecked.

    Args:
        streaming: fetch a hub data set while it is read, and not before.

    Raises:
        DataError: no such file, another kind of file, or a damaged one.
        DownloadError, MissingExtraError: see `read`.
    """
    if source.path is None:
        assert source.hub is not None, "a task has items, not rows"
        opened = open_rows(source.hub, source.subset, source.split or "train", source.revision, streaming=streaming)
        yield from ((f"{source.name}, row {number}", row) for number, row in opened)
        return
    path = machine.file(source.path)
    if not source.path.endswith(ENDINGS):
        raise DataError("a data file of an unknown kind", got=path, allowed=f"names that end in {', '.join(ENDINGS)}")
    unit, rows = ("row", _parquet(path)) if path.suffix == ".parquet" else ("line", rows_of(path))
    yield from ((f"{source.path}, {unit} {number}", row) for number, row in rows)


def _parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if not path.is_file():
        raise DataError("no such data file", got=path)
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("reading .parquet needs datasets", hint="pip install 'cache2cache[train]'") from error
    try:
        # Streaming reads the file itself; otherwise datasets copies it into a cache folder first.
        rows = datasets.load_dataset("parquet", data_files=glob.escape(str(path)), split="train", streaming=True)
        yield from ((number, dict(row)) for number, row in enumerate(rows, 1))
    except Exception as error:  # pyarrow's, wrapped differently by each release of datasets
        raise DataError("a data file is damaged", got=f"{path}: {type(error).__name__}: {error}") from error


def _examples(
    source: Source, machine: Machine, turns: Turns, seed: int, *, streaming: bool = False
) -> Iterator[Example]:
    alone = source.learn == "receiver"
    yield from (replace(row, alone=alone) for row in _read(source, machine, turns, seed, streaming))


def _read(source: Source, machine: Machine, turns: Turns, seed: int, streaming: bool) -> Iterator[Example]:
    if source.task is not None:
        task = tasks.get(source.task)
        order = seed if source.neighbours == 1 else None
        for item in tasks.load(task, split="train", data_dir=machine.data_dir, seed=order).items:
            yield Example(list(item.messages), item.target, item.topic, f"{task.name}, row {item.id}")
        return
    for place, row in raw_rows(source, machine, streaming=streaming):
        try:
            yield from examples_of(row, place, turns)
        except C2CError as error:
            raise DataError(f"{place}: {error.what}", got=error.got, allowed=error.allowed, hint=error.hint) from error


def _weights(sources: Sequence[Source]) -> list[float] | None:
    return [source.weight for source in sources if source.weight is not None] or None


def _mixed(
    parts: Sequence[Iterator[Example]],
    weights: Sequence[float] | None,
    draw: random.Random,
    left: list[Iterator[Example] | None],
) -> Iterator[Example]:
    """Rows drawn from parts by weight until one is used up; without weights evenly, until all are.

    With weights the same process as `datasets.interleave_datasets(…, probabilities, stopping_strategy="first_exhausted")`.
    `left` gets what is left of each part in the end, None of one that is used up.
    """
    ahead = [next(part, None) for part in parts]
    while all(ahead) if weights else any(ahead):
        (at,) = draw.choices(range(len(parts)), weights or [row is not None for row in ahead])
        row, ahead[at] = ahead[at], next(parts[at], None)
        assert row is not None, "a part that is used up is never drawn"
        yield row
    left[:] = [None if row is None else chain([row], part) for row, part in zip(ahead, parts, strict=True)]


def _shuffled(rows: Iterable[Example], buffer: int, draw: random.Random) -> Iterator[Example]:
    held: list[Example] = []
    for row in rows:
        if len(held) < buffer:
            held.append(row)
            continue
        at = draw.randrange(buffer)
        yield held[at]
        held[at] = row
    draw.shuffle(held)
    yield from held
