"""Options made from dataclasses, and who wins when several sources set one."""

import dataclasses

import pytest
import torch

from igulora import IGUConfig
from igulora.cli import finetune as command
from igulora.cli.main import build_parser, main
from igulora.config import CHOICES
from igulora.training.settings import RunSettings, find_device


def parse(*args):
    return build_parser().parse_args(["finetune", *args])


def resolve(*args):
    namespace = parse(*args)
    return command.resolve(namespace, demo_data=namespace.train is None)


def test_every_field_is_an_option_with_help():
    config = {f.name for f in dataclasses.fields(IGUConfig)} - {"seed", "total_steps"}
    assert set(command._CONFIG_HELP) == config
    assert set(command._RUN_HELP) == {f.name for f in dataclasses.fields(RunSettings)}
    text = command.add_parser(_Subparsers()).format_help()
    for name in config | set(command._RUN_HELP):
        assert f"--{name.replace('_', '-')}" in text


class _Subparsers:
    """The one method of argparse's subparsers that ``add_parser`` calls."""

    def add_parser(self, name, **options):
        import argparse

        return argparse.ArgumentParser(name, description=options["description"])


def test_values_take_the_types_of_their_fields():
    settings, config = resolve(
        "--train", "x.csv", "--r", "4", "--target-rank", "2", "--lr", "1e-4", "--dropout", "0.1", "--include-f0",
        "--rank-pattern", "q_proj=8", "v_proj=2", "--exclude-modules", "lm_head", "--target-modules", "q_proj", "v_proj",
        "--trace", "q_proj", "--no-gradient-checkpointing", "--steps", "9",
    )  # fmt: skip
    assert config == {
        "r": 4, "target_rank": 2, "dropout": 0.1, "include_f0": True, "rank_pattern": {"q_proj": 8, "v_proj": 2},
        "exclude_modules": ["lm_head"], "target_modules": ["q_proj", "v_proj"],
    }  # fmt: skip
    assert (settings.lr, settings.trace, settings.gradient_checkpointing, settings.steps) == (
        1e-4,
        ("q_proj",),
        False,
        9,
    )


@pytest.mark.parametrize(
    ("given", "expected"), [("all-linear", "all-linear"), (r".*\.q_proj", r".*\.q_proj"), ("q_proj", ["q_proj"])]
)
def test_one_target_is_a_regex_or_a_name(given, expected):
    assert resolve("--train", "x.csv", "--target-modules", given)[1]["target_modules"] == expected


def test_given_beats_preset_beats_default():
    settings, config = resolve("--train", "x.csv", "--preset", "rte", "--lr", "3e-4", "--t-final", "100")
    assert (settings.lr, settings.batch_size, settings.epochs, settings.max_length) == (3e-4, 32, 25, 512)
    assert (config["t_init"], config["t_final"], config["estimator"], config["nodes"]) == (300, 100, "trapezoid", 20)
    assert "nodes" not in resolve("--train", "x.csv", "--preset", "rte", "--estimator", "gauss")[1]
    assert "estimator" not in resolve("--train", "x.csv", "--preset", "rte", "--method", "adalora")[1]
    defaults, nothing = resolve("--train", "x.csv")
    assert defaults == RunSettings()
    assert nothing == {}


def test_the_demo_has_values_of_its_own():
    settings, config = resolve()
    assert (settings.steps, settings.batch_size) == (command.DEMO_SETTINGS["steps"], 4)
    assert config == {**command.DEMO_CONFIG, **command.DEMO_PATH}
    made = IGUConfig(total_steps=settings.steps, **config)
    assert made.t_init >= 3 * made.window  # three score updates come before the first allocation
    assert made.prunes_until - made.t_init >= 3 * made.delta_t
    assert resolve("--epochs", "1")[0].steps is None
    for method in CHOICES["method"]:
        IGUConfig(total_steps=settings.steps, **resolve("--method", method)[1])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--method", "iguu"], "expected method to be one of igu, .*Did you mean 'igu'"),
        (["--estimator", "trapez"], "Did you mean 'trapezoid'"),
        (["--task", "regresion"], "Did you mean 'regression'"),
        (["--rank-pattern", "q_proj"], "expected NAME=NUMBER such as q_proj=8, got 'q_proj'"),
        (["--r", "four"], "invalid int value: 'four'"),
    ],
)
def test_misspelt_options_name_the_nearest(args, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*args)
    assert stop.value.code == 2
    import re

    assert re.search(message, capsys.readouterr().err.replace("\n", " "))


@pytest.mark.parametrize("command", [["bench"], ["profile", "--model", "tiny"]], ids=lambda command: command[0])
@pytest.mark.parametrize("device", ["nowhere", "meta"])
def test_a_device_is_read_in_one_way(command, device, capsys):
    assert build_parser().parse_args(command).device == RunSettings().device == "auto"
    assert main([*command, "--device", device]) == 2
    assert f"expected a device of this machine such as cpu or cuda, got {device!r} (" in capsys.readouterr().err


def test_devices():
    assert find_device("cpu") == torch.device("cpu")
    assert find_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
