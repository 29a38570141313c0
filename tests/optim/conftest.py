"""What the tests of several processes share."""

from __future__ import annotations

import pytest

from tests.optim.worlds import run


@pytest.fixture(scope="module")
def said(request, tmp_path_factory) -> list[dict[str, str]]:
    """What each rank says of each case of the module's PLAN: four processes, of which two may
    begin or go on as a world of two."""
    return run(request.module.PLAN, tmp_path_factory.mktemp("ranks"))
