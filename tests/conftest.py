"""What several test modules share: the bundled samples, the real text where it is at hand, and one trained tiny model."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test means a hub, and a wrong path should fail at once

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ROOT / "dataset_info" / "samples"
REAL_DATA = Path(os.environ.get("MEDASST_REAL_DATA", ROOT.parent / "shared" / "data"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with `raw/` and `exams/` of real text; its tests are marked `real_data`."""
    if not (REAL_DATA / "raw").is_dir():
        pytest.skip(f"no real text at {REAL_DATA}; set MEDASST_REAL_DATA to the folder that holds raw/ and exams/")
    return REAL_DATA
