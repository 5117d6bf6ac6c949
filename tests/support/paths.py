"""Where the tests find things, and the models that they use."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PHOTOS = ROOT / "examples"
INPUTS = ROOT / "tests" / "support" / "inputs"  # one small photo in unusual files
# Kept between runs: a build makes only what is missing or out of date.
TEST_ENGINES = ROOT / ".cache" / "test-engines"
NANO, SMALL = "da3-nano", "da3-small"
RANDOM = "random:0"  # WEIGHTS of an untrained network
