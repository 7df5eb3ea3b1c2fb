"""The fused PGD step and start noise, run by Triton's interpreter, against the reference, the engine's own step and plain Philox."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

pytest.importorskip("triton")

from fastanchor.kernels import noise, pgd
from interpreter import interpreted

from fastanchor.attacks.engine import ascend_once
from fastanchor.reference import attacks as reference

EPS, STEP = 8 / 255, 2 / 255
FORMATS = (torch.contiguous_format, torch.channels_last)


@pytest.fixture(autouse=True)
def on_the_interpreter():
    with interpreted(pgd, noise):
        yield


def batch(*shape, seed=0, memory_format=torch.contiguous_format):
    """x_adv in the linf ball of EPS around images, and a gradient with zeros among its values."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(shape, generator=generator)
    x_adv = (images + EPS * (2 * torch.rand(shape, generator=generator) - 1)).clamp(0, 1)
    gradient = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) > 0.1)
    return [x.contiguous(memory_format=memory_format) for x in (x_adv, gradient, images)]


def engine_step(x_adv, gradient, images, eps, step_size):
    """What `attacks.engine.ascend_once` makes of a network whose gradient is `gradient`."""
    bounds = ((images - eps).clamp_(0, 1), (images + eps).clamp_(0, 1))
    labels = torch.zeros(len(images), dtype=torch.int64)

    def network(x):
        return (x * gradient).flatten(1).sum(1, keepdim=True)

    return ascend_once(network, lambda logits, labels: logits[:, 0], (), x_adv, labels, images, bounds, eps, step_size)


shapes = st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 17), st.integers(1, 17))


@settings(max_examples=25)
@given(shape=shapes, memory_format=st.sampled_from(FORMATS), eps=st.sampled_from([0.0, EPS, 0.5, 2]), seed=st.integers(0, 99))
def test_the_linf_step_is_the_engines_to_the_bit_and_the_references_to_rounding(shape, memory_format, eps, seed):
    x_adv, gradient, images = batch(*shape, seed=seed, memory_format=memory_format)
    out = pgd.pgd_step(x_adv, gradient, images, eps, STEP)
    assert torch.equal(out, engine_step(x_adv, gradient, images, eps, STEP))
    x, g, i = (t.double() for t in (x_adv, gradient, images))
    truth = reference.project(reference.ascend(x, g, STEP, "linf"), i, eps, "linf")
    torch.testing.assert_close(out.double(), truth, rtol=0, atol=1.2e-7)
    assert out.stride() == x_adv.stride()


@settings(max_examples=25)
@given(
    shape=shapes, memory_format=st.sampled_from(FORMATS), eps=st.sampled_from([0.0, 0.05, 0.5]),
    scale=st.sampled_from([1e-30, 1e-13, 1e-6, 1.0, 1e6]), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_l2_step_is_the_references(shape, memory_format, eps, scale, seed):
    x_adv, gradient, images = batch(*shape, seed=seed, memory_format=memory_format)
    gradient = gradient * scale
    x, g, i = (t.double() for t in (x_adv, gradient, images))
    truth = reference.project(reference.ascend(x, g, 0.1, "l2"), i, eps, "l2")
    out = pgd.pgd_step(x_adv, gradient, images, eps, 0.1, "l2")
    torch.testing.assert_close(out.double(), truth, rtol=0, atol=3e-7)


def test_l2_norms_span_the_blocks_of_an_image():
    x_adv, gradient, images = batch(3, 3, 64, 65)  # 7 blocks an image, the last one cut
    x, g, i = (t.double() for t in (x_adv, gradient, images))
    truth = reference.project(reference.ascend(x, g, 0.4, "l2"), i, 0.5, "l2")
    out = pgd.pgd_step(x_adv, gradient, images, 0.5, 0.4, "l2")
    torch.testing.assert_close(out.double(), truth, rtol=0, atol=3e-7)
    assert torch.equal(out, pgd.pgd_step(x_adv, gradient, images, 0.5, 0.4, "l2"))


def test_many_steps_stay_with_the_reference_in_both_norms():
    for norm, eps, step in (("linf", EPS, STEP), ("l2", 0.5, 0.125)):
        x_adv, _, images = batch(4, 3, 8, 8)
        truth = x_adv = reference.project(x_adv, images, eps, norm)
        for seed in range(10):
            _, gradient, _ = batch(4, 3, 8, 8, seed=seed)
            x_adv = pgd.pgd_step(x_adv, gradient, images, eps, step, norm)
            truth = reference.project(reference.ascend(truth, gradient, step, norm), images, eps, norm)
        torch.testing.assert_close(x_adv, truth, rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_in_place_with_a_bf16_gradient_and_a_bf16_copy(norm):
    x_adv, gradient, images = batch(4, 3, 9, 9, memory_format=torch.channels_last)
    gradient = gradient.bfloat16()
    truth = pgd.pgd_step(x_adv, gradient.float(), images, EPS, STEP, norm)
    low = torch.full_like(x_adv, 9, dtype=torch.bfloat16)
    out = pgd.pgd_step(x_adv, gradient, images, EPS, STEP, norm, out=x_adv, low=low)
    assert out is x_adv and torch.equal(out, truth)
    # The interpreter truncates where a GPU rounds: one unit of bf16's 8 bits.
    torch.testing.assert_close(low.float(), truth, rtol=2**-7, atol=0)


def test_signs_of_what_is_no_number():
    """torch.sign: 0 for NaN and both zeros; torch.clamp: NaN stays NaN."""
    gradient = torch.tensor([float("nan"), 0.0, -0.0, float("inf"), -float("inf"), 1e-45, 1.0, 1.0]).view(1, 1, 2, 4)
    x_adv = torch.full_like(gradient, 0.5)
    images = x_adv.clone()
    x_adv[..., 1, 2], images[..., 1, 3] = float("nan"), float("nan")
    out = pgd.pgd_step(x_adv, gradient, images, EPS, STEP)
    expected = engine_step(x_adv, gradient, images, EPS, STEP)
    assert torch.equal(out.isnan(), expected.isnan()) and torch.equal(out.nan_to_num(7), expected.nan_to_num(7))
    moved = (out - 0.5).sign().flatten()[:6]
    assert moved.tolist() == [0, 0, 0, 1, -1, 1]


def test_a_nan_gradient_loses_its_image_and_no_other_in_l2():
    x_adv, gradient, images = batch(3, 3, 4, 4)
    gradient[1, 0, 0, 0] = float("nan")
    out = pgd.pgd_step(x_adv, gradient, images, 0.5, 0.1, "l2")
    assert torch.equal(out.isnan(), reference.project(reference.ascend(x_adv, gradient, 0.1, "l2"), images, 0.5, "l2").isnan())
    assert out.isnan().flatten(1).all(1).tolist() == [False, True, False]


def test_zero_and_infinite_gradient_norms_in_l2_do_not_move():
    x_adv, gradient, images = batch(2, 3, 4, 4)
    gradient[0], gradient[1] = 0, 1e30  # whose square is infinite
    # A ball that x_adv just fits in: a step thought to be longer than 0 would draw it back.
    for i in range(2):
        eps = 1.001 * (x_adv[i] - images[i]).norm().item()
        out = pgd.pgd_step(x_adv[i : i + 1], gradient[i : i + 1], images[i : i + 1], eps, 0.1, "l2")
        torch.testing.assert_close(out, x_adv[i : i + 1], rtol=0, atol=1.2e-7)


def test_what_a_step_refuses():
    x_adv, gradient, images = batch(2, 3, 4, 4)
    last = gradient.contiguous(memory_format=torch.channels_last)
    for changed, message in (
        ({"gradient": last}, "gradient has strides .* same memory format"),
        ({"gradient": gradient[:1]}, "gradient has shape"),
        ({"gradient": gradient.double()}, "gradient is torch.float64"),
        ({"x_adv": x_adv.bfloat16()}, "x_adv is torch.bfloat16"),
        ({"x_adv": x_adv[:, :, ::2], "gradient": gradient[:, :, ::2], "images": images[:, :, ::2]}, "must be dense"),
        ({"out": last}, "out has strides"),
        ({"low": x_adv}, "low is torch.float32"),
        ({"norm": "l1"}, "norm = 'l1'"),
    ):
        arguments = {"x_adv": x_adv, "gradient": gradient, "images": images, "eps": EPS, "step_size": STEP} | changed
        with pytest.raises(ValueError, match=message):
            pgd.pgd_step(**arguments)
    # Another order of dimensions is dense as well, but its images are not contiguous.
    swapped = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (x_adv, gradient, images)]
    with pytest.raises(ValueError, match="outermost"):
        pgd.pgd_step(*swapped, EPS, STEP, "l2")
    # Where a dimension is 1 both formats are the same memory, whatever the strides say.
    grey = [x[:, :1].contiguous() for x in (x_adv, gradient, images)]
    mixed = [grey[0], grey[1].contiguous(memory_format=torch.channels_last), grey[2]]
    assert torch.equal(pgd.pgd_step(*mixed, EPS, STEP), pgd.pgd_step(*grey, EPS, STEP))


# --- start noise ---------------------------------------------------------------------------------------------------------------


def philox(counter, key):
    """Philox4x32-10 by Salmon et al. 2011, in plain Python integers of 64 bits: counter (n, 4), key (2,) -> (n, 4) uint32."""
    c, k = [counter[:, i].astype(np.uint64) for i in range(4)], [np.uint64(x) for x in key]
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        shift = np.uint64(32)
        c = [(b >> shift) ^ c[1] ^ k[0], b & low, (a >> shift) ^ c[3] ^ k[1], a & low]
        k = [(k[0] + np.uint64(0x9E3779B9)) & low, (k[1] + np.uint64(0xBB67AE85)) & low]
    return np.stack(c, 1).astype(np.uint32)


def words(shape, seed, stream=0):
    """The word that every element of (N, C, H, W) takes, by the docstring of `start_noise`."""
    n, c, h, w = np.meshgrid(*map(np.arange, shape), indexing="ij")
    counter = np.stack([(h * shape[3] + w).ravel(), n.ravel(), (c // 4).ravel(), np.full(n.size, stream)], 1)
    drawn = philox(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    return drawn[np.arange(n.size), (c % 4).ravel()].reshape(shape)


def test_the_plain_philox_is_philox():
    """Known answers that come with Random123."""
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    for counter, key, expected in (
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (pi, [0xA4093822, 0x299F31D0], [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ):
        assert philox(np.array([counter]), key)[0].tolist() == expected


@settings(max_examples=10)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 18), st.integers(1, 18)),
    memory_format=st.sampled_from(FORMATS), seed=st.sampled_from([0, 1, -1, 2**40 + 5]),
)  # fmt: skip
def test_uniform_noise_is_philox_by_logical_index(shape, memory_format, seed):
    images = torch.full(shape, 0.5).contiguous(memory_format=memory_format)
    out = noise.start_noise(images, 0.25, torch.tensor([seed]))
    unit = torch.from_numpy((words(shape, seed) >> 8).astype(np.float64) * 2.0**-24)
    torch.testing.assert_close(out.double(), 0.5 + 0.25 * (2 * unit - 1), rtol=0, atol=6e-8)
    assert out.stride() == images.stride()


@pytest.mark.parametrize("kind", noise.KINDS)
@pytest.mark.parametrize("norm", noise.NORMS)
def test_noise_is_a_function_of_the_seed_and_not_of_layout_or_blocks(kind, norm, monkeypatch):
    images = torch.rand(3, 5, 13, 11, generator=torch.Generator().manual_seed(0))
    first = noise.start_noise(images, 0.1, torch.tensor([7]), kind, norm)
    assert torch.equal(first, noise.start_noise(images, 0.1, torch.tensor([7]), kind, norm))
    last = noise.start_noise(images.contiguous(memory_format=torch.channels_last), 0.1, torch.tensor([7]), kind, norm)
    assert torch.equal(first, last)
    assert not torch.equal(first, noise.start_noise(images, 0.1, torch.tensor([8]), kind, norm))
    # A part of the batch draws what it draws in the whole.
    assert torch.equal(first[:2], noise.start_noise(images[:2], 0.1, torch.tensor([7]), kind, norm))
    monkeypatch.setattr(noise, "BLOCK", 64)
    # l2 norms are summed in another order then.
    torch.testing.assert_close(first, noise.start_noise(images, 0.1, torch.tensor([7]), kind, norm), rtol=0, atol=1.2e-7)


def test_distributions_of_the_noise(monkeypatch):
    monkeypatch.setattr(noise, "BLOCK", 1024)  # fewer programs to interpret
    images = torch.full((33, 3, 32, 32), 0.5)  # 101,376 samples, none of them at the box
    uniform = (noise.start_noise(images, 0.25, torch.tensor([3])) - 0.5) / 0.25
    assert stats.kstest(uniform.flatten().numpy(), "uniform", args=(-1, 2)).pvalue > 0.01
    normal = (noise.start_noise(images, 0.25, torch.tensor([3]), "gaussian").double() - 0.5) / 0.001
    # Around 0.5 a pixel has steps of 6e-8, 6e-5 of a standard deviation.
    assert stats.kstest(normal.flatten().numpy(), "norm").pvalue > 0.01
    for drawn in (uniform, normal.float()):
        rows = drawn.transpose(0, 1).flatten(1)
        # Channels come from words of one counter, images and seeds from others: none knows of another.
        assert torch.corrcoef(rows).fill_diagonal_(0).abs().max() < 4 / rows.shape[1] ** 0.5
    again = (noise.start_noise(images, 0.25, torch.tensor([4])) - 0.5) / 0.25
    assert torch.corrcoef(torch.stack([uniform.flatten(), again.flatten()]))[0, 1].abs() < 0.0126  # 4 / sqrt(101,376)


def normals(shape, seed):
    """Box and Muller on pairs of words, in fp64."""
    unit = words((shape[0], -(-shape[1] // 4) * 4, *shape[2:]), seed) >> 8
    unit = unit.astype(np.float64) * 2.0**-24
    radius = np.sqrt(-2 * np.log(1 - unit[:, 0::2]))
    pairs = np.stack([radius * np.cos(2 * np.pi * unit[:, 1::2]), radius * np.sin(2 * np.pi * unit[:, 1::2])], 2)
    return torch.from_numpy(pairs.reshape(unit.shape)[:, : shape[1]].copy())


def in_the_ball(shape, seed):
    """A normal direction, and the radius u^(1/d) of stream 1."""
    direction = normals(shape, seed).flatten(1)
    counter = np.stack([np.zeros(shape[0]), np.arange(shape[0]), np.zeros(shape[0]), np.ones(shape[0])], 1).astype(np.int64)
    unit = (philox(counter, (seed & 0xFFFFFFFF, seed >> 32))[:, 0] >> 8).astype(np.float64) * 2.0**-24
    radius = torch.from_numpy((1 - unit) ** (1 / direction.shape[1]))
    return (direction / direction.norm(dim=1, keepdim=True) * radius[:, None]).view(shape)


@pytest.mark.parametrize("shape", [(3, 3, 5, 7), (2, 6, 17, 19), (4, 1, 2, 2)])  # the second in several programs an image
def test_normals_and_the_l2_ball_are_what_the_docstring_says(shape):
    seed, images = 2**35 + 3, torch.full(shape, 0.5)
    gaussian = noise.start_noise(images, 0.25, torch.tensor([seed]), "gaussian").double() - 0.5
    torch.testing.assert_close(gaussian, 0.001 * normals(shape, seed), rtol=0, atol=4e-8)
    ball = noise.start_noise(images, 0.25, torch.tensor([seed]), "uniform", "l2").double() - 0.5
    torch.testing.assert_close(ball, 0.25 * in_the_ball(shape, seed), rtol=0, atol=1.2e-7)


def test_that_docstring_is_uniform_in_the_l2_ball():
    delta = in_the_ball((20_000, 1, 2, 2), 11).flatten(1)
    norms = delta.norm(dim=1)
    # In four dimensions the fraction of the ball within radius r is r^4.
    assert norms.max() <= 1 + 1e-12 and stats.kstest((norms**4).numpy(), "uniform").pvalue > 0.01
    directions = delta / norms[:, None]
    # A coordinate x of a uniform direction in four dimensions: (1 + x) / 2 is Beta(3/2, 3/2).
    for coordinate in directions.T:
        assert stats.kstest((coordinate.numpy() + 1) / 2, "beta", args=(1.5, 1.5)).pvalue > 0.01
    assert directions.T.corrcoef().fill_diagonal_(0).abs().max() < 4 / 20_000**0.5


@pytest.mark.parametrize("norm", noise.NORMS)
@pytest.mark.parametrize("kind", noise.KINDS)
def test_the_start_is_projected(kind, norm):
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).round()  # at the box on every side
    low = torch.empty_like(images, dtype=torch.bfloat16)
    eps = 5e-4  # below the gaussian's 0.001
    start = noise.start_noise(images, eps, torch.tensor([5]), kind, norm, low=low)
    assert start.min() >= 0 and start.max() <= 1
    delta = (start - images).double()
    size = delta.abs().max() if norm == "linf" else delta.flatten(1).norm(dim=1).max()
    assert 0.1 * eps < size <= eps * (1 + 1e-3)
    torch.testing.assert_close(low.float(), start, rtol=2**-7, atol=1e-38)
    # Before the box there is one draw, whatever the images are.
    free = noise.start_noise(torch.full_like(images, 0.5), eps, torch.tensor([5]), kind, norm) - 0.5
    torch.testing.assert_close(start, (images + free).clamp(0, 1), rtol=0, atol=1.2e-7)


def test_what_start_noise_refuses():
    images = torch.rand(2, 3, 4, 4)
    for arguments, message in (
        ((images, EPS, torch.tensor([1.0])), "seed is torch.float32"),
        ((images, EPS, torch.tensor([1, 2])), "seed has shape"),
        ((images, EPS, torch.tensor([1]), "zero"), "kind = 'zero'"),
        ((images, EPS, torch.tensor([1]), "uniform", "l1"), "norm = 'l1'"),
        ((images.double(), EPS, torch.tensor([1])), "images is torch.float64"),
        ((images.flatten(1), EPS, torch.tensor([1])), "images have shape"),
        ((images.transpose(2, 3), EPS, torch.tensor([1])), "contiguous or channels_last"),
    ):
        with pytest.raises(ValueError, match=message):
            noise.start_noise(*arguments)
