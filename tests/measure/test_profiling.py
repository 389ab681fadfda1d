"""Profiles of real steps on a tiny model: parts found, sums, FLOPs, a slowed part, trace and picture."""

from __future__ import annotations

import copy
import gzip
import json
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType

import igulora
import igulora.controller
from igulora.benchmarks.cases import CASES, MODELS
from igulora.benchmarks.methods import METHODS, Method
from igulora.benchmarks.models import load_model, make_batch, small_batch
from igulora.measure import attribution, profiling
from igulora.measure.attribution import STEP, attribute
from igulora.measure.counting import Counting
from igulora.measure.parts import (
    ADAPTER,
    ALLOCATION,
    BASE,
    OPTIMIZER,
    ORTHOGONALITY,
    PARTS,
    PATH,
    REST,
    SCORES,
    PartTracker,
)
from igulora.measure.plots import plot_profiles
from igulora.measure.profiling import StepProfile, profile_step

CASE = CASES["tiny-4x16"]
LOOP = {BASE, ADAPTER, OPTIMIZER, REST}
BOOKS = {ORTHOGONALITY, SCORES, ALLOCATION}
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def base() -> nn.Module:
    """The random two-layer Llama, frozen."""
    return load_model(MODELS["tiny"])


@pytest.fixture(scope="module")
def prepared(base: nn.Module) -> Callable[[str], Method]:
    """A method by name, brought into its pruning phase once."""
    made: dict[str, Method] = {}

    def get(name: str) -> Method:
        if name not in made:
            made[name] = METHODS[name](copy.deepcopy(base), CASE)
            made[name].prepare(small_batch(base, CASE))
        return made[name]

    return get


@pytest.fixture(scope="module")
def profiled(base: nn.Module, prepared: Callable[[str], Method]) -> Callable[..., StepProfile]:
    """The profile of a method's step of one kind, taken once."""
    made: dict[tuple[str, str], StepProfile] = {}

    def get(name: str, kind: str) -> StepProfile:
        if (name, kind) not in made:
            method, small = prepared(name), small_batch(base, CASE)
            batch = make_batch(base, CASE.rows, CASE.length)
            made[name, kind] = profile_step(
                lambda: method.step(batch),
                method.model,
                before=lambda: method.seek(kind, small),
                adapted=name != "floor",
                title=f"{name} {kind}",
            )
        return made[name, kind]

    return get


STEPS = [
    ("floor", "step", {BASE, REST}),
    ("instantaneous", "plain+score", LOOP | BOOKS),
    ("default", "plain", LOOP | BOOKS - {SCORES}),
    ("default", "path", (LOOP | BOOKS | {PATH}) - {SCORES}),
    ("default", "plain+score", LOOP | BOOKS),
    ("on-path", "path+score", LOOP | BOOKS | {PATH}),
    ("peft-lora", "step", LOOP),
    ("peft-adalora", "step", LOOP | BOOKS),
    ("release", "plain", LOOP | {ORTHOGONALITY, SCORES, PATH}),
    ("release", "mask", LOOP | BOOKS | {PATH}),
]


@pytest.mark.parametrize(("name", "kind", "expected"), STEPS)
def test_parts_are_found_and_add_up(profiled, name: str, kind: str, expected: set[str]) -> None:
    profile = profiled(name, kind)
    assert tuple(profile.parts) == PARTS
    assert {part for part, cost in profile.parts.items() if cost.launches} == expected
    assert {part for part, cost in profile.parts.items() if cost.seconds} == expected
    assert all(cost.seconds >= 0 for cost in profile.parts.values())
    assert profile.total.seconds == pytest.approx(profile.profiled_seconds, rel=1e-6)
    assert profile.unattributed_seconds == 0
    assert profile.wall_seconds > 0


def products(model: nn.Module, rows: int) -> int:
    """FLOPs of all frozen products of a step: forward, and the input gradient where there is one to give."""
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    count = 0
    for name, layer in layers:
        # The first layer's q, k and v read the embedding, which takes no gradient.
        passes = 1 if "layers.0." in name and name.endswith(("q_proj", "k_proj", "v_proj")) else 2
        count += passes * 2 * rows * layer.in_features * layer.out_features
    return count


@pytest.mark.parametrize(("name", "kind"), [step[:2] for step in STEPS[1:]])
def test_flops_of_base_products_are_the_formulas(base, profiled, name: str, kind: str) -> None:
    profile = profiled(name, kind)
    assert profile.parts[BASE].flops == products(base, CASE.rows * CASE.length)


def test_path_rows_cost_what_they_are_of_the_batch(profiled) -> None:
    plain, path = profiled("default", "plain"), profiled("default", "path")
    # One of five sequences: a quarter of what the four take.
    rows = plain.parts[BASE].flops + plain.parts[ADAPTER].flops + plain.parts[REST].flops
    assert path.parts[PATH].flops == pytest.approx(rows / 4, rel=1e-6)
    assert path.parts[BASE].flops == plain.parts[BASE].flops
    assert any("20.0%" in note for note in path.notes)
    assert not any("Path rows" in note for note in plain.notes)


@pytest.mark.parametrize("name", ["instantaneous", "peft-adalora"])
def test_counts_are_those_of_the_whole_step(base, prepared, profiled, name: str) -> None:
    method = prepared(name)
    (kind,) = method.kinds()
    with Counting() as counting:
        method.step(make_batch(base, CASE.rows, CASE.length))
    total = profiled(name, kind).total
    assert total.flops == counting.total.flops
    assert (total.launches, total.read, total.written) == pytest.approx(
        (counting.total.launches, counting.total.read, counting.total.written), rel=0.01
    )
    assert total.syncs == sum(counting.syncs.values())


def test_syncs_are_where_they_happen(profiled) -> None:
    ours, peft = profiled("instantaneous", "plain+score"), profiled("peft-adalora", "step")
    assert ours.total.syncs == 0
    assert peft.parts[ALLOCATION].syncs == peft.total.syncs > 10


def test_base_products_inside_our_operators_are_told_apart(profiled) -> None:
    calls = {o.name: o.calls for o in profiled("instantaneous", "plain+score").operators[BASE]}
    # 14 layers forward, 11 of them backward; the output head, which is not adapted, both ways.
    assert calls["aten::addmm_"] == 25
    assert calls["aten::mm"] == 2


def slowed(method: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    """The same, after a pause."""

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return method(*args, **kwargs)

    return slow


def test_what_is_slowed_shows_where_it_is(base, prepared, profiled, monkeypatch) -> None:
    method, batch = prepared("instantaneous"), make_batch(base, CASE.rows, CASE.length)
    repeated = igulora.controller.orthogonality_grad_

    def four_times(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.2)
        for _ in range(3):
            repeated(*args, **kwargs)
        return repeated(*args, **kwargs)

    monkeypatch.setattr(igulora.controller, "orthogonality_grad_", four_times)
    slow, quick = profile_step(lambda: method.step(batch), method.model), profiled("instantaneous", "plain+score")
    more = slow.parts[ORTHOGONALITY].seconds - quick.parts[ORTHOGONALITY].seconds
    assert more > 0.19
    assert max(slow.parts, key=lambda part: slow.parts[part].seconds) == ORTHOGONALITY
    assert slow.parts[ORTHOGONALITY].launches == 4 * quick.parts[ORTHOGONALITY].launches
    assert slow.parts[SCORES].launches == quick.parts[SCORES].launches


def test_what_is_slowed_in_the_backward_shows_where_it_is(prepared, base) -> None:
    """PEFT's regulariser has a backward of its own, and so has each layer."""
    method, batch = prepared("peft-adalora"), make_batch(base, CASE.rows, CASE.length)
    adapter = next(p for n, p in method.model.named_parameters() if "lora_A" in n)

    def step() -> None:
        loss = method.model(**batch).loss

        def pause(_grad_inputs: Any, _grad_outputs: Any) -> None:
            time.sleep(0.2)

        node, norms = loss.grad_fn, []
        waiting = [node]
        while waiting:
            node = waiting.pop()
            norms += [node] if "Norm" in node.name() and "Linalg" in node.name() else []
            waiting += [following for following, _ in node.next_functions if following is not None and len(norms) == 0]
        norms[0].register_hook(pause)
        loss.backward()
        method.optimizer.step()
        method.book()
        method.zero_grad()

    assert adapter.requires_grad
    profile = profile_step(step, method.model, warmup=0)
    assert profile.parts[ORTHOGONALITY].seconds > 0.19
    assert max(profile.parts, key=lambda part: profile.parts[part].seconds) == ORTHOGONALITY


def test_the_controller_is_put_back(base) -> None:
    model = igulora.adapt(copy.deepcopy(base), igulora.IGUConfig(r=4, total_steps=300, window=4, t_init=12, ig_every=2))
    optimizer = torch.optim.AdamW(igulora.param_groups(model, lr=1e-4), fused=True)
    controller = igulora.Controller(model)
    batch = make_batch(base, CASE.rows, CASE.length)

    def step() -> None:
        controller.backward(lambda b: model(**b).loss, batch)
        optimizer.step()
        controller.step()
        optimizer.zero_grad()

    for _ in range(3):
        step()
    assert SCORES in used(profile_step(step, model, controller=controller))  # the fourth of the window
    assert controller.global_step == 3
    step()
    first = profile_step(step, model, controller=controller)
    assert PATH in used(first)  # every second has path rows, the window's first among them
    assert SCORES not in used(first)
    assert controller.global_step == 4
    step()
    assert PATH not in used(profile_step(step, model, controller=controller))


def used(profile: StepProfile) -> set[str]:
    """Parts that took time."""
    return {part for part, cost in profile.parts.items() if cost.seconds}


@pytest.mark.parametrize("name", ["trace.json", "folder/trace.json.gz"])
def test_a_trace_has_the_parts_as_ranges(base, prepared, tmp_path, name: str) -> None:
    method, batch = prepared("peft-adalora"), make_batch(base, CASE.rows, CASE.length)
    profile = profile_step(lambda: method.step(batch), method.model, trace=tmp_path / name)
    raw = (tmp_path / name).read_bytes()
    events = json.loads(gzip.decompress(raw) if name.endswith(".gz") else raw)["traceEvents"]
    ranges = [e for e in events if e.get("cat") == "part"]
    assert {e["name"] for e in ranges} == used(profile)
    for part in used(profile):
        length = sum(e["dur"] for e in ranges if e["name"] == part)
        assert length * 1e-6 == pytest.approx(profile.parts[part].seconds, rel=1e-3, abs=1e-6)
    # Operators lie within a range of their own part.
    operators = [e for e in events if e.get("cat") == "cpu_op" and "part" in e.get("args", {})]
    assert len(operators) > 1000
    for operator in operators[::50]:
        within = [r["name"] for r in ranges if r["ts"] - 0.01 <= operator["ts"] <= r["ts"] + r["dur"] + 0.01]
        assert operator["args"]["part"] in within


def test_bad_input(base, prepared, tmp_path) -> None:
    method = prepared("peft-lora")
    with pytest.raises(ValueError, match="expected a model with adapters, got a plain LlamaForCausalLM"):
        profile_step(lambda: None, base)
    with pytest.raises(ValueError, match="expected warmup >= 0"):
        profile_step(lambda: None, method.model, warmup=-1)
    with pytest.raises(ValueError, match=r"ends in .json or .json.gz, got .*trace.txt"):
        profile_step(lambda: torch.ones(1), method.model, trace=tmp_path / "trace.txt")


def test_figures_as_json(profiled) -> None:
    record = json.loads(json.dumps(profiled("instantaneous", "plain+score").as_dict()))
    assert record["format"] == profiling.FORMAT
    assert list(record["parts"]) == list(PARTS)
    assert record["total"]["flops"] == sum(part["flops"] for part in record["parts"].values())
    assert record["operators"][BASE][0]["calls"] > 0


def test_a_picture(profiled, tmp_path) -> None:
    profiles = [profiled("floor", "step"), profiled("instantaneous", "plain+score"), profiled("peft-adalora", "step")]
    for ending in ("png", "svg", "pdf"):
        assert plot_profiles(profiles, tmp_path / "new" / f"bars.{ending}").stat().st_size > 1000
    drawn = (tmp_path / "new" / "bars.svg").read_text()
    for colour in ("#d62728", "#ff7f0e"):  # orthogonality and scores
        assert colour in drawn
    with pytest.raises(ValueError, match="expected profiles to draw, got none"):
        plot_profiles([], tmp_path / "none.png")
    with pytest.raises(ValueError, match="ends in .png, .pdf, .svg"):
        plot_profiles(profiles, tmp_path / "bars.gif")


# -- what a GPU's profile looks like, of which there is none here ---------------------------------------------------------


def event(name: str, start: float, end: float, children: tuple = (), **fields: Any) -> SimpleNamespace:
    """An event as ``profiler.events()`` gives it, in microseconds."""
    made = SimpleNamespace(
        name=name, time_range=SimpleNamespace(start=start, end=end), cpu_children=list(children), cpu_parent=None, kernels=[],
        thread=1, device_type=DeviceType.CPU, is_async=False, is_user_annotation=name.startswith("igulora: "), sequence_nr=-1,
        input_shapes=[], id=0, cpu_time_total=end - start,
    )  # fmt: skip
    for child in children:
        child.cpu_parent = made
    made.self_cpu_time_total = end - start - sum(child.cpu_time_total for child in children)
    vars(made).update(fields)
    return made


def kernel(name: str, duration: float) -> SimpleNamespace:
    """As an event holds the kernels that it launched."""
    return SimpleNamespace(name=name, duration=duration)


def test_a_gpus_kernels_belong_to_what_launched_them() -> None:
    model = igulora.adapt(nn.Sequential(nn.Linear(8, 6)), igulora.IGUConfig(r=2, method="lora"))
    with PartTracker(model, mark=True) as tracker:
        tracker.open(ADAPTER, "layer")
        node = torch.ones(1, requires_grad=True) * 2
        tracker.close("layer")
        number = node.grad_fn._sequence_nr()
    inside = [kernel("_project_kernel", 3.0), kernel(attribution.BASE_KERNELS[0], 20.0)]
    layer = event(
        "igulora::svd_linear_fwd", 12, 18, kernels=inside, input_shapes=[[5, 8], [6, 8], [], [2, 6], [2], [2, 8], [2]]
    )
    adapter = event("igulora: adapter products", 10, 20, (layer,), kernels=[kernel("igulora: adapter products", 23.0)])
    wait = event("cudaStreamSynchronize", 80, 90)
    step = event(STEP, 0, 100, (adapter, wait))
    # The backward runs in autograd's thread, while the step's waits.
    product = event("aten::mm", 52, 58, kernels=[kernel("gemm", 7.0)])
    node_event = event(
        "autograd::engine::evaluate_function: MmBackward0", 50, 60, (product,), thread=2, sequence_nr=number
    )
    lost = event("autograd::engine::evaluate_function: X", 60, 62, thread=2, sequence_nr=-1)
    spans = [("_project_kernel", 3), (attribution.BASE_KERNELS[0], 20), ("gemm", 7), ("stray", 1)]
    spans.append(("igulora: adapter products", 23))  # a range's span on the device is no kernel
    on_device = [
        event(name, 0, length, device_type=DeviceType.CUDA, is_user_annotation=False) for name, length in spans
    ]
    found = attribute([step, adapter, layer, wait, node_event, product, lost, *on_device], tracker)
    assert {part: round(1e6 * seconds, 6) for part, seconds in found.device.items()} == {ADAPTER: 10, BASE: 20, REST: 1}
    assert found.kernels == {ADAPTER: 2, BASE: 1, REST: 0}
    assert found.waits == {REST: 1}
    assert found.fused_base
    assert {part: round(1e6 * seconds, 6) for part, seconds in found.host.items()} == {ADAPTER: 20, REST: 80}
    assert found.unattributed == pytest.approx(3e-6)  # the stray kernel and the node that nobody made


def test_the_names_of_our_fused_kernels() -> None:
    gemm = pytest.importorskip("igulora.kernels.fused.gemm")
    assert {name for name in vars(gemm) if name.startswith("_gemm_") and name.endswith("_kernel")} == set(
        attribution.BASE_KERNELS
    )
