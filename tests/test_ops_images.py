"""The operators on images and logits: the CPU implementation against the truth, and the kernels, interpreted, against that."""

import contextlib
import warnings

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from fastanchor.kernels import augment as augment_kernels
from fastanchor.kernels import heads, noise, pgd
from interpreter import interpreted
from test_kernels_heads import TRUTHS, truth_of
from test_kernels_pgd import in_the_ball, normals, words

from fastanchor.data import views
from fastanchor.errors import UserError
from fastanchor.ops import images as operators
from fastanchor.ops import verified
from fastanchor.reference import attacks, objectives

CPU = torch.device("cpu")
EPS, STEP = 8 / 255, 2 / 255
OPERATORS = ("pgd_step", "augment", "label_head", "kl_head", "start_noise")
# Check, the module its kernel is in, and the name of the launcher.
LAUNCHERS = {
    "pgd_step_linf": (pgd, "pgd_step"), "pgd_step_l2": (pgd, "pgd_step"), "augment": (augment_kernels, "augment"),
    **{f"label_head_{kind}": (heads, "label_head") for kind in heads.KINDS}, "kl_head": (heads, "kl_head"),
    "start_noise": (noise, "start_noise"),
}  # fmt: skip


@contextlib.contextmanager
def kernels_on_cpu():
    """What CUDA tensors would meet, for CPU tensors: the operators' CUDA implementations on interpreted kernels."""
    with torch.library._scoped_library("fastanchor", "IMPL") as library, interpreted(pgd, noise, heads, augment_kernels):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators,  other operators may also be overridden")
            for name in OPERATORS:
                library.impl(name, getattr(operators, f"_{name}_kernel"), "CPU", allow_override=True)
        yield


def random(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def batch(shape=(3, 3, 5, 7), memory_format=torch.contiguous_format):
    images = random(*shape).contiguous(memory_format=memory_format)
    x_adv = (images + EPS * (2 * random(*shape, seed=1) - 1)).clamp(0, 1)
    gradient = (random(*shape, seed=2) - 0.5) * (random(*shape, seed=3) > 0.1)
    return x_adv, gradient.contiguous(memory_format=memory_format), images


def some_logits(classes=6, count=9, scale=3.0):
    logits = scale * torch.randn(count, classes, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(classes, (count,), generator=torch.Generator().manual_seed(1))
    return logits, labels, logits + torch.randn(count, classes, generator=torch.Generator().manual_seed(2))


def some_store():
    store = torch.randint(256, (7, 9, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    offsets, mirrored = views.draw_crop_flip(5, torch.Generator().manual_seed(1), pad=2)
    return store, torch.tensor([6, 0, 3, 3, 1]), offsets, mirrored


def calls():
    """(operator, arguments) of every kind."""
    store, index, offsets, mirrored = some_store()
    logits, labels, clean = some_logits()
    seed = torch.tensor([5])
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x_adv, gradient, images = batch(memory_format=memory_format)
        yield "pgd_step", (x_adv, gradient, images, EPS, STEP, "linf")
        yield "pgd_step", (x_adv, gradient.bfloat16(), images, 0.5, 0.1, "l2")
        yield "start_noise", (images, seed, EPS, "uniform", "linf")
        yield "start_noise", (images, seed, 0.5, "gaussian", "l2")
    yield "pgd_step", (x_adv, gradient.contiguous(), images, EPS, STEP, "linf")
    yield "augment", (store, index, offsets, mirrored, 2)
    yield "augment", (store[:5], None, offsets, None, 2)
    for kind in operators.HEADS:
        yield "label_head", (logits, labels, kind)
    yield "label_head", (logits.bfloat16(), labels, "ce")
    yield "kl_head", (logits, clean, True)
    yield "kl_head", (logits.bfloat16(), clean.bfloat16(), False)


def flat(results):
    return results if isinstance(results, (tuple, list)) else (results,)


# -- the CPU implementation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_steps_are_the_references(memory_format):
    x_adv, gradient, images = batch(memory_format=memory_format)
    for norm, eps, step in (("linf", EPS, STEP), ("l2", 0.5, 0.1)):
        x, g, i = (t.double() for t in (x_adv, gradient, images))
        truth = attacks.project(attacks.ascend(x, g, step, norm), i, eps, norm)
        for given in (gradient, gradient.contiguous(), gradient.transpose(2, 3).contiguous().transpose(2, 3)):
            made = operators.pgd_step(x_adv, given, images, eps=eps, step_size=step, norm=norm)
            torch.testing.assert_close(made.double(), truth, rtol=0, atol=3e-7)
            assert made.stride() == x_adv.stride()


@pytest.mark.parametrize("kind", operators.HEADS)
def test_label_heads_are_fp64_autograd(kind):
    for classes, scale in ((6, 3.0), (40, 0.5)):
        logits, labels, _ = some_logits(classes, scale=scale)
        value, gradient = operators.label_head(logits, labels, kind)
        expected, expected_gradient = truth_of(TRUTHS[kind], logits, labels)
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=1e-6)
        assert (value.dtype, gradient.dtype) == (torch.float32, torch.float32)


def test_ties_are_shared_and_dlr_takes_the_first():
    logits, labels = torch.tensor([[1.0, 2.0, 2.0, 0.0], [3.0, 3.0, 3.0, 3.0], [5.0, 1.0, 1.0, 1.0]]), torch.tensor([0, 1, 0])
    for kind in ("cw", "mart_bce"):
        _, gradient = operators.label_head(logits, labels, kind)
        torch.testing.assert_close(gradient.double(), truth_of(TRUTHS[kind], logits, labels)[1], rtol=1e-5, atol=1e-7)
    logits, labels = torch.tensor([[4.0, 1.0, 4.0, 2.0], [1.0, 3.0, 3.0, 1.0]]), torch.tensor([0, 3])
    value, gradient = operators.label_head(logits, labels, "dlr")
    torch.testing.assert_close(value, torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(gradient, torch.tensor([[-0.5, 0.0, 0.5, 0.0], [0.5, 0.0, 0.0, -0.5]]))


def test_ce_has_a_gradient_where_the_model_is_sure_of_itself():
    logits = torch.tensor([[100.0, 20.0, 19.0]])
    _, gradient = operators.label_head(logits, torch.tensor([0]), "ce")
    assert gradient.abs().min() > 0 and gradient.sum().abs() < 1e-40


def test_the_kl_head_is_fp64_autograd():
    logits, labels, clean = some_logits()
    value, gradient, to_clean = operators.kl_head(logits, clean, to_clean=True)
    expected, expected_gradient = truth_of(objectives.kl_divergence, logits, labels, clean.double())
    _, expected_to_clean = truth_of(lambda c: objectives.kl_divergence(logits.double(), labels, c), clean)
    for found, truth in ((value, expected), (gradient, expected_gradient), (to_clean, expected_to_clean)):
        torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-6)
    assert operators.kl_head(logits, clean)[2].shape == (0,)


@pytest.mark.parametrize("shape", [(3, 3, 5, 7), (2, 6, 4, 4)])
def test_noise_is_that_of_a_plain_philox(shape):
    images, seed = torch.full(shape, 0.5), 2**35 + 3
    unit = torch.from_numpy((words(shape, seed) >> 8).astype(np.float64) * 2.0**-24)
    gaussian = 0.001 * normals(shape, seed)
    truths = {
        ("uniform", "linf"): 0.25 * (2 * unit - 1), ("gaussian", "linf"): gaussian, ("gaussian", "l2"): gaussian,
        ("uniform", "l2"): 0.25 * in_the_ball(shape, seed),
    }  # fmt: skip
    for (kind, norm), truth in truths.items():
        made = operators.start_noise(images, torch.tensor([seed]), eps=0.25, kind=kind, norm=norm)
        torch.testing.assert_close(made.double(), 0.5 + truth, rtol=0, atol=6e-8)
    # Projected: an element on [-eps, eps], an image's norm on eps.
    made = operators.start_noise(images, torch.tensor([seed]), eps=5e-4, kind="gaussian") - 0.5
    torch.testing.assert_close(made.double(), gaussian.clamp(-5e-4, 5e-4), rtol=0, atol=6e-8)
    made = operators.start_noise(images, torch.tensor([seed]), eps=5e-3, kind="gaussian", norm="l2") - 0.5
    torch.testing.assert_close(attacks.l2_norms(made), torch.full((shape[0], 1, 1, 1), 5e-3), rtol=1e-3, atol=0)


def test_what_is_refused():
    x_adv, gradient, images = batch()
    logits, labels, _ = some_logits()
    with pytest.raises(UserError, match="^norm is 'l1', but must be one of linf, l2"):
        operators.pgd_step(x_adv, gradient, images, eps=EPS, step_size=STEP, norm="l1")
    with pytest.raises(UserError, match="^kind is 'bce'"):
        operators.label_head(logits, labels, "bce")
    with pytest.raises(UserError, match="^kind is 'normal'"):
        operators.start_noise(images, torch.tensor([1]), eps=EPS, kind="normal")


# -- as operators ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", list(calls()), ids=lambda call: call[0])
def test_opcheck(call):
    name, arguments = call
    torch.library.opcheck(getattr(torch.ops.fastanchor, name).default, arguments)


def test_compiled_without_a_break():
    store, index, offsets, mirrored = some_store()
    x_adv, gradient, images = batch(memory_format=torch.channels_last)
    logits, labels, clean = some_logits()
    seed = torch.tensor([5])

    def everything(x_adv, gradient, images, logits, labels, clean, store, index, offsets, mirrored, seed):
        return (
            operators.pgd_step(x_adv + 0.0, gradient * 2, images, eps=EPS, step_size=STEP) * 1.0,
            operators.augment(store, offsets, mirrored, index=index, pad=2) + 1,
            operators.label_head(logits * 1.5, labels, "cw")[1] * 2,
            operators.kl_head(logits * 1.5, clean)[1] * 2,
            operators.start_noise(images, seed, eps=EPS) - images,
        )

    arguments = (x_adv, gradient, images, logits, labels, clean, store, index, offsets, mirrored, seed)
    compiled = torch.compile(everything, backend="aot_eager", fullgraph=True)
    for ours, truth in zip(compiled(*arguments), everything(*arguments), strict=True):
        assert torch.equal(ours, truth) and ours.stride() == truth.stride()


# -- the CUDA implementation on interpreted kernels -----------------------------------------------------------------------------


@pytest.mark.parametrize("call", list(calls()), ids=lambda call: call[0])
def test_kernels_return_what_the_fakes_promise(call):
    name, arguments = call
    expected = flat(getattr(torch.ops.fastanchor, name)(*arguments))
    with kernels_on_cpu():
        found = flat(getattr(torch.ops.fastanchor, name)(*arguments))
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.shape, ours.dtype, ours.stride()) == (theirs.shape, theirs.dtype, theirs.stride())
        # bf16: the interpreter truncates where a GPU rounds. Noise: as in its check.
        tolerance = {"rtol": 2**-7, "atol": 1e-6} if ours.dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 2e-6}
        torch.testing.assert_close(ours, theirs, **tolerance)


def test_odd_layouts_are_brought_into_one():
    x_adv, gradient, images = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in batch())
    labels = torch.tensor([0, 1, 0, 2, 0, 3])[::2]
    logits = some_logits(4, 3)[0].T.contiguous().T
    expected = (
        operators.pgd_step(x_adv, gradient, images, eps=0.5, step_size=0.1, norm="l2"),
        *operators.label_head(logits, labels),
    )
    with kernels_on_cpu():
        found = (
            operators.pgd_step(x_adv, gradient, images, eps=0.5, step_size=0.1, norm="l2"),
            *operators.label_head(logits, labels),
        )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        assert ours.is_contiguous() and theirs.is_contiguous()


@pytest.mark.parametrize("name", operators.CHECKS)
def test_checks_pass_and_find_a_wrong_kernel(name, monkeypatch):
    with kernels_on_cpu():
        operators.CHECKS[name](CPU)
        module, launcher = LAUNCHERS[name]
        real = getattr(module, launcher)

        def wrong(*arguments, **options):
            results = real(*arguments, **options)
            found = flat(results)[-1]
            found[(0,) * found.ndim] += 0.02
            return results

        monkeypatch.setattr(module, launcher, wrong)
        with pytest.raises(AssertionError, match="close|equal"):
            operators.CHECKS[name](CPU)


def test_limits_are_those_of_the_kernels():
    assert (operators.MAX_CLASSES, operators.HEADS, operators.NOISES) == (heads.MAX_CLASSES, heads.KINDS, noise.KINDS)
    assert operators.heads_take(torch.empty(3, 4096)) and not operators.heads_take(torch.empty(3, 4097))
    assert not operators.heads_take(torch.empty(3, 1))


# -- the decision ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch):
    """No verdicts yet, no word from the environment, and every device passes for one that kernels run on."""
    monkeypatch.setattr(verified, "_known", {})
    monkeypatch.delenv(verified.SWITCH, raising=False)
    monkeypatch.setattr(operators, "usable", lambda device: (True, "usable"))


def test_a_cpu_uses_plain_torch_unless_asked(monkeypatch):
    monkeypatch.delenv(verified.SWITCH, raising=False)
    assert operators.decide("augment", "auto", CPU) == (False, "Triton kernels need a CUDA device, this is cpu")
    assert operators.decide("augment", "on", CPU)[0]
    assert operators.decide("augment", "off", CPU) == (False, "kernels = off")
    monkeypatch.setenv(verified.SWITCH, "unchecked")
    assert not operators.decide("augment", "auto", CPU)[0]


def test_kernels_are_used_once_they_have_agreed(fresh, monkeypatch):
    asked = []
    monkeypatch.setitem(operators.CHECKS, "augment", lambda device: asked.append(device))
    for _ in range(2):
        assert operators.decide("augment", "auto", CPU) == (True, "checked against the reference on this device")
    assert asked == [CPU]


def test_kernels_that_disagree_are_not_used(fresh, monkeypatch):
    monkeypatch.setattr(pgd, "pgd_step", lambda x_adv, *arguments: x_adv)
    with kernels_on_cpu():
        with pytest.warns(RuntimeWarning, match="the kernels for pgd_step_linf are not used on cpu"):
            good, reason = operators.decide("pgd_step_linf", "auto", CPU)
        assert not good and "AssertionError" in reason
        assert operators.decide("label_head_cw", "auto", CPU)[0]
        with pytest.raises(UserError, match="^kernels = on: pgd_step_linf: check against the reference failed"):
            # A CPU runs plain torch when it is on: another device's name, whose verdict is the same.
            monkeypatch.setitem(verified._known, ("pgd_step_linf", torch.device("meta")), (good, reason))
            operators.decide("pgd_step_linf", "on", torch.device("meta"))


def test_on_where_kernels_do_not_run_is_an_error(monkeypatch):
    monkeypatch.setattr(operators, "usable", lambda device: (False, "compute capability 7.0 is below 8.0"))
    with pytest.raises(UserError, match="^kernels = on: augment: compute capability 7.0 is below 8.0$"):
        operators.decide("augment", "on", torch.device("cuda", 0))
