"""The registry: models, batch shapes and targets, frozen. A new case or target is one more entry here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelCase:
    """A model to adapt.

    Attributes:
        name: as given to ``igulora bench --model``.
        config: keyword arguments of ``transformers.LlamaConfig`` for a random model; empty for SmolLM2-135M, the demo's.
        dtype: of weights and activations.
    """

    name: str
    title: str
    config: tuple[tuple[str, int], ...] = ()
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class Case:
    """One measurement: a model, the shape of its batches, and the ranks.

    Attributes:
        rows, length: sequences in a batch and tokens in each.
        rank, target_rank: triplets stored per matrix at the start, and their average after pruning.
        total_steps: of the schedule that the adaptive methods follow; the steps measured lie in its pruning phase.
        targets: endings of the names of the adapted linears; empty for all but the output head.
    """

    name: str
    model: str
    rows: int
    length: int
    rank: int = 32
    target_rank: int = 16
    total_steps: int = 1000
    targets: tuple[str, ...] = ()

    @property
    def target_modules(self) -> str | list[str]:
        """As PEFT's and igulora's configurations take it."""
        return list(self.targets) or "all-linear"


@dataclass(frozen=True)
class Target:
    """A row of the design's table: a measured figure and what it should be at most; None for one that explains others.

    Attributes:
        key: what is measured. ``"ratio:a/b"`` is the median of the paired ratios of methods a and b, ``"memory:a/b"`` a
            ratio of peaks, ``"count:name"`` a count.
    """

    what: str
    key: str
    limit: float | None


MODELS = {
    m.name: m
    for m in (
        ModelCase("smollm2-135m", "SmolLM2-135M (Llama architecture, 210 linears)"),
        ModelCase(
            "tiny",
            "a random two-layer Llama (smoke test; its times mean nothing)",
            config=(
                ("vocab_size", 256),
                ("hidden_size", 64),
                ("intermediate_size", 128),
                ("num_hidden_layers", 2),
                ("num_attention_heads", 4),
                ("num_key_value_heads", 2),
                ("pad_token_id", 0),
                ("bos_token_id", 1),
                ("eos_token_id", 2),
            ),
        ),
    )
}

CASES = {
    c.name: c
    for c in (
        Case("smollm2-135m-4x512", "smollm2-135m", rows=4, length=512),
        Case("smollm2-135m-4x128", "smollm2-135m", rows=4, length=128),
        Case("tiny-4x16", "tiny", rows=4, length=16, rank=8, target_rank=4),
    )
}

MEMORY = 0.50  # of PEFT AdaLoRA's
TARGETS = (
    Target("step without path rows, over the floor", "ratio:instantaneous/floor", 1.18),
    Target("the same, over PEFT LoRA's step", "ratio:instantaneous/peft-lora", 0.90),
    Target("the same, over PEFT AdaLoRA's step", "ratio:instantaneous/peft-adalora", 0.62),
    Target("the floor alone, which trains nothing, over PEFT AdaLoRA's step", "ratio:floor/peft-adalora", None),
    Target("step with the default estimator, mean of a scoring window, over the floor", "ratio:default/floor", 1.24),
    Target("the same, over a step without path rows", "ratio:default/without-path", 1.05),
    Target("the same, over the released IGU-LoRA's step", "ratio:default/release", None),
    Target("peak memory beyond the frozen model, over PEFT AdaLoRA's", "memory:instantaneous/peft-adalora", MEMORY),
    Target("the same, of a step with path rows", "memory:default/peft-adalora", MEMORY),
    Target("the same, path passes of their own and inputs recomputed", "memory:lean/peft-adalora", MEMORY),
    Target("the same, of the floor", "memory:floor/peft-adalora", None),
    Target("launches per step for orthogonality, scores and allocation", "count:launches", 10),
    Target("host syncs per step", "count:syncs", 0),
)
