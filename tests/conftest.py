"""What every test gets: its own empty store and profile, few threads, and a way to the real data."""

import os
from pathlib import Path

import hypothesis
import pytest
import torch

REAL_DATA = Path(os.environ.get("KAMAL_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


# Processors differ and are shared: no deadline, and the same examples in every run.
hypothesis.settings.register_profile("workbook", deadline=None, derandomize=True)
hypothesis.settings.load_profile("workbook")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if item.get_closest_marker("data") and not REAL_DATA.is_dir():
        pytest.skip("needs real data: the folder ../shared/data beside the checkout, or KAMAL_TEST_DATA")


@pytest.fixture(autouse=True)
def own_store(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's store, or depends on the profile that is set outside."""
    monkeypatch.setenv("KAMAL_STORE", str(tmp_path_factory.getbasetemp() / "store"))
    monkeypatch.delenv("KAMAL_PROFILE", raising=False)


@pytest.fixture
def real_data() -> Path:
    """The folder of real data sets; tests that use it carry the mark `data`."""
    return REAL_DATA
