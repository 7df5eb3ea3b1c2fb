"""Learning-rate schedules and the moving average of weights."""

import copy
import math

import pytest
import torch

from fastanchor.config import OptimConfig
from fastanchor.models import build_model
from fastanchor.train.optim import WeightAverage, build_optimizer, learning_rate


def test_step_schedule_decays_at_its_milestones():
    config = OptimConfig(lr=0.1, schedule="step", milestones=(100, 105), decay=0.1)
    assert [learning_rate(config, e, 110) for e in (0, 99.99, 100, 104.9, 105, 109)] == pytest.approx(
        [0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    )


def test_cosine_schedule_with_warm_up():
    config = OptimConfig(lr=0.2, schedule="cosine", warmup_epochs=2)
    assert learning_rate(config, 1, 10) == pytest.approx(0.1)
    assert learning_rate(config, 5, 10) == pytest.approx(0.1)
    assert learning_rate(config, 2.5, 10) == pytest.approx(0.1 * (1 + math.cos(math.pi / 4)))
    assert learning_rate(config, 10, 10) == pytest.approx(0)


def test_cyclic_schedule_is_a_triangle():
    config = OptimConfig(lr=0.3, schedule="cyclic", peak=0.4)
    assert [learning_rate(config, e, 10) for e in (0, 2, 4, 7, 10)] == pytest.approx([0, 0.15, 0.3, 0.15, 0])


def test_optimizer_is_torch_sgd_to_rounding():
    """Fused or not, the update is w <- w - lr * (m * v + g + wd * w)."""
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(5, dtype=torch.float64))
    optimizer = build_optimizer([parameter], OptimConfig(lr=0.1, momentum=0.9, weight_decay=0.01))
    w, v = parameter.detach().clone(), torch.zeros(5, dtype=torch.float64)
    for _ in range(3):
        parameter.grad = torch.randn(5, dtype=torch.float64)
        v = 0.9 * v + parameter.grad + 0.01 * w
        w = w - 0.1 * v
        optimizer.step()
    torch.testing.assert_close(parameter.detach(), w)


def test_weight_average_follows_its_formula_and_copies_counters():
    torch.manual_seed(0)
    model = build_model("resnet18", num_classes=3, width=2)
    average = WeightAverage(model, decay=0.5)
    expected = copy.deepcopy(model.state_dict())
    for t in range(12):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
            model.backbone.bn1.running_mean.add_(1.0)
            model.backbone.bn1.num_batches_tracked.add_(1)
        average.update(model)
        d = min(0.5, (1 + t) / (10 + t))
        for name, value in model.state_dict().items():
            expected[name] = d * expected[name] + (1 - d) * value if value.is_floating_point() else value.clone()
    for name, value in average.model.state_dict().items():
        torch.testing.assert_close(value, expected[name], msg=name)
    assert not any(p.requires_grad for p in average.model.parameters())
