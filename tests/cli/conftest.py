"""The fixtures of ``tests/training``, found by path: the tests are no package."""

import importlib.util
from pathlib import Path

_SPEC = importlib.util.spec_from_file_location(
    "training_fixtures", Path(__file__).parents[1] / "training" / "conftest.py"
)
_TRAINING = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_TRAINING)

llama_folder, bert_folder, colours, films = (
    getattr(_TRAINING, name) for name in ("llama_folder", "bert_folder", "colours", "films")
)
