"""Common to everything that writes reports."""

from __future__ import annotations

import pytest

from cache2cache.evaluate.report.figures import style


@pytest.fixture(scope="module", autouse=True)
def _small_figures():
    """What is tested of figures does not depend on how many points they have, and most of the time goes into those."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(style, "DPI", 40)
        yield
