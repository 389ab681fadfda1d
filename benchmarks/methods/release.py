"""The released IGU-LoRA, re-implemented from what it does (ALGORITHMS 2, PEERS): what its users' steps cost today.

None of its code is used; its operators, their order, their dtypes and its loops over modules are kept, because they are
what is measured. Taken from the release (github.com/withyou12/igulora, first stage: run_pruning_sft.py, lora_module.py,
rank_allocator.py):

- The layer. All states in the model's dtype. A row scale written as a product with ``torch.diag``; scaling, rank and
  alpha^3 applied to the whole output one after the other: ``update * scaling / (rank + 1e-5) * alpha ** 3``. Vectors
  Gaussian 0.02, lambda 0.1: a fresh adapter changes the outputs.
- alpha. One of 1/20 ... 20/20 per micro-batch, written into every module from Python before the forward, 1 again after
  the backward.
- Orthogonality. Per matrix ``||G - diag(G)||_F`` of its Gram matrix G, through autograd, in every micro-batch, with
  weight 1 (the paper: 0.1).
- Scores. After the optimizer's step, for each of the three parts of each module, ten operators that make fresh states;
  the gradient that is scored includes alpha^3 and the penalty. epsilon stands in the numerator as well; lambda's score
  is taken, not its size.
- Allocation. Each triplet's score is one scalar on the device; Python's ``sorted`` compares them there, so that each
  comparison waits for the device. Triplets are charged, from the lowest up, until the budget fits; all scores up to the
  last one charged die (so do ties), lambda := 0. Per module a count is read back and a list of who lives. In the final
  phase all of this happens at every step.

Left out, because it is recipe or logging and not method: dropout (0.3 there; no method here has any), clipping of
gradients, TensorBoard, the JSON file that it writes at every step. Changed: fused AdamW as for all methods; a triplet is
charged ``in + out`` parameters, which the release approximates by a constant per kind of module; the linear layers that
the case names are adapted, or all but the output head.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from igulora.budget import BudgetSchedule
from igulora.measure.parts import part as part_of_step

from ..cases import Case
from .method import Adapted, Batch, Method

NODES = 20
EPS = 1e-6
BETA1 = BETA2 = 0.85
PARTS = ("lora_A", "lora_E", "lora_B")


class ReleaseLinear(nn.Module):
    """``x W0^T + b + s alpha^3 ((x A^T) diag(E m)) B^T`` with A (r, in), E and m (r, 1), B (out, r), all in the base's dtype.

    Args:
        base: the frozen layer. rank, lora_alpha: s is ``lora_alpha / rank`` up to the release's 1e-5.
    """

    def __init__(self, base: nn.Linear, rank: int, lora_alpha: float) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.scaling = lora_alpha
        make = self.weight.new_empty
        self.lora_A = nn.Parameter(make((rank, base.in_features)).normal_(std=0.02))
        self.lora_E = nn.Parameter(torch.full_like(make((rank, 1)), 0.1))
        self.lora_B = nn.Parameter(make((base.out_features, rank)).normal_(std=0.02))
        self.lora_mask = nn.Parameter(torch.ones_like(self.lora_E), requires_grad=False)
        self.rank = nn.Parameter(torch.full_like(make(1), float(rank)), requires_grad=False)
        self.alpha = nn.Parameter(torch.ones_like(make(1)), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        y = F.linear(x, self.weight, self.bias)
        scale = torch.diag((self.lora_E * self.lora_mask).squeeze(1))
        update = x @ self.lora_A.T @ scale @ self.lora_B.T
        y += update * self.scaling / (self.rank + 1e-5) * self.alpha**3
        return y

    def set_alpha(self, value: float) -> None:
        """Write alpha the way the release does: an entry, and the tensor onto itself."""
        self.alpha[0] = value
        self.alpha.data.copy_(self.alpha)


class ReleaseScores:
    """Smoothed sensitivities of every parameter, and who lives by them.

    Args:
        model: adapted with :class:`ReleaseLinear`.
        schedule: budget in parameters.

    Attributes:
        mean, deviation: by full parameter name, in the parameter's dtype and shape.
        pattern: per module 1.0 for each triplet that lived after the last allocation.
        costs: per module the parameters of one triplet, ``in + out``.
    """

    def __init__(self, model: nn.Module, schedule: BudgetSchedule) -> None:
        self.model, self.schedule = model, schedule
        self.sensitivity: dict[str, Tensor] = {}
        self.mean: dict[str, Tensor] = {}
        self.deviation: dict[str, Tensor] = {}
        self.pattern: dict[str, list[float]] = {}
        self.costs = self._costs()

    def _parameters(self) -> Iterator[tuple[str, str, nn.Parameter]]:
        """Module name, part and parameter; the loop goes over all parameters of the model, frozen ones included."""
        for name, parameter in self.model.named_parameters():
            module, _, part = name.rpartition(".")
            if part in PARTS:
                yield module, part, parameter

    @part_of_step("scores")
    @torch.no_grad()
    def update(self) -> None:
        """Take the gradients of a step into the states: ten operators for each parameter."""
        for module, part, p in self._parameters():
            name = f"{module}.{part}"
            if name not in self.mean:
                self.mean[name], self.deviation[name] = torch.zeros_like(p), torch.zeros_like(p)
            y = self.sensitivity[name] = (p * p.grad).abs()
            self.mean[name] = BETA1 * self.mean[name] + (1 - BETA1) * y
            self.deviation[name] = BETA2 * self.deviation[name] + (1 - BETA2) * (y - self.mean[name]).abs()

    def _of(self, module: str, part: str) -> Tensor:
        name = f"{module}.{part}"
        return (self.mean[name] + EPS) / (self.deviation[name] + EPS)

    @torch.no_grad()
    def triplets(self) -> dict[str, Tensor]:
        """Per adapted module the (r, 1) scores of its triplets (Eq. 3)."""
        scores = {}
        for module, part, _ in self._parameters():
            if part != "lora_E":
                continue
            vectors = (
                self._of(module, "lora_A").mean(1, keepdim=True),
                self._of(module, "lora_B").mean(0).view(-1, 1),
            )
            scores[module] = (self._of(module, "lora_E").view(-1) + torch.cat(vectors, 1).sum(1)).view(-1, 1)
        return scores

    def _costs(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for module, part, p in self._parameters():
            if part != "lora_E":
                found[module] = found.get(module, 0) + (p.shape[1] if part == "lora_A" else p.shape[0])
        return found

    @part_of_step("allocation")
    @torch.no_grad()
    def allocate(self, step: int) -> None:
        """Set lambda of the lowest triplets to 0, so that the rest fits the budget of ``step``."""
        scores = self.triplets()
        each = [
            (self.costs[module], column.view(-1)[i]) for module, column in scores.items() for i in range(len(column))
        ]
        threshold = last_charged(each, self.schedule.initial - self.schedule.budget(step))
        for module, part, p in self._parameters():
            if part != "lora_E":
                continue
            p.data.masked_fill_(scores[module] <= threshold, 0.0)
            lives = scores[module] > threshold
            lives.sum().item()  # read back at every event, whether it is logged or not
            self.pattern[module] = (scores[module] > threshold).squeeze(1).float().cpu().tolist()

    def step(self, step: int) -> None:
        """What the release does after the optimizer's step number ``step`` (from 1)."""
        schedule = self.schedule
        if step < schedule.t_end:
            self.update()
        pruning = schedule.t_init < step <= schedule.t_end
        if step > schedule.t_end or (pruning and step % schedule.delta_t == 0):
            self.allocate(step)


def last_charged(scored: list[tuple[int, Tensor]], excess: int) -> Tensor:
    """The score up to which triplets must go so that their costs reach ``excess``; at least one goes.

    Args:
        scored: (cost, () score) of every triplet. The scores are compared one with another, each time on their device.
    """
    ordered = sorted(scored, key=lambda entry: entry[1])
    charged = 0
    for cost, score in ordered:
        charged += cost
        if charged >= excess:
            return score
    return ordered[-1][1]


class Release(Method):
    """The release's pruning phase: an allocation every ``delta_t`` steps, between them scores only.

    Attributes:
        delta_t: steps from one allocation to the next (20 in its tables; 5 for the small tasks). PEFT's AdaLoRA allocates at every step,
            as its default says, and so does ours, to which it costs next to nothing; here the two kinds of step are timed apart and
            averaged by their share.

    Raises:
        ValueError: the case's schedule is too short for an allocation in its pruning phase.
    """

    name = "release"
    title = "IGU-LoRA as released (own re-implementation), averaged over its allocation interval"
    adaptive = True
    starts_as_base = False
    delta_t = 20

    def __init__(self, model: nn.Module, case: Case) -> None:
        t_end = case.total_steps - case.total_steps // 4
        if t_end < self.delta_t:
            raise ValueError(
                f"expected a pruning phase of at least {self.delta_t} steps, the release's allocation interval, got {t_end} "
                f"(three quarters of total_steps={case.total_steps}); give the case more steps"
            )
        super().__init__(_adapt(model, case), case)
        self._layers = [m for m in self.model.modules() if isinstance(m, ReleaseLinear)]
        self._optimize([p for p in self.model.parameters() if p.requires_grad])
        per_rank = sum(layer.lora_A.shape[1] + layer.lora_B.shape[0] for layer in self._layers)
        schedule = BudgetSchedule(
            initial=case.rank * per_rank,
            target=case.target_rank * per_rank,
            t_init=0,
            t_end=t_end,
            delta_t=self.delta_t,
        )
        self.scores = ReleaseScores(self.model, schedule)
        self.global_step = 0
        self._random = random.Random(0)

    # -- a step -------------------------------------------------------------------------------------------------------

    def draw(self) -> float:
        """Where on the path the next micro-batch runs: one of 1/20 ... 20/20."""
        return self._random.choice([k / NODES for k in range(1, NODES + 1)])

    @part_of_step("path pass")
    @torch.no_grad()
    def _set_alpha(self, value: float) -> None:
        for layer in self._layers:
            layer.set_alpha(value)

    @part_of_step("orthogonality")
    def penalty(self) -> Tensor:
        """Mean over all A and B of the Frobenius norm of their Gram matrix without its diagonal."""
        total: float | Tensor = 0.0
        matrices = 0
        for name, p in self.model.named_parameters():
            part = name.rpartition(".")[2]
            if part in ("lora_A", "lora_B"):
                gram = p @ p.T if part == "lora_A" else p.T @ p
                total = total + torch.norm(gram - torch.diag(torch.diag(gram)), p="fro")
                matrices += 1
        return total / matrices

    def backward(self, batch: Batch) -> Tensor:
        self._set_alpha(self.draw())
        loss = self.model(**batch).loss
        (loss + self.penalty()).backward()
        self._set_alpha(1.0)
        return loss.detach()

    def book(self) -> None:
        self.global_step += 1
        self.scores.step(self.global_step)

    # -- for the suite ------------------------------------------------------------------------------------------------

    @property
    def _middle(self) -> int:
        """A step in the middle of the pruning phase at which triplets are allocated."""
        schedule = self.scores.schedule
        return max((schedule.t_init + schedule.t_end) // 2 // self.delta_t, 1) * self.delta_t

    def prepare(self, small: Batch) -> None:
        """Three score updates, then an allocation."""
        for _ in range(3):
            self.step(small)
        self.global_step = self._middle - 1
        self.step(small)

    def kinds(self) -> dict[str, float]:
        return {"plain": 1 - 1 / self.delta_t, "mask": 1 / self.delta_t}

    def seek(self, kind: str, small: Batch) -> None:
        """Moves the count of steps: the schedule alone reads it, and nineteen steps in between would change nothing in what one costs."""
        super().seek(kind, small)
        self.global_step = self._middle - 1 if kind == "mask" else self._middle

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """With all lambda at 0."""
        kept = [layer.lora_E.detach().clone() for layer in self._layers]
        for layer in self._layers:
            layer.lora_E.zero_()
        try:
            return super().logits(batch)
        finally:
            for layer, values in zip(self._layers, kept, strict=True):
                layer.lora_E.copy_(values)

    def adapted(self) -> Iterator[Adapted]:
        for name, layer in self.model.named_modules():
            if isinstance(layer, ReleaseLinear):
                trained = {part: getattr(layer, part) for part in PARTS}
                yield Adapted(name, trained, partial(_weight, layer=layer))

    def score_state(self) -> Iterable[Tensor]:
        for states in (self.scores.sensitivity, self.scores.mean, self.scores.deviation):
            yield from states.values()

    def live(self) -> int | None:
        pattern = self.scores.pattern
        return int(sum(sum(lives) for lives in pattern.values())) if pattern else None


class ReleaseFinal(Release):
    """The release's final phase: no scores any more, and the whole allocation at every step."""

    name = "release-final"
    title = "IGU-LoRA as released, in its final phase"

    def prepare(self, small: Batch) -> None:
        super().prepare(small)
        self.global_step = self.scores.schedule.t_end

    def kinds(self) -> dict[str, float]:
        return {"step": 1.0}

    def seek(self, kind: str, small: Batch) -> None:
        """Every step is of the one kind."""
        Method.seek(self, kind, small)


def _weight(W0: Tensor, values: dict[str, Tensor], layer: ReleaseLinear) -> Tensor:
    r = layer.rank.item()
    scale = layer.scaling / (r + 1e-5) * layer.alpha.item() ** 3
    return W0 + scale * (values["lora_B"] * (values["lora_E"] * layer.lora_mask).view(-1)) @ values["lora_A"]


def _adapt(model: nn.Module, case: Case) -> nn.Module:
    """Put a :class:`ReleaseLinear` in the place of every linear layer that the case adapts, never of the output head."""
    head = model.get_output_embeddings()
    for name, child in list(model.named_modules()):
        wanted = not case.targets or any(name == ending or name.endswith(f".{ending}") for ending in case.targets)
        if isinstance(child, nn.Linear) and child is not head and wanted:
            layer = ReleaseLinear(child.requires_grad_(False), case.rank, lora_alpha=float(case.rank))
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, layer)
    return model
