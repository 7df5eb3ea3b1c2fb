"""The benchmark of every method's step: nothing is missing from it, it times what a training does, and its rows say so."""

import weakref
from pathlib import Path

import pytest
import torch
from test_bench import make_bench

from bench import gpu_methods, method_cases, plot_draw, plots, record_text
from bench.plot_read import Run
from fastanchor import bench_sizes
from fastanchor.methods import METHODS
from fastanchor.settings import load_recipe, recipe_names

CPU = torch.device("cpu")


def test_every_method_is_timed_or_left_out_with_its_reason():
    assert {load_recipe(name).method for name in method_cases.RECIPES} == METHODS.keys() - method_cases.LEFT_OUT.keys()
    assert method_cases.RECIPES[0] == method_cases.BASE
    packaged = [name for name in recipe_names() if name.endswith("_cifar10")]
    assert sorted(f"{name}_resnet18_cifar10" for name in (*method_cases.RECIPES, *method_cases.LEFT_OUT)) == packaged


@pytest.mark.parametrize("name", method_cases.RECIPES)
def test_a_configuration_is_the_recipes(name):
    recipe, config = load_recipe(name), method_cases.make_config(name, 24, precision="bf16", width=4)
    assert (config.batch_size, config.precision, config.model.width, config.engine.graph) == (24, "bf16", 4, "off")
    assert (config.method, config.attack, config.loss, config.data) == (recipe.method, recipe.attack, recipe.loss, recipe.data)
    assert config.optim.awp_gamma == recipe.optim.awp_gamma and config.optim.awp_start == 0
    assert method_cases.make_config(name, 24, precision="fp32").model.width == recipe.model.width


def test_a_step_trains_on_the_batch_and_leaves_the_weights(monkeypatch):
    taken, made = [], []
    step_class = bench_sizes.TrainStep

    class Watched(step_class):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

        def __call__(self, *batch, progress):
            taken.append(batch[0].tolist())
            super().__call__(*batch, progress=progress)

    monkeypatch.setattr(bench_sizes, "TrainStep", Watched)
    config = method_cases.make_config("trades_awp", 6, precision="fp32", width=4)
    call, cost = method_cases.make_step(config, method_cases.make_images(6, 16), CPU)
    before = {name: value.clone() for name, value in made[0].model.named_parameters()}
    call()
    call()
    # Perturbed and put back by AWP, which is on from the first step and counted.
    assert made[0].perturbs_weights and taken == [list(range(6))] * 2
    for name, value in made[0].model.named_parameters():
        torch.testing.assert_close(value, before[name], rtol=1e-6, atol=1e-7)
    plain = method_cases.make_step(
        method_cases.make_config("trades", 6, precision="fp32", width=4), method_cases.make_images(6, 16), CPU
    )
    assert (cost.attack, cost.training) == (plain[1].attack, 2 * plain[1].training)


def test_rows_of_a_gpu_run_are_read_against_pgd_at(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_methods.method_cases, "RECIPES", ("pgd_at", "none_such", "standard"))
    steps, held, step_class, tidy = weakref.WeakSet(), [], bench_sizes.TrainStep, gpu_methods.Bench.tidy

    def make(*args):
        step = step_class(*args)
        steps.add(step)
        return step

    monkeypatch.setattr(bench_sizes, "TrainStep", make)
    monkeypatch.setattr(gpu_methods.Bench, "tidy", lambda bench: (tidy(bench), held.append(len(steps))))
    # Three seconds a step of the base, six of the other.
    monkeypatch.setattr(
        gpu_methods, "interleaved", lambda calls, device, **_: {name: [3.0, 3.0] if name else [6.0, 6.0] for name in calls}
    )
    bench = make_bench(tmp_path)
    gpu_methods.run(bench)
    left_out, base, failed, other = bench.results.rows("methods")
    # The memory of a step and its graph is given back before the next one is made: the base's alone is kept.
    assert held == [1, 1, 1]
    assert failed["name"] == "none_such" and "UserError" in failed["error"]
    assert left_out["name"] == "clead_code" and "loss.source" in left_out["left_out"]
    assert (base["name"], base["flops_ratio"]) == ("pgd_at", 1)
    assert (other["name"], other["cost"], other["ms"]) == ("standard", 2, 6000)
    # Three passes of a network for PGD-10's twenty-three.
    assert other["flops_ratio"] == pytest.approx(3 / 23)
    assert other["extrapolated_s_per_epoch"] == pytest.approx(6 * 50_000 / other["batch"])


def test_the_figure_puts_what_was_measured_beside_the_flops():
    stats = {"rounds": 5, "median": 0.5, "min": 0.4, "max": 0.6}
    info = {"precision": "bf16", "flops_ratio": {"trades": 1.2, "standard": 0.1}}
    info |= {"trades_ratio_median": 1.3, "trades_ratio_range": [1.25, 1.4]}
    info |= {"standard_ratio_median": 0.2, "standard_ratio_range": [0.15, 0.25]}
    info |= {"trades_median_s": 0.65, "trades_range_s": [0.6, 0.7], "standard_median_s": 0.1, "standard_range_s": [0.05, 0.2]}
    entry = {"name": "test_methods", "group": "training step", "params": None, "stats": stats, "extra_info": info}
    row = {"part": "methods", "batch": 8, "precision": "bf16", "graph": "on", "rounds": 5}
    rows = [{**row, "name": "pgd_at", "cost": 1.0, "cost_range": [1.0, 1.0], "flops_ratio": 1.0}]
    rows += [
        {
            **row,
            "name": name,
            "cost": info[f"{name}_ratio_median"],
            "cost_range": info[f"{name}_ratio_range"],
            "flops_ratio": flops,
        }
        for name, flops in info["flops_ratio"].items()
    ]
    for run in (
        Run(Path("bench.json"), "make bench", {"benchmarks": [entry]}, "CPU: any"),
        Run(Path("gpu.json"), "bench.gpu", {"results": rows}, "any", cpu=False),
    ):
        with plot_draw.style():
            ((name, _, figure),) = plots.costs(run)
        ((ax,), texts) = figure.axes, [text.get_text() for text in figure.axes[0].texts]
        assert name == "methods" and [label.get_text() for label in ax.get_yticklabels()] == ["standard", "trades"]
        assert texts == ["0.20", "0.10", "1.30", "1.20"]
    # A record's table: no other code stands there, so nothing is "the engine".
    text = "\n".join(record_text._bench(Run(Path("bench.json"), "make bench", {"benchmarks": [entry]}, "CPU: any")))
    assert "| pgd_at | 500 (400 to 600) |  |  |" in text and "engine" not in text
    assert "| trades | 650 (600 to 700) | 1.30 (1.25 to 1.40) | 1.20 |" in text
    (sentence,) = plots.costs(Run(Path("bench.json"), "make bench", {"benchmarks": []}, "CPU: any"))
    assert "bench.json" in sentence and "other methods" in sentence
