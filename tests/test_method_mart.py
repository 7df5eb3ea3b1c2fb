"""MART: loss and gradient against a transcription in fp64 over rows, its attack, BatchNorm's statistics, and that it learns."""

import math

import pytest
import torch
from test_method_trades import (
    IMAGES,
    LABELS,
    assert_learns,
    attacked_by_hand,
    central_differences,
    config_of,
    make_model,
    make_step,
    own_gradients,
    softmax,
)

from fastanchor.data import views
from fastanchor.errors import UserError
from fastanchor.losses.mart import boosted_cross_entropy, mart_loss, weighted_divergence
from fastanchor.methods import build_method
from fastanchor.methods.base import Outputs
from fastanchor.train.checks import check_config

CLASSES = torch.tensor([0, 1, 2, 3, 4, 0])


def rows_of(seed=5, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(2, 6, 5, dtype=torch.float64, generator=generator)


def boosted_truth(rows, labels):
    total = 0.0
    for row, label in zip(rows, labels, strict=True):
        p = softmax(row)
        wrong = max(value for k, value in enumerate(p) if k != label)
        total += -math.log(p[label]) - math.log(1.0001 - wrong + 1e-12)
    return total / len(rows)


def weighted_truth(clean, adversarial, labels):
    total = 0.0
    for row, other, label in zip(clean, adversarial, labels, strict=True):
        p, q = softmax(row), softmax(other)
        total += sum(a * (math.log(a) - math.log(b + 1e-12)) for a, b in zip(p, q, strict=True)) * (1.0000001 - p[label])
    return total / len(clean)


def mart_truth(clean, adversarial, labels, beta):
    return boosted_truth(adversarial, labels) + beta * weighted_truth(clean, adversarial, labels)


@pytest.mark.parametrize("beta", [5.0, 0.7])
@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-8), (torch.float32, 5e-6)])
def test_loss_and_gradient_are_the_formulas(beta, dtype, rtol):
    clean, adversarial = rows_of()
    value, (d_clean, d_adv) = own_gradients(lambda a, b: mart_loss(a, b, CLASSES, beta), clean.to(dtype), adversarial.to(dtype))
    rows, others, classes = clean.tolist(), adversarial.tolist(), CLASSES.tolist()
    assert value.dtype == dtype and value.item() == pytest.approx(mart_truth(rows, others, classes, beta), rel=rtol)
    expected = central_differences(lambda r: mart_truth(r, others, classes, beta), clean)
    torch.testing.assert_close(d_clean.double(), expected, rtol=rtol, atol=max(1e-8, rtol))
    expected = central_differences(lambda r: mart_truth(rows, r, classes, beta), adversarial)
    torch.testing.assert_close(d_adv.double(), expected, rtol=rtol, atol=max(1e-8, rtol))


def test_method_gives_the_loss_by_terms():
    clean, adversarial = rows_of(6)
    method = build_method(config_of("--method", "mart", "--loss.beta", "3"))
    terms = method.loss(Outputs({"aug": clean, "adv": adversarial}, {}), CLASSES, torch.tensor(0.0))
    rows, others, classes = clean.tolist(), adversarial.tolist(), CLASSES.tolist()
    assert terms["bce"].item() == pytest.approx(boosted_truth(others, classes))
    assert terms["kl"].item() == pytest.approx(3 * weighted_truth(rows, others, classes))
    assert set(terms) == {"bce", "kl"}


def test_loss_is_finite_where_probabilities_underflow():
    """The adversarial prediction is certain and wrong: the margin's logarithm stops at log 1e-4, the divergence's at log 1e-12."""
    labels = torch.tensor([0, 1])
    clean = torch.tensor([[9.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    adversarial = torch.tensor([[-150.0, 150.0, 0.0], [300.0, 0.0, -300.0]])
    value, (d_clean, d_adv) = own_gradients(lambda a, b: mart_loss(a, b, labels), clean, adversarial)
    assert value.isfinite() and d_clean.isfinite().all() and d_adv.isfinite().all()
    certain = own_gradients(lambda a, b: mart_loss(a, b, labels), 100 * clean, adversarial)  # exp(-900) is 0 in fp32
    assert certain[0].isfinite() and all(gradient.isfinite().all() for gradient in certain[1])
    assert boosted_cross_entropy(adversarial, labels).item() == pytest.approx(300 - math.log(1e-4), rel=1e-3)

    def limited(row, q, label):
        p = softmax(row)
        return sum(a * (math.log(a) - math.log(b + 1e-12)) for a, b in zip(p, q, strict=True)) * (1.0000001 - p[label])

    expected = (limited([9.0, 0.0, 0.0], [0, 1, 0], 0) + limited([0.0, 1.0, 0.0], [1, 0, 0], 1)) / 2
    assert weighted_divergence(clean, adversarial, labels).item() == pytest.approx(expected, rel=1e-3)


def test_of_equal_wrong_classes_one_is_pushed_down():
    logits = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    boosted_cross_entropy(logits, torch.tensor([2])).backward()
    # Of cross-entropy 1/4 each, of the margin 1/4 for its class and -1/12 for the others (all but: 1.0001 stands for 1).
    torch.testing.assert_close(logits.grad[0].sort().values, torch.tensor([-5, 1, 1, 3]).double() / 6, rtol=1e-3, atol=1e-4)


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(UserError, match="must be \\(N, K\\)"):
        mart_loss(torch.zeros(6, 5), torch.zeros(1, 5), CLASSES)


def test_adversarial_images_are_those_of_the_public_loop():
    model = make_model()
    step = make_step(config_of("--method", "mart", "--attack.start", "gaussian"), model)
    made, _ = step.make_views(IMAGES, LABELS)
    augmented = views.augment(IMAGES, "crop_flip", torch.Generator().manual_seed(0))
    noise = torch.empty_like(augmented).normal_(generator=torch.Generator().manual_seed(1)).mul_(0.001)
    noise = (augmented + noise).clamp(0, 1) - augmented  # as TRADES', the start is projected
    expected = attacked_by_hand(model, augmented, LABELS, noise, "ce")
    assert ((made["adv"].double() - expected).abs() < 1e-5).double().mean() > 0.98


def test_each_view_moves_the_running_statistics_once_the_clean_one_first():
    model = make_model()
    into, means = [], []
    model.normalize.register_forward_pre_hook(lambda module, args: into.append((model.training, args[0].detach())))
    model.backbone.bn1.register_forward_pre_hook(lambda module, args: means.append(args[0].detach().double().mean((0, 2, 3))))
    make_step(config_of("--method", "mart", "--model.view-bn", "separate"), model)(IMAGES, LABELS, progress=0.0)
    clean, adversarial = [x for training, x in into if training]
    assert torch.equal(clean, views.augment(IMAGES, "crop_flip", torch.Generator().manual_seed(0)))
    assert 0.02 < (adversarial - clean).abs().max() <= 0.1 + 1e-6
    norm = model.backbone.bn1
    assert norm.num_batches_tracked == 2
    torch.testing.assert_close(norm.running_mean.double(), 0.09 * means[-2] + 0.1 * means[-1], rtol=1e-5, atol=1e-6)


def test_settings_are_its_own():
    for flags, message in (
        (("--attack.objective", "kl"), "attack.objective = kl"),
        (("--loss.beta", "-1"), "loss.beta = -1"),
        (("--loss.label-smoothing", "0.1"), "loss.label_smoothing"),
    ):
        with pytest.raises(UserError, match=message):
            check_config(config_of("--method", "mart", *flags))


def test_recipe_lowers_its_own_loss_on_digits():
    assert_learns("mart", steps=12)
