"""The paper's table, row by row."""

import pytest

from igulora import IGUConfig
from igulora.presets import PRESETS, get_preset

# lr, batch, t_i, delta_t, t_f (ALGORITHMS 2.4; Tables 6 and 7).
TABLE = {
    "MNLI": (5e-4, 128, 500, 20, 10000),
    "RTE": (1e-3, 32, 300, 5, 2500),
    "QNLI": (5e-4, 128, 400, 20, 10000),
    "MRPC": (1e-3, 32, 300, 5, 2500),
    "QQP": (5e-4, 128, 500, 20, 10000),
    "SST-2": (1e-3, 64, 400, 20, 5000),
    "CoLA": (1e-3, 32, 300, 5, 2500),
    "STS-B": (2e-3, 32, 300, 5, 2500),
    "BoolQ": (5e-4, 16, 500, 20, 10000),
    "ARC-e": (5e-4, 16, 500, 20, 10000),
    "ARC-c": (5e-4, 16, 500, 20, 10000),
    "COPA": (1e-3, 16, 500, 20, 10000),
    "AQuA": (1e-4, 16, 500, 20, 10000),
    "MMLU": (1e-4, 128, 500, 20, 10000),
}
GLUE = {"MNLI", "RTE", "QNLI", "MRPC", "QQP", "SST-2", "CoLA", "STS-B"}


def test_every_row_is_there():
    assert {name: (p.lr, p.batch_size, p.t_init, p.delta_t, p.t_final) for name, p in PRESETS.items()} == TABLE


@pytest.mark.parametrize("name", TABLE)
def test_common_values(name):
    preset = PRESETS[name]
    assert (preset.r, preset.target_rank) == ((2, 1) if name in GLUE else (32, 16))
    assert preset.epochs == (15 if name == "MMLU" else 25)
    assert (preset.eps, preset.window, preset.nodes, preset.beta1, preset.beta2) == (1e-6, 16, 20, 0.85, 0.85)
    assert (preset.init, preset.orthogonality, preset.max_length, preset.patience) == ("orthonormal", 0.1, 512, 10)


@pytest.mark.parametrize("method", ["igu", "adalora", "lora", "random", "magnitude"])
def test_presets_make_configs(method):
    for preset in PRESETS.values():
        IGUConfig(method=method, total_steps=20_000, **preset.config_options(method))


@pytest.mark.parametrize("name", ["sst-2", "SST2", "sst_2"])
def test_names_are_forgiving(name):
    assert get_preset(name).name == "SST-2"


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match="got 'mnlli'. Did you mean 'MNLI'"):
        get_preset("mnlli")
    with pytest.raises(TypeError, match="expected the preset's name as a string, got 3"):
        get_preset(3)
