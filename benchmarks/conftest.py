"""`pytest benchmarks`: its options, and what happens without pytest-benchmark."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--tiny``."""
    parser.addoption(
        "--tiny", action="store_true", help="small shapes: shows that the entries run, says nothing about speed"
    )


class _WithoutPlugin:
    @pytest.fixture
    def benchmark(self) -> None:
        """Skips: entries are checked and timed through pytest-benchmark's fixture of this name."""
        pytest.skip("needs pytest-benchmark; in igulora's folder: pip install '.[bench]'")


def pytest_configure(config: pytest.Config) -> None:
    """Stand in for the plugin where it is missing or switched off."""
    if not config.pluginmanager.hasplugin("benchmark"):
        config.pluginmanager.register(_WithoutPlugin())
