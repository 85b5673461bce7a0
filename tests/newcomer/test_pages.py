"""The README and the guides do what they show; one page a day, all of them in ``make test-all``."""

from __future__ import annotations

import pytest

from newcomer.run_pages import PAGES, run_page

DAILY = "docs/guides/my-model.md"


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[] if page == DAILY else pytest.mark.slow, id=page) for page in PAGES]
)
def test_what_a_page_shows_runs(page, tmp_path):
    assert not run_page(page, tmp_path)
