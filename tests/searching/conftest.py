"""A world of tiny models that all searches share."""

from pathlib import Path

import pytest

from tests.support.recipes import make_world


@pytest.fixture(scope="package")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))
