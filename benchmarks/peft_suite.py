"""PEFT's own tests with our method in AdaLoRA's place: runs them and writes what passed, and why the rest did not.

``python benchmarks/peft_suite.py SOURCES --output docs/peft-tests.json`` takes the unpacked source archive of the installed PEFT
(``pip download peft==0.21.2 --no-deps --no-binary :all:``), copies its tests to a temporary folder and runs those that use AdaLoRA.
Nothing is downloaded: models of the hub are built from small configurations with random weights. As a plugin of pytest this file puts
:class:`Stand` in the place of ``peft.AdaLoraConfig``.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import types
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

# Files with tests that take AdaLoRA's configuration; others do not name it, or need a GPU or the hub's own weights.
FILES = (
    "test_config.py",
    "test_custom_models.py",
    "test_decoder_models.py",
    "test_encoder_decoder_models.py",
    "test_feature_extraction_models.py",
    "test_initialization.py",
    "test_low_level_api.py",
    "test_mixed.py",
    "test_seq_classifier.py",
)
SELECT = "adalora or igulora"  # parts of test names, in any case
ADALORA_DEFAULTS = {
    "method": "adalora",
    "init_r": 12,
    "target_r": 8,
    "tinit": 0,
    "tfinal": 0,
    "deltaT": 1,
    "lora_alpha": 8,
    "total_step": 1,
}
# Changes to the copies, each an expression, its replacement and why.
_NAMES = {"lora_A": "lora_Q", "lora_B": "lora_P", "lora_E": "lora_E"}
CHANGES: tuple[tuple[str, str, str], ...] = (
    (
        r"if model_id in _HUB_MODEL_ACCESSES:",
        "if _HUB_MODEL_ACCESSES.setdefault(model_id, 0) >= 0:",
        "never asks the hub",
    ),
    (
        r"if \(?(?:config_cls is|config_cls ==|issubclass\(config_cls,) AdaLoraConfig\)?:\n((?:\s+#[^\n]*\n)*\s+pytest\.skip\()",
        r"if False:\n\1",
        "what PEFT skips for AdaLoRA (several trained adapters) runs",
    ),
    (
        r'if config_cls (?:!= LoraConfig|not in \(LoraConfig, ?(?:RoadConfig)?\)):\n((?:\s+#[^\n]*\n)*\s+pytest\.skip\(f?"Mixed adapter)',
        r"if False:\n\1",
        "batches of several adapters, which AdaLoRA has not, run",
    ),
    (
        r'if \(config_cls == AdaLoraConfig\) and \("roberta" in model_id\.lower\(\)\):',
        "if False:",
        "RoBERTa, which PEFT leaves out for AdaLoRA, runs",
    ),
    (
        r"if config_cls is AdaLoraConfig and is_trainable:",
        "if False:",
        "a second trained adapter, which AdaLoRA refuses, is loaded",
    ),
    (
        r'hasattr\(module, "lora_E"\) and "default" in module\.lora_E',
        'hasattr(module, "igu_adapters") and "default" in module.igu_adapters',
        "names of parameters",
    ),
    (r'module\.lora_E\["default"\]', 'module.igu_adapters["default"].lora_E', "names of parameters"),
)
# Tests that fail, by their names, and why they may.
EXCEPTIONS: tuple[tuple[str, str], ...] = (
    (
        r"test_adapter_dtype_autocast\[\w+-False",
        "masters are float32 whatever the base's type: autocast_adapter_dtype=False changes nothing",
    ),
    (r"no_autocast_adapter_dtype", "masters are float32, also of an adapter added with autocast_adapter_dtype=False"),
    (
        r"test_training_gradient_checkpointing.*Roberta",
        "left out by PEFT for AdaLoRA too: no gradient reaches one of RoBERTa's dense layers in this test",
    ),
    (r"test_mixed\.py", "PeftMixedModel takes methods of a list of its own, which is closed"),
    (
        r"test_forward_with_labels",
        "asks for AdaLoRA's penalty in the loss; ours is a gradient and leaves the loss what it is",
    ),
    (
        r"test_lora_conversion\[.*OPT",
        "asks that LoRA of rank 4 be near to rank 12 with lambda ~ N(0, 1); at rank 12 the conversion is exact",
    ),
    (r"config_r_warning", "`r`, which AdaLoRA ignores with a warning, is the rank here"),
    (r"with_bias_raises", 'bias="none" only: refused when the configuration is made'),
    (
        r"timing_bounds_error|invalid_total_step|use_dora_raises|loftq_config_raises|negative_orth",
        "refused too, in words of ours",
    ),
    (r"test_from_pretrained(_cache_dir)?\[|with_runtime_config", "reads a folder of the hub"),
)


# fmt: off
_TEXT = {
    "vocab_size": 1024,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
}
_OPT = {
    "vocab_size": 1024, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 4, "word_embed_proj_dim": 16,
    "max_position_embeddings": 512,
}
_BART = {
    "vocab_size": 1024, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 4, "decoder_ffn_dim": 4, "max_position_embeddings": 128,
}
_GPT = {"vocab_size": 1024, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
_BERT = {**_TEXT, "pad_token_id": 0}
_LLAMA = {**_TEXT, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# A part of a model's name on the hub -> model type and its small configuration.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "OPT": ("opt", _OPT),
    "opt": ("opt", _OPT),
    "GPT2": ("gpt2", _GPT),
    "gpt2": ("gpt2", _GPT),
    "GPTJ": ("gptj", {**_GPT, "rotary_dim": 4}),
    "Llama": ("llama", _LLAMA),
    "qwen2": ("qwen2", {k: v for k, v in _LLAMA.items() if k != "head_dim"}),
    "Mistral": ("mistral", _LLAMA),
    "Gemma3": ("gemma3_text", _LLAMA),
    "T5": ("t5", {"vocab_size": 1024, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}),
    "Bart": ("bart", _BART),
    "Roberta": ("roberta", {**_BERT, "pad_token_id": 1, "max_position_embeddings": 514}),
    "Bert": ("bert", _BERT),
    "DebertaV2": ("deberta-v2", _BERT),
    "Deberta": ("deberta", _BERT),
}
# fmt: on


def copy_tests(sources: Path, folder: Path) -> None:
    """PEFT's tests with :data:`CHANGES`, as a package in ``folder``."""
    tests = folder / "tests"
    shutil.copytree(sources / "tests", tests)
    (tests / "__init__.py").touch()
    (folder / "pytest.ini").write_text("[pytest]\naddopts = -p no:cacheprovider\n")
    for path in tests.glob("*.py"):
        text = path.read_text()
        for pattern, replacement, _ in CHANGES:
            text = re.sub(pattern, replacement, text)
        path.write_text(
            re.sub(r"def test_requires_grad_adalora\w+\(self\):.*?(?=\n    def )", _renamed, text, flags=re.DOTALL)
        )


def _renamed(function: re.Match[str]) -> str:
    """Names of AdaLoRA's parameters as ours."""
    return re.sub(r"(lora_[ABE])\.(\w+)", lambda m: f"igu_adapters.{m[2]}.{_NAMES[m[1]]}", function[0])


def _known(name: Any) -> str | None:
    if not isinstance(name, str) or os.path.isdir(name):
        return None
    return next((mark for mark in MODELS if mark in name.rpartition("/")[2]), None)


def _stub_hub(patch: pytest.MonkeyPatch) -> None:
    """Models and configurations of the hub by name, built here; a folder is read as ever."""
    import torch
    import transformers
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

    def config_of(name: str) -> Any:
        kind, options = MODELS[_known(name) or ""]
        config = transformers.AutoConfig.for_model(kind, **options)
        config._name_or_path = name
        return config

    def built(cls: Any, original: Any) -> Any:
        def from_pretrained(name: Any, *args: Any, **kwargs: Any) -> Any:
            if _known(name) is None:
                return original(name, *args, **kwargs)
            config = config_of(name)
            for key in ("num_labels", "tie_word_embeddings"):
                if key in kwargs:
                    setattr(config, key, kwargs[key])
            make = cls.from_config if hasattr(cls, "from_config") else cls._from_config
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(zlib.crc32(name.encode()))
                model = make(config)
            model.name_or_path = name
            dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
            return model.eval() if dtype in (None, "auto") else model.to(dtype).eval()

        return from_pretrained

    def replace(cls: Any) -> None:
        own = cls.from_pretrained.__func__
        patch.setattr(cls, "from_pretrained", classmethod(lambda c, *a, **k: built(c, own.__get__(c))(*a, **k)))

    def below(cls: Any) -> list[Any]:
        return [cls, *(c for sub in cls.__subclasses__() for c in below(sub))]

    importlib.import_module("transformers.models.auto.modeling_auto")
    for cls in [*below(_BaseAutoModelClass), transformers.PreTrainedModel]:
        if "from_pretrained" in vars(cls):
            replace(cls)
    config = transformers.AutoConfig.from_pretrained
    patch.setattr(
        transformers.AutoConfig,
        "from_pretrained",
        lambda name, *a, **k: config(name, *a, **k) if _known(name) is None else config_of(name),
    )
    own = transformers.PretrainedConfig.from_pretrained.__func__
    patch.setattr(
        transformers.PretrainedConfig,
        "from_pretrained",
        classmethod(lambda c, name, *a, **k: own(c, name, *a, **k) if _known(name) is None else config_of(name)),
    )


def pytest_configure(config: pytest.Config) -> None:
    """Put our configuration where PEFT's tests take AdaLoRA's from."""
    import peft

    from igulora.peft import IGULoraConfig
    from igulora.peft.config import ADALORA_NAMES

    ours = IGULoraConfig.__init__

    def init(self: IGULoraConfig, *args: Any, **kwargs: Any) -> None:
        """With the defaults of PEFT's AdaLoRA, which its tests rely on."""
        kwargs.pop("peft_type", None)
        absent = {k: v for k, v in ADALORA_DEFAULTS.items() if k not in kwargs and ADALORA_NAMES.get(k) not in kwargs}
        ours(self, *args, **absent, **kwargs)

    patch = pytest.MonkeyPatch()
    if (
        importlib.util.find_spec("diffusers") is None
    ):  # imported by a helper of the tests for one class that no test of ours uses
        diffusers = types.ModuleType("diffusers")
        diffusers.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
        patch.setitem(sys.modules, "diffusers", diffusers)
    functools.update_wrapper(init, ours)  # PEFT reads the signature
    patch.setattr(IGULoraConfig, "__init__", init)
    patch.setattr(peft, "AdaLoraConfig", IGULoraConfig)
    _stub_hub(patch)
    config.add_cleanup(patch.undo)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """One line per test that ran, into the file that :func:`main` named."""
    path = os.environ.get("IGULORA_PEFT_SUITE")
    if path and (report.when == "call" or report.outcome != "passed"):
        text = (
            str(report.longrepr[2])
            if isinstance(report.longrepr, tuple)
            else str(getattr(report.longrepr, "reprcrash", ""))
        )
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps([report.nodeid, report.outcome, text.splitlines()[0][:300] if text else ""]) + "\n")


def _run(folder: Path, timeout: int) -> list[list[str]]:
    lines = folder / "reports.jsonl"
    lines.touch()
    env = {**os.environ, "IGULORA_PEFT_SUITE": str(lines), "HF_HUB_OFFLINE": "1"}
    command = [
        Path(sys.executable).with_name("pytest"),
        "-c",
        "pytest.ini",
        "--rootdir",
        ".",
        "-p",
        "igulora.benchmarks.peft_suite",
    ]
    files = [f"tests/{name}" for name in FILES]
    subprocess.run(
        [*command, *files, "-k", SELECT, "-q", "-W", "ignore", "--tb=short"],
        cwd=folder,
        env=env,
        timeout=timeout,
        check=False,
    )
    return [json.loads(line) for line in lines.read_text().splitlines()]


def summary(reports: list[list[str]]) -> dict[str, Any]:
    """Counts, skips by reason, failures by exception; ``unexplained`` failures fit none."""
    failed: dict[str, list[str]] = {reason: [] for _, reason in EXCEPTIONS}
    unexplained = []
    for name, outcome, text in reports:
        if outcome != "failed":
            continue
        reason = next((r for pattern, r in EXCEPTIONS if re.search(pattern, name)), None)
        if reason is None:
            unexplained.append([name, text])
        else:
            failed[reason].append(name)
    skipped = Counter(text for _, outcome, text in reports if outcome == "skipped")
    return {
        "counts": dict(Counter(outcome for _, outcome, _ in reports)),
        "files": {name: dict(Counter(o for n, o, _ in reports if name in n)) for name in FILES},
        "failed": {reason: names for reason, names in failed.items() if names},
        "unexplained": unexplained,
        "skipped": dict(skipped.most_common()),
    }


def page(record: dict[str, Any]) -> str:
    """The record as a page of tables."""
    counts, versions = record["counts"], record["versions"]
    lines = [
        "# PEFT's own tests with igulora in AdaLoRA's place",
        "",
        f"{counts.get('passed', 0)} passed, {counts.get('failed', 0)} failed, {counts.get('skipped', 0)} skipped on {record['date']}, with "
        + ", ".join(f"{name} {number}" for name, number in versions.items())
        + f", Python {record['python']}, on a CPU.",
        "",
        "The tests are those of PEFT's source archive whose names hold AdaLoRA or its configuration. `IGULoraConfig` stands where they",
        'take `AdaLoraConfig`, with AdaLoRA\'s defaults and `method="adalora"`; models of the hub are small, with random weights. None of',
        "PEFT's code is in this repository. By `benchmarks/peft_suite.py`; failures by name are in the JSON file beside it:",
        "```",
        f"pip download peft=={versions['peft']} --no-deps --no-binary :all: && tar xzf peft-{versions['peft']}.tar.gz",
        "pip install attrs parameterized   # imported by the tests' helpers",
        f"python -m igulora.benchmarks.peft_suite peft-{versions['peft']} --output docs/peft-tests.json",
        "```",
        "",
        "| file | passed | failed | skipped |",
        "|---|---|---|---|",
    ]
    for name, found in record["files"].items():
        lines.append(f"| {name} | " + " | ".join(str(found.get(k, 0)) for k in ("passed", "failed", "skipped")) + " |")
    lines += ["", "## What failed, and why", "| tests | why |", "|---|---|"]
    lines += [f"| {len(names)} | {reason} |" for reason, names in record["failed"].items()]
    lines += [f"| 1 | **not explained**: `{name.rpartition('::')[2]}`: {why} |" for name, why in record["unexplained"]]
    lines += ["", "## What was skipped, in PEFT's words", "| tests | |", "|---|---|"]
    lines += [f"| {count} | {reason.removeprefix('Skipped: ')} |" for reason, count in record["skipped"].items()]
    lines += [
        "",
        "## What was changed in the copies of the tests",
        *(f"- {why}: `{pattern}`" for pattern, _, why in record["changes"]),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run, write the record, print what fits no exception."""
    from importlib.metadata import version

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path, help="the unpacked source archive of the installed PEFT")
    parser.add_argument("--output", type=Path, help="where the record goes")
    parser.add_argument("--timeout", type=int, default=3600, help="seconds")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        copy_tests(args.sources, Path(scratch))
        reports = _run(Path(scratch), args.timeout)
    record = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("peft", "torch", "transformers", "accelerate")},
        "changes": [list(change) for change in CHANGES],
        **summary(reports),
    }
    text = json.dumps(record, indent=1) + "\n"
    if args.output:
        args.output.write_text(text)
        args.output.with_suffix(".md").write_text(page(record))
    print(
        json.dumps(record["counts"]), *(f"unexplained: {name}: {why}" for name, why in record["unexplained"]), sep="\n"
    )
    return 1 if record["unexplained"] or not reports else 0


if __name__ == "__main__":
    sys.exit(main())
