"""Hooks that a `conftest.py` or another plugin can implement."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_attnheat.attention.scoring import ScoringFactory


@pytest.hookspec
def pytest_attnheat_scoring_functions(  # type: ignore[empty-body]
    config: pytest.Config,
) -> Mapping[str, ScoringFactory]:
    """Give a project's own scoring functions names that fixtures and markers know.

    Called once per session, when the first test that uses attention is collected. Implement it
    in the `conftest.py` next to the configuration file, or in a plugin::

        def pytest_attnheat_scoring_functions(config):
            from torch.nn.functional import normalize

            def cosine(query, key):
                return normalize(query, dim=-1) @ normalize(key, dim=-1).mT

            return {"cosine": lambda query_dim, key_dim, seed: cosine}

    Args:
        config: The configuration of this run.

    Returns:
        Factories by name. A factory is called as `factory(query_dim, key_dim, seed)` and
        returns an `nn.Module` or a function `(query, key) -> scores`. A name that is taken is
        an error.
    """
