"""What the tests share: the `gpu` mark, a hypothesis profile without deadlines, a tiny model and a run folder holding it."""

import dataclasses
import functools
import gc

import pytest
import torch
from hypothesis import settings as hypothesis_settings

from fastanchor import settings
from fastanchor.config import Config
from fastanchor.data import sources
from fastanchor.models import build_model
from fastanchor.train import checkpoint
from fastanchor.train.run import RunDir, model_from_config

# A shared machine makes single examples slow at random; derandomised, a failure on one machine is one on all.
hypothesis_settings.register_profile("fastanchor", deadline=None, derandomize=True)
hypothesis_settings.load_profile("fastanchor")

# The networks here are tiny: a second thread gains little, and costs much where the cores are shared.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="module", autouse=True)
def small_heap():
    """What stands before a module stays to the end: each collection would look through all of it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def synthetic_images_made_once():
    """Making them takes 0.2 s, and hundreds of trainings begin with it; every test gets its own copy. Yields what makes them."""
    real = sources._synthetic
    make = functools.cache(real)

    def copied(split_seed):
        made = make(split_seed)
        return dataclasses.replace(made, train_images=made.train_images.copy(), test_images=made.test_images.copy())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_synthetic", copied)
        yield real


@pytest.fixture
def tiny_model():
    """A seeded resnet18 of width 4 for 10 classes, in eval mode; a new one for every test."""
    torch.manual_seed(0)
    return build_model("resnet18", num_classes=10, width=4, head_hidden=16, head_dim=8).eval()


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """A run folder with an untrained width-4 model of the digits as its best checkpoint; to be read only."""
    torch.manual_seed(0)
    config = settings.with_method(Config(epochs=1), "standard")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, width=4, head="identity"))
    run = RunDir(tmp_path_factory.mktemp("runs") / "tiny")
    run.create(config, torch.device("cpu"))
    mean, std = (0.3, 0.3, 0.3), (0.4, 0.4, 0.4)
    state = {
        "config": settings.to_dict(config), "class_names": [str(digit) for digit in range(10)], "mean": list(mean),
        "std": list(std), "stage": 1, "epoch": 1, "weights": model_from_config(config, 10, mean, std).state_dict(),
    }  # fmt: skip
    checkpoint.save(run.checkpoints / "best.pt", state)
    return run.path


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    """Help texts and tables are laid out for the terminal's width, which tests must not depend on."""
    monkeypatch.setenv("COLUMNS", "200")
