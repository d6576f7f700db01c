"""A report as one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from cache2cache.evaluate.report.content import Section
from cache2cache.evaluate.report.order import ordered
from cache2cache.evaluate.report.samples import Sample
from cache2cache.evaluate.schema import Report

_TEMPLATE = "report.html.jinja"


def html(report: Report, title: str, sections: Sequence[Section], samples: Sequence[Sample]) -> str:
    """The whole page. Everything that comes from data or models is escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    template = environment.from_string(
        files("cache2cache.evaluate.report").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    )
    return template.render(
        title=title,
        sections=sections,
        samples=samples,
        tasks={name: task.title for name, task in report.tasks.items()},
        systems=ordered({answer.system for one in samples for answer in one.answers}),
    )
