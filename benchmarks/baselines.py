"""The methods that are compared, each a plug-in: it takes a copy of the frozen model and knows how to take one training
step.

All of them train with fused AdamW. PEFT is measured as its users get it, with its defaults: on a bf16 base that means
adapters in fp32 and activations cast to fp32 for them (``autocast_adapter_dtype=True``), a regulariser of weight 0.5,
and an allocation at every step. Ours allocates at every step too, so that every step that is timed does all of the
work.
"""

from __future__ import annotations

from collections import Counter
from typing import ClassVar

import torch
from cases import Case
from torch import Tensor, nn

import igulora

Batch = dict[str, Tensor]


class Method:
    """One way to train. ``step`` is what is timed; its parts are separate so that their launches can be counted apart.

    Attributes:
        name: key of :data:`METHODS`.
        title: for tables.
        adaptive: whether it prunes, so that the check after the runs can ask for it.
    """

    name: str
    title: str
    adaptive = False
    optimizer: torch.optim.Optimizer | None = None

    def __init__(self, model: nn.Module, case: Case) -> None:
        self.case = case
        self.model = model

    def _optimize(self, params: object) -> None:
        self.optimizer = torch.optim.AdamW(params, lr=1e-4, fused=True)

    def bare(self, batch: Batch) -> Tensor:
        """Forward and backward of the adapted model, without regulariser and path rows."""
        loss = self.model(**batch).loss
        loss.backward()
        return loss.detach()

    def backward(self, batch: Batch) -> Tensor:
        """Everything that produces the gradients of a step."""
        return self.bare(batch)

    def book(self) -> None:
        """Scores, schedule and masks."""

    def step(self, batch: Batch) -> Tensor:
        """One whole training step; returns the loss, detached."""
        loss = self.backward(batch)
        if self.optimizer is not None:
            self.optimizer.step()
        self.book()
        self.zero_grad()
        return loss

    def zero_grad(self) -> None:
        """Clear the gradients of a step."""
        if self.optimizer is not None:
            self.optimizer.zero_grad()

    def make_gradients(self) -> None:
        """Zero gradients, so that autograd adds to them in each of two passes whose launches are compared."""
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)

    def prepare(self, small: Batch) -> None:
        """Bring the schedule into its pruning phase, with cheap steps."""
        for _ in range(4):
            self.step(small)

    def kinds(self) -> dict[str, float]:
        """The kinds of step there are, with their share among all steps."""
        return {"step": 1.0}

    def seek(self, kind: str, small: Batch) -> None:
        """Take cheap steps until the next one is of ``kind``."""

    def logits(self, batch: Batch) -> Tensor:
        """What the model says, for the check that a fresh adapter changes nothing."""
        with torch.no_grad():
            return self.model(input_ids=batch["input_ids"]).logits

    def trainable(self) -> int:
        """How many parameters are trained."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def live(self) -> int | None:
        """How many triplets are live, or None where there is no such thing."""
        return None


class Floor(Method):
    """Forward and input gradient of the frozen model: what no adapter can do without."""

    name = "floor"
    title = "frozen model, forward + input gradient (floor)"

    def bare(self, batch: Batch) -> Tensor:
        embedded = self.model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        loss = self.model(inputs_embeds=embedded, labels=batch["labels"]).loss
        loss.backward()
        return loss.detach()


class PeftLora(Method):
    """PEFT's LoRA on all linear layers."""

    name = "peft-lora"
    title = "PEFT LoRA"

    def __init__(self, model: nn.Module, case: Case) -> None:
        import peft

        config = peft.LoraConfig(r=case.rank, lora_alpha=case.rank, target_modules="all-linear", task_type="CAUSAL_LM")
        super().__init__(peft.get_peft_model(model, config), case)
        self._optimize([p for p in self.model.parameters() if p.requires_grad])


class PeftAdaLora(Method):
    """PEFT's AdaLoRA on all linear layers, stepped as its documentation says."""

    name = "peft-adalora"
    title = "PEFT AdaLoRA"
    adaptive = True

    def __init__(self, model: nn.Module, case: Case) -> None:
        import peft

        config = peft.AdaLoraConfig(
            init_r=case.rank,
            target_r=case.target_rank,
            lora_alpha=case.rank,
            total_step=case.total_steps,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        super().__init__(peft.get_peft_model(model, config), case)
        self._optimize([p for p in self.model.parameters() if p.requires_grad])
        self.global_step = 0

    def bare(self, batch: Batch) -> Tensor:
        loss = self.model.base_model.model(**batch).loss
        loss.backward()
        return loss.detach()

    def backward(self, batch: Batch) -> Tensor:
        loss = self.model(**batch).loss
        loss.backward()
        return loss.detach()

    def book(self) -> None:
        self.global_step += 1
        self.model.base_model.update_and_allocate(self.global_step)

    def live(self) -> int | None:
        pattern = self.model.peft_config["default"].rank_pattern
        return sum(sum(kept) for kept in pattern.values()) if pattern else None


class Igulora(Method):
    """Ours. Steps differ in kind: with or without path rows, with or without a score update."""

    name = "default"
    title = "igulora, default estimator, averaged over a scoring window"
    adaptive = True
    options: ClassVar[dict[str, object]] = {}

    def __init__(self, model: nn.Module, case: Case) -> None:
        window = igulora.IGUConfig(total_steps=case.total_steps, **self.options).window
        self.config = igulora.IGUConfig(
            r=case.rank,
            target_rank=case.target_rank,
            total_steps=case.total_steps,
            t_init=3 * window,
            t_final=case.total_steps // 4,
            delta_t=1,
            **self.options,
        )
        super().__init__(igulora.adapt(model, self.config), case)
        self._optimize(igulora.param_groups(self.model, lr=1e-4))
        self.controller = igulora.Controller(self.model)
        self._rows: list[int] = []

    def _loss(self, batch: Batch) -> Tensor:
        self._rows.append(batch["input_ids"].shape[0])
        return self.model(**batch).loss

    def backward(self, batch: Batch) -> Tensor:
        return self.controller.backward(self._loss, batch)

    def book(self) -> None:
        self.controller.step()

    def make_gradients(self) -> None:
        """The controller makes them, as views of one buffer; what is left to do is to clear those that a pass left."""
        self.optimizer.zero_grad(set_to_none=False)

    def prepare(self, small: Batch) -> None:
        """Four windows: three precede the first allocation, the last shows where in a window path rows come."""
        self._rows.clear()
        for _ in range(4 * self.config.window):
            self.step(small)

    def _kind(self, position: int) -> str:
        last_window = self._rows[3 * self.config.window : 4 * self.config.window]
        path = last_window[position] > self.case.rows
        scored = position == self.config.window - 1
        return ("path" if path else "plain") + ("+score" if scored else "")

    def kinds(self) -> dict[str, float]:
        counts = Counter(self._kind(position) for position in range(self.config.window))
        return {kind: count / self.config.window for kind, count in counts.items()}

    def seek(self, kind: str, small: Batch) -> None:
        while self._kind(len(self._rows) % self.config.window) != kind:
            self.step(small)

    def live(self) -> int | None:
        return sum(self.controller.live_ranks().values())


class Instantaneous(Igulora):
    """Ours without path rows, scoring at every step."""

    name = "instantaneous"
    title = "igulora, no path rows (`instantaneous`), scores every step"
    options: ClassVar[dict[str, object]] = {"estimator": "instantaneous", "window": 1}


class OnPath(Igulora):
    """Ours with the release's estimator: the training pass itself runs at a random point of the path."""

    name = "on-path"
    title = "igulora, `on-path`, scores every step"
    options: ClassVar[dict[str, object]] = {"estimator": "on-path", "window": 1}


class AsAdaLora(Igulora):
    """Ours in its AdaLoRA setting."""

    name = "adalora"
    title = 'igulora, `method="adalora"`'
    options: ClassVar[dict[str, object]] = {"method": "adalora"}


METHODS: dict[str, type[Method]] = {
    m.name: m for m in (Floor, Instantaneous, Igulora, OnPath, AsAdaLora, PeftLora, PeftAdaLora)
}
DEFAULT_METHODS = ("floor", "instantaneous", "default", "on-path", "peft-lora", "peft-adalora")
