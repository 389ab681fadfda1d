"""The fidelity study: its exact integral, its estimators, the rule for the default, and the command from end to end."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import igulora
from igulora.benchmarks.cases import MODELS
from igulora.benchmarks.fidelity import page as fidelity_page
from igulora.benchmarks.fidelity import study as fidelity
from igulora.benchmarks.fidelity.choice import DEFAULT_MEASURE, choose, frontier, lines
from igulora.benchmarks.fidelity.measure import (
    Integral,
    Samples,
    Scorer,
    agreement,
    composite_trapezoid,
    difference,
    integrate,
    loss_change,
    top,
)
from igulora.benchmarks.fidelity.settings import STUDIES, Setting, settings
from igulora.benchmarks.models import load_model
from igulora.quadrature import gauss_legendre

pytest.importorskip("transformers")

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "fidelity"
GAUSS5 = list(zip(*gauss_legendre(5), strict=True))
WINDOW = 4
ROUNDING = 1e-4  # of the norm: transformers computes losses, norms and softmax in float32 in a float64 model too


class Toy:
    """A random two-layer Llama in float64 with lambdas away from 0, and batches of random tokens."""

    def __init__(self) -> None:
        self.model = load_model(MODELS["tiny"]).double().eval()
        config = igulora.IGUConfig(
            r=3, target_rank=2, total_steps=1000, window=WINDOW, path_pass="separate", init="orthonormal"
        )
        igulora.adapt(self.model, config)
        self.config = config
        self.bank = igulora.find_bank(self.model)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            self.bank.lambdas.copy_(torch.randn(self.bank.triplets, generator=generator, dtype=torch.float64) * 0.7)
        tokens = torch.randint(0, 256, (WINDOW, 5, 6), generator=generator)
        self.batches = [{"input_ids": t, "labels": t} for t in tokens]

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model(**batch, use_cache=False).loss

    def samples(self, setting: Setting, seed: int = 0) -> Samples:
        return Samples(self.model, setting.config(self.config, seed), setting.control)

    def estimate(self, setting: Setting, seed: int = 0, batches: Any = None) -> Tensor:
        return self.samples(setting, seed).window(self.loss, batches or self.batches).clone()

    def integral(self, rule: list[tuple[float, float]], copies: int = 1, batches: Any = None) -> Integral:
        return integrate(self.model, self.loss, batches or self.batches, rule, copies)

    def attributed(self, T: Tensor) -> float:
        part = self.bank.layout.lambda_offset
        return (self.bank.weight[part:] * T[part:]).sum().item()


@pytest.fixture(scope="module")
def toy() -> Toy:
    return Toy()


def test_the_exact_integral_is_complete_and_of_second_order(toy: Toy) -> None:
    change = loss_change(toy.model, toy.loss, toy.batches)
    assert abs(change) > 1e-3
    errors = [abs(toy.attributed(toy.integral(composite_trapezoid(n)).signed) - change) for n in (10, 20)]
    assert errors[1] < 0.01 * abs(change)
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.15)


def test_nodes_side_by_side_are_the_same_integral(toy: Toy) -> None:
    rule = composite_trapezoid(4)
    one, three = toy.integral(rule, copies=1), toy.integral(rule, copies=3)
    assert difference(one.signed, three.signed) < ROUNDING
    assert difference(one.absolute, three.absolute) < ROUNDING
    # |w| |T| averaged over micro-batches is not that of the averaged T.
    assert (one.absolute > (toy.bank.weight * one.signed).abs() * (1 + 1e-9)).any()


@pytest.mark.parametrize("aggregate", ["signed", "absolute"])
def test_instantaneous_is_the_integrand_at_one(toy: Toy, aggregate: str) -> None:
    estimate = toy.estimate(Setting("instantaneous", aggregate=aggregate))
    assert difference(estimate, toy.integral([(1.0, 1.0)]).of(aggregate)) < ROUNDING


def test_five_gauss_nodes_on_everything_agree_fully(toy: Toy) -> None:
    # Five equal sequences: each node meets the same integrand once per micro-batch, so the rule is complete.
    batches = [{name: t[:1].repeat(5, 1) for name, t in batch.items()} for batch in toy.batches]
    exact = toy.integral(composite_trapezoid(20), 7, batches).signed
    estimate = toy.estimate(Setting("gauss", 5), batches=batches)
    assert difference(estimate, toy.integral(GAUSS5, 5, batches).signed) < ROUNDING
    assert difference(estimate, exact) < 1e-2
    scorers = [Scorer(toy.bank, toy.config) for _ in range(2)]
    for scorer, T in zip(scorers, (estimate, exact), strict=True):
        scorer.update(T)
    found = agreement(scorers[0].sensitivity[0], scorers[1].sensitivity[0], toy.bank.triplets // 2)
    assert found["top"] == 1.0
    assert found["spearman"] > 0.999


def test_sensitivity_is_the_mean_over_a_triplets_weights(toy: Toy) -> None:
    T = torch.randn(toy.bank.weight.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scorer = Scorer(toy.bank, toy.config)
    scorer.update(T)
    y = toy.bank.matrix_views((toy.bank.weight * T).abs())
    name, layer = toy.bank.names[1], toy.bank.layers[1]
    parts = torch.cat([y[name, part].reshape(layer.r, -1) for part in ("lora_E", "lora_P", "lora_Q")], dim=1)
    start = toy.bank.starts[1]
    torch.testing.assert_close(scorer.sensitivity[0][start : start + layer.r], parts.mean(1), rtol=1e-5, atol=1e-9)


def _sampled() -> list[Setting]:
    sampled = [s for study in STUDIES.values() for s in settings(study)]
    return list({s.key: s for s in sampled}.values())


@pytest.mark.parametrize("setting", _sampled(), ids=lambda s: s.key)
def test_seeds_matter_exactly_where_random_numbers_are_drawn(toy: Toy, setting: Setting) -> None:
    first, again, other = (toy.estimate(setting, seed) for seed in (0, 0, 1))
    assert torch.isfinite(first).all()
    assert torch.equal(first, again)
    assert torch.equal(first, other) != setting.draws


def test_extra_sequences_are_counted() -> None:
    toy = Toy()
    for setting, rows in (
        (Setting("gauss", 3), 20),
        (Setting("gauss", 3, 2, 0.4), 2 * 2),
        (Setting("gauss", 3, 2, 0.4, control=True), 2 * 2),
        (Setting("trapezoid", f0=True), 2 * 20),
        (Setting("on-path"), 0),
    ):
        samples = toy.samples(setting)
        samples.window(toy.loss, toy.batches)
        assert samples.extra_rows == rows, setting.key


def test_the_control_leaves_only_what_differs_along_the_path() -> None:
    toy = Toy()
    with torch.no_grad():
        toy.bank.lambdas.zero_()  # no path: every node's gradient is the training gradient
    everything = toy.estimate(Setting("instantaneous"))
    sparse = Setting("gauss", 3, 1, 0.4, control=True)
    correction = toy.estimate(sparse)
    torch.testing.assert_close(correction, torch.zeros_like(correction), rtol=0, atol=1e-12)
    alone = toy.estimate(dataclasses.replace(sparse, control=False))
    assert (alone - everything).norm() > 0.1 * everything.norm()


def test_the_control_is_the_difference_of_the_same_draws(toy: Toy) -> None:
    setting = Setting("gauss", 1, 1, 0.4)  # one node: the factor of every sample is 1
    samples = toy.samples(setting, seed=3)
    rows = [samples.quadrature.rows_of(5) for _ in toy.batches]
    picked = [{k: t[r] for k, t in batch.items()} for r, batch in zip(rows, toy.batches, strict=True)]
    wanted = toy.integral([(0.5, 1.0)], batches=picked).signed - toy.integral([(1.0, 1.0)], batches=picked).signed
    found = toy.estimate(dataclasses.replace(setting, control=True), seed=3)
    assert difference(found, wanted) < ROUNDING


def test_agreement_on_small_numbers() -> None:
    exact = torch.tensor([4.0, 3.0, 2.0, 1.0])
    assert top(torch.tensor([1.0, 2.0, 2.0, 2.0]), 2).tolist() == [False, True, True, False]
    assert agreement(exact, exact, 2) == {"top": 1.0, "spearman": pytest.approx(1.0)}
    found = agreement(torch.tensor([3.0, 1.0, 2.0, 0.0]), exact, 2)
    assert found == {"top": 0.5, "spearman": pytest.approx(0.8)}
    assert agreement(-exact, exact, 2)["top"] == 0.0


def test_steps_are_timed_as_what_they_are() -> None:
    for study in STUDIES.values():
        for setting in settings(study):
            twin = setting.timed_as
            assert twin.kind == setting.kind
            assert twin.aggregate == "signed"
            assert not twin.control
            assert twin.config(study.config(), 0).ig_every == study.window


@pytest.mark.skipif(not list(FOLDER.glob("*.json")), reason="no study was run yet")
def test_the_default_of_the_library_is_what_the_rule_picks() -> None:
    choice = choose(fidelity_page.read(FOLDER), DEFAULT_MEASURE, path_only=True)
    config = igulora.IGUConfig(total_steps=1000)
    assert choice is not None
    assert choice.key == f"{config.estimator} {config.nodes}, every {config.ig_every}, fraction {config.ig_fraction:g}"


def test_epsilon_rules_where_deviations_are_tiny(toy: Toy) -> None:
    T = torch.ones_like(toy.bank.weight)
    for scale, share in ((1.0, 0.0), (1e-9, 1.0)):
        scorer = Scorer(toy.bank, toy.config)
        scorer.update(scale * T)
        assert scorer.below_epsilon == share


# -- the rule --------------------------------------------------------------------------------------------------------


def _record(*entries: tuple[Setting, float, float], name: str = "a") -> dict[str, Any]:
    """Settings with their agreement and extra sequences."""
    found = {}
    for setting, value, extra in entries:
        seed = {m: {"top": [value], "spearman": [value]} for m in ("sensitivity", "snr")}
        found[setting.key] = {
            **dataclasses.asdict(setting),
            "title": setting.title,
            "kind": setting.kind,
            "scored": 1 / setting.every,
            "extra_sequences": extra,
            "seeds": {"0": seed},
        }
    return {"study": {"name": name}, "settings": found}


PLAIN = Setting("instantaneous")
FEW, SOME, ALL = Setting("gauss", 3, 6, 0.25), Setting("gauss", 3, 4, 0.25), Setting("gauss", 3)


def test_the_cheapest_good_setting_is_picked() -> None:
    record = _record((PLAIN, 0.90, 0.0), (ALL, 0.99, 1.0), (SOME, 0.96, 0.05), (FEW, 0.951, 0.04))
    choice = choose([record])
    assert choice is not None
    assert (choice.key, choice.agreement, choice.reached, choice.timed) == (FEW.key, 0.951, True, False)


def test_else_the_best_cheap_one_is_picked() -> None:
    record = _record((PLAIN, 0.90, 0.0), (ALL, 0.99, 1.0), (SOME, 0.94, 0.05), (FEW, 0.93, 0.04))
    choice = choose([record])
    assert choice is not None
    assert (choice.key, choice.reached) == (SOME.key, False)
    assert choose([_record((ALL, 0.99, 1.0))]) is None
    assert choose([]) is None


def test_some_settings_never_become_the_default() -> None:
    control = dataclasses.replace(FEW, control=True)
    absolute = dataclasses.replace(FEW, aggregate="absolute")
    record = _record(
        (Setting("on-path"), 0.99, 0.0),
        (absolute, 0.99, 0.0),
        (control, 0.98, 0.04),
        (FEW, 0.8, 0.04),
        (PLAIN, 0.9, 0.0),
    )
    picked = [choose([record]), choose([record], path_only=True), choose([record], proposed=True)]
    assert [c.key for c in picked if c] == [PLAIN.key, FEW.key, control.key]


def test_a_setting_counts_as_its_worst_model() -> None:
    a = _record((FEW, 0.99, 0.04), (SOME, 0.96, 0.04))
    b = _record((FEW, 0.90, 0.04), (SOME, 0.96, 0.045), name="b")
    choice = choose([a, b])
    assert choice is not None
    assert (choice.key, choice.cost) == (SOME.key, 0.045)


def test_measured_time_replaces_the_count() -> None:
    record = _record((ALL, 0.99, 1.0), (FEW, 0.96, 0.04))
    quartiles = {"median": 1.6, "q1": 1.5, "q3": 1.7}
    record["time"] = {"over_plain": {ALL.kind: quartiles, FEW.kind: quartiles}}
    by_key = {line.key: line for line in lines(record)}
    assert by_key[ALL.key].cost == pytest.approx(0.6)
    assert by_key[FEW.key].cost == pytest.approx(0.1)  # one micro-batch of six
    assert by_key[FEW.key].spread == pytest.approx(0.1 / 6)
    assert choose([record]) is None


def test_the_frontier_rises_with_the_cost() -> None:
    record = _record((PLAIN, 0.9, 0.0), (FEW, 0.85, 0.04), (SOME, 0.95, 0.05), (ALL, 0.94, 1.0))
    assert [line.key for line in frontier(lines(record), "sensitivity")] == [PLAIN.key, SOME.key]


# -- the command -----------------------------------------------------------------------------------------------------


def _run(folder: Path, *more: str) -> int:
    output = str(folder / "2026-01-01-tiny.json")
    return fidelity.main(["--quick", "--threads", "1", "--output", output, "--work", str(folder / "work"), *more])


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole quick run."""
    folder = tmp_path_factory.mktemp("fidelity")
    threads = torch.get_num_threads()
    try:
        assert _run(folder, "--time") == 0
    finally:
        torch.set_num_threads(threads)
    return folder


def _load(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "2026-01-01-tiny.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_a_quick_run_is_complete(ran: Path) -> None:
    record, study = _load(ran), STUDIES["tiny"]
    assert record["complete"] is True
    for setting in settings(study):
        entry = record["settings"][setting.key]
        assert set(entry["seeds"]) == {str(seed) for seed in range(setting.repetitions(study))}
        for found in entry["seeds"].values():
            assert len(found["sensitivity"]["top"]) == study.windows
            assert all(0 <= v <= 1 for measure in found.values() for v in measure["top"])
        assert setting.kind in record["time"]["over_plain"]
    exact = record["exact"]
    assert exact["completeness"]["attributed"] == pytest.approx(exact["completeness"]["loss_change"], rel=0.02)
    assert exact["passes"]["difference"] < 1e-4
    assert exact["doubled"]["difference"] < 0.01
    # Everything but random numbers has to beat chance on a problem this smooth.
    assert min(record["settings"]["gauss 3, every 1, fraction 1"]["seeds"]["0"]["sensitivity"]["top"]) > 0.8
    assert len(record["time"]["seconds"]["plain"]) == study.rounds


@pytest.mark.slow
def test_a_stopped_run_goes_on(ran: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "work").symlink_to(ran / "work")
    record = _load(ran)
    kept = "stratified, every 1, fraction 1"
    record["settings"] = {kept: record["settings"][kept]}
    record["settings"][kept]["seeds"]["0"]["mark"] = "not run again"
    record["complete"] = False
    (tmp_path / "2026-01-01-tiny.json").write_text(json.dumps(record), encoding="utf-8")
    assert _run(tmp_path) == 0
    said = capsys.readouterr().out
    assert "training" not in said
    assert "exact" not in said
    again = _load(tmp_path)
    assert again["complete"] is True
    assert again["settings"][kept]["seeds"]["0"]["mark"] == "not run again"
    before = _load(ran)["settings"]
    assert {k: v for k, v in again["settings"].items() if k != kept} == {k: v for k, v in before.items() if k != kept}


@pytest.mark.slow
def test_another_study_is_not_mixed_in(ran: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (ran / "2026-01-01-tiny.json").read_bytes()
    assert _run(ran, "--steps", "7") == 2
    assert "--output" in capsys.readouterr().err
    assert (ran / "2026-01-01-tiny.json").read_bytes() == before


def test_points_of_other_code_are_not_mixed_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planned: list[str] = []

    def go(run: fidelity.Run) -> None:
        planned[:] = [name for name, _, _ in run.plan()]
        run.record["training"] = run.point.train(run.say)
        output.write_text(json.dumps(run.record), encoding="utf-8")

    monkeypatch.setattr(fidelity.Run, "go", go)
    output = tmp_path / "2026-01-01-tiny.json"
    for trained in (False, True):
        assert _run(tmp_path) == 0
        assert ("training the adapters" in planned) is not trained
    changed = tmp_path / "changed.py"
    changed.write_text("x = 1", encoding="utf-8")
    monkeypatch.setattr(fidelity, "sources", lambda: [changed])
    assert _run(tmp_path) == 2
    assert f"expected {output} to hold study" in capsys.readouterr().err
    output.unlink()
    assert _run(tmp_path) == 0
    assert "training the adapters" in planned
    assert len(list((tmp_path / "work").iterdir())) == 2


def test_code_is_told_from_comments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.py"
    found = []
    for text in ("x = 1", "x = 1  # one", "x = 2"):
        file.write_text(text, encoding="utf-8")
        found.append(fidelity.code_of([file]))
    assert found[0] == found[1] != found[2]
    monkeypatch.setattr(fidelity, "versions", lambda: {"torch": "1.0", "commit": "abc"})
    assert fidelity.code_of([file]) != found[2]
    names = {f"{file.parent.name}/{file.name}" for file in fidelity.sources()}
    assert {"kernels/svd_linear.py", "igulora/path_pass.py", "training/data.py", "fidelity/problem.py"} <= names


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--steps", "0"], "--steps >= 1"), (["--quick"], "--output"), (["--model", "gpt"], "smollm2")],
)
def test_bad_options_say_what_was_expected(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fidelity.parse(arguments)
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_the_page_shows_what_was_measured(ran: Path, tmp_path: Path) -> None:
    record = _load(ran)
    unfinished = {**record, "complete": False, "study": {**record["study"], "name": "other"}}
    for name, content in (("2026-01-01-tiny", record), ("2026-01-02-other", unfinished)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    assert fidelity_page.main([str(tmp_path)]) == 0
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert text == fidelity_page.page([record])
    for line in lines(record):
        assert f"{line.top['sensitivity']:.3f} (≥ {line.low['sensitivity']:.3f})" in text
    tables = [row for row in text.splitlines() if row.startswith("|")]
    widths = {row.count("|") for row in tables}
    assert len(widths) == 2, "a cell breaks its table"
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_without_records_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fidelity_page.main([str(tmp_path)]) == 2
    assert "found none" in capsys.readouterr().err


def test_the_committed_page_is_the_rendering() -> None:
    records = fidelity_page.read(FOLDER)
    page = FOLDER / "README.md"
    written = page.read_text(encoding="utf-8") if page.exists() else None
    assert written == (fidelity_page.page(records) if records else None)


def test_the_toy_is_what_the_study_adapts() -> None:
    """The tiny study adapts the same linears that the float64 toy does, so what holds there holds in the study."""
    from igulora.benchmarks.fidelity.problem import load

    problem = load(STUDIES["tiny"])
    assert isinstance(problem.model, nn.Module)
    assert igulora.find_bank(problem.model).names == Toy().bank.names
