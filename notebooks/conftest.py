"""nbval compares the output of checked cells; what libraries write to stderr differs between machines."""

import pytest


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Leave stderr out of nbval's comparison."""
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += ("stderr",)
