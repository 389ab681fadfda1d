"""Packaging of igulora. kernels/ and benchmarks/ install as igulora.kernels and igulora.benchmarks, never as top-level packages."""

from pathlib import Path

from setuptools import find_packages, setup

DEMO = [
    "transformers>=5.0",
    "gguf>=0.17",  # reads the GGUF file of the demo's model
    "accelerate>=1.0",  # transformers asks for it to do so
    "rich>=13",
    "matplotlib>=3.8",
    "pyarrow>=15",
]
PEFT = ["peft==0.21.*"]  # the version whose AdaLoRA ours is compared with, number by number
TRAINERS = ["trl>=1.0", "datasets>=4.0"]  # a Trainer of others, with the mixin
QUANTISED = ["bitsandbytes>=0.49", "torchao>=0.17"]  # bases that adapters sit on; neither asks for another torch
TIMING = ["pytest>=8.1", "pytest-benchmark>=5.2"]  # `pytest benchmarks`

setup(
    name="igulora",
    version="0.1.0",
    description="Adaptive-rank fine-tuning (IGU-LoRA, AdaLoRA) at the cost of plain LoRA",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["igulora", "igulora.*"]),
        *("igulora.kernels", "igulora.kernels.fused"),
        "igulora.benchmarks",
        *(f"igulora.benchmarks.{name}" for name in ("fidelity", "methods", "projection", "scaling", "study")),
    ],
    package_dir={"igulora": "igulora", "igulora.kernels": "kernels", "igulora.benchmarks": "benchmarks"},
    package_data={"igulora": ["py.typed"], "igulora.benchmarks.projection": ["configs/*.json"]},
    install_requires=[
        "torch>=2.11",
        "numpy>=1.26",
        "safetensors>=0.4.3",
        'triton>=3.6; platform_system == "Linux" and platform_machine == "x86_64"',
    ],
    extras_require={
        "demo": DEMO,
        "hf": ["transformers>=5.0", "peft>=0.21", "accelerate>=1.0", "datasets>=4.0"],
        "test": [*DEMO, *PEFT, *QUANTISED, *TRAINERS, *TIMING, "hypothesis>=6.100", "pytest-xdist>=3.6"],
        "bench": [*DEMO, *PEFT, *TIMING],
        "lint": ["ruff>=0.12", "mypy>=1.15"],
    },
    entry_points={"console_scripts": ["igulora=igulora.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Intended Audience :: Science/Research",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
