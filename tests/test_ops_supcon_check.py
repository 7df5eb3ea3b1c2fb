"""Which backend computes a loss and why: what `auto` asks of the kernels on a CUDA device, and the check before they are trusted."""

import pytest
import torch

pytest.importorskip("triton")

from fastanchor.kernels import supcon as kernel_module
from fastanchor.kernels import supcon_launch, supcon_pairs
from interpreter import interpreted

from fastanchor import doctor, ops
from fastanchor.errors import UserError
from fastanchor.losses import HardSupConLoss, SupConLoss
from fastanchor.losses import hard_supcon as losses
from fastanchor.ops import supcon, supcon_check, verified
from fastanchor.reference.hard_supcon import hard_supcon

CPU = torch.device("cpu")
LABELS = torch.tensor([0, 0, 1, 1])


class OnCuda(torch.Tensor):
    """A CPU tensor that says it is on a CUDA device."""

    is_cuda = property(lambda self: True)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(verified, "_known", {})
    monkeypatch.delenv("FASTANCHOR_KERNELS", raising=False)


@pytest.fixture
def checks(monkeypatch):
    """As on a CUDA device whose kernels agree with the reference; the variants that were checked."""
    monkeypatch.setattr(supcon, "_asked_once", lambda device: (True, "as on CUDA"))
    found = []
    monkeypatch.setattr(supcon_check.Variant, "check", lambda self, device: found.append(self))
    return found


# ---------------------------------------------------------------- which backend


def test_without_cuda_auto_is_torch_and_says_why():
    assert losses.choose_backend("auto", torch.zeros(4, 8))[0] == "torch"
    assert supcon.serves(torch.zeros(4, 8)) == (False, "Triton kernels need a CUDA device, this is cpu")


@pytest.mark.parametrize(
    "options",
    [
        {}, {"weight": "topk"}, {"denominator": "pairwise"}, {"hard_negative_beta": 1.0}, {"temperature": 0.01},
        {"reduction": "none"}, {"selection": "leaking"}, {"beta": torch.tensor(2.0)}, {"precision": "ieee"},
        {"ref_embeddings": torch.zeros(4, 8, requires_grad=True)}, {"instances": LABELS}, {"positive_coef": torch.eye(2)},
        HardSupConLoss().options,
    ],
)  # fmt: skip
def test_auto_takes_the_kernels_where_they_cover_the_options(options, checks):
    assert losses.choose_backend("auto", torch.zeros(4, 8), **options)[0] == "triton"
    assert len(checks) == 1


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"embeddings": torch.zeros(4, 8, dtype=torch.float64)}, "compute in fp32"),
        ({"ref_embeddings": torch.zeros(4, 8, dtype=torch.float64)}, "compute in fp32"),
        ({"embeddings": torch.zeros(4, 600)}, "the kernels hold at most 512 features"),
        ({"beta": -50.0}, r"exp weights need \|beta\| <= 40 in fp32, this is -50.0"),
        ({"beta": torch.tensor(1.0, device="meta")}, "beta is on meta, the embeddings are on cpu"),
        ({"temperature": 1e-4}, "temperature >= 0.001"),
        ({"beta": torch.tensor(1.0, requires_grad=True), "detach_weights": False}, "beta requires a gradient"),
        ({"positive_coef": torch.eye(2).requires_grad_(), "detach_weights": False}, "positive_coef requires a gradient"),
    ],
)
def test_auto_takes_torch_where_they_do_not(options, reason, checks):
    options = {"embeddings": torch.zeros(4, 8)} | options
    assert losses.choose_backend("auto", **options)[0] == "torch" and not checks
    with pytest.raises(AssertionError, match=reason):
        served, why = supcon.serves(**options)
        assert served, why


def test_a_number_that_changes_starts_no_new_check(checks):
    for step, n in ((1, 4), (2, 700)):
        for options in ({"beta": 0.1 * step, "temperature": 0.1 * step, "scale": step, "k": step, "gamma": step},):
            assert supcon.serves(torch.zeros(n, 120 + step), **options)[0]
    assert len(checks) == 1
    for n, d, options in (
        (4, 64, {}), (5000, 128, {}), (4, 128, {"precision": "tf32"}), (4, 128, {"beta": torch.tensor(1.0)}),
        (4, 128, {"weight": "topk", "k": 2}), (4, 128, {"weight": "topk", "k": 3}), (4, 128, {"temperature": 0.02}),
        (4, 128, {"detach_weights": False}), (4, 128, {"anchors": [1]}), (4, 128, {"selection": "hard"}),
        (4, 128, {"ref_embeddings": torch.zeros(4, 128)}),
        (4, 128, {"ref_embeddings": torch.zeros(4, 128, requires_grad=True)}),
    ):  # fmt: skip
        before = len(checks)
        assert supcon.serves(torch.zeros(n, d), **options)[0]
        assert len(checks) == before + 1, (n, d, options)
    assert len({variant.name for variant in checks}) == len(checks)
    assert [variant.many_rows for variant in checks].count(True) == 1


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize(
    "losses_", [[HardSupConLoss(temperature=t) for t in (0.1, 0.2, 0.02)], [HardSupConLoss(scale=s) for s in (1, 2, 3)]]
)
def test_numbers_and_sizes_that_change_in_one_compiled_graph(losses_, dynamic, checks):
    """To torch.compile a number or a size that has changed is a symbol, which no answer about kernels may depend on."""
    torch._dynamo.reset()
    step = torch.compile(lambda loss, x, y: loss(x, y), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    rows, labels = torch.randn(40, 8), torch.arange(40) % 5
    for loss, n in zip(losses_, (40, 30, 20), strict=True):
        assert torch.equal(step(loss, rows[:n], labels[:n]), hard_supcon(rows[:n], labels[:n], **_options(loss)))
    assert checks


def _options(loss):
    return {name: value for name, value in loss.options.items() if name != "precision"}


def test_a_check_that_fails_leaves_torch_with_one_warning(monkeypatch, checks):
    def fail(self, device):
        raise AssertionError("gradient of random embeddings is off by 2.0e-01, 1.7e-03 is allowed")

    monkeypatch.setattr(supcon_check.Variant, "check", fail)
    loss, rows = HardSupConLoss(), torch.randn(4, 8)
    with pytest.warns(RuntimeWarning, match="hard-positive SupCon of 16 features .*off by 2.0e-01") as said:
        found = [loss(rows, LABELS) for _ in range(3)]
    assert len(said) == 1
    torch.testing.assert_close(found[2], hard_supcon(rows, LABELS), rtol=0, atol=0)


def test_the_environment_switches_kernels(monkeypatch, checks):
    rows = torch.zeros(4, 8)
    monkeypatch.setenv("FASTANCHOR_KERNELS", "off")
    assert supcon.serves(rows) == (False, "FASTANCHOR_KERNELS=off")
    monkeypatch.setenv("FASTANCHOR_KERNELS", "unchecked")
    assert supcon.serves(rows) == (True, "FASTANCHOR_KERNELS=unchecked")
    monkeypatch.setenv("FASTANCHOR_KERNELS", "maybe")
    with pytest.raises(UserError, match="FASTANCHOR_KERNELS is 'maybe'"):
        HardSupConLoss()(rows, LABELS)
    assert not checks


def test_asking_for_the_kernels_gets_them_checked_or_the_reason(monkeypatch, checks):
    asked = []
    monkeypatch.setattr(ops, "hard_supcon", lambda *a, **k: asked.append(k))
    rows = torch.zeros(4, 8).as_subclass(OnCuda)
    HardSupConLoss(backend="triton", anchors=1)(rows, LABELS, views=LABELS)
    assert len(checks) == 1 and asked[0]["anchors"].tolist() == [False, False, True, True] and asked[0]["precision"] == "fp16"
    for options, message in (
        ({"beta": 60.0}, r"backend is 'triton', but exp weights need \|beta\| <= 40"),
        ({"temperature": 1e-4}, "backend is 'triton', but fp32 needs temperature >= 0.001"),
    ):
        with pytest.raises(UserError, match=message):
            HardSupConLoss(**options, backend="triton")(rows, LABELS)
    monkeypatch.setenv("FASTANCHOR_KERNELS", "off")
    with pytest.raises(UserError, match="backend is 'triton', but FASTANCHOR_KERNELS=off"):
        HardSupConLoss(backend="triton")(rows, LABELS)
    assert len(asked) == 1


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize(
    ("options", "inputs", "message"),
    [
        ({}, {"embeddings": torch.zeros(4)}, "embeddings is"),
        ({}, {"labels": torch.zeros(3, dtype=torch.long)}, "labels is"),
        ({}, {"labels": LABELS.to("meta")}, "labels is on meta, embeddings on cpu: must be on one device"),
        ({}, {"ref_emb": torch.zeros(4, 7), "ref_labels": LABELS}, "ref_embeddings has 7 columns"),
        ({}, {"ref_labels": LABELS}, "ref_labels is given without ref_embeddings"),
        ({"positive_coef": [[1.0]]}, {}, "views"),
        ({"positive_coef": torch.ones(1, 1, device="meta")}, {"views": LABELS}, "positive_coef is on meta, views on cpu"),
        ({"anchors": 1}, {}, "anchors is 1"),
        ({"selection": "hard"}, {}, "selection is 'hard', but predictions"),
    ],
)
def test_the_kernels_get_only_what_was_checked(backend, options, inputs, message, monkeypatch, checks):
    monkeypatch.setattr(ops, "hard_supcon", lambda *a, **k: pytest.fail("reached the kernels"))
    inputs = {"embeddings": torch.zeros(4, 8), "labels": LABELS} | inputs
    inputs["embeddings"] = inputs["embeddings"].as_subclass(OnCuda)
    with pytest.raises(UserError, match=message):
        HardSupConLoss(**options, backend=backend)(**inputs)


def test_a_gradient_that_the_operator_cannot_give_is_refused_on_a_cpu_too():
    beta = torch.tensor(1.0, requires_grad=True)
    with pytest.raises(UserError, match="backend is 'triton', but beta requires a gradient"):
        HardSupConLoss(beta=beta, detach_weights=False, backend="triton")(torch.randn(4, 8), LABELS)
    HardSupConLoss(beta=beta, detach_weights=False)(torch.randn(4, 8), LABELS).backward()
    assert beta.grad is not None


# ---------------------------------------------------------------- what runs on CUDA


@pytest.mark.parametrize("reduction", ["mean_valid", "none"])
@pytest.mark.parametrize("keys", [False, True])
def test_the_cuda_implementation_launches_the_kernels(reduction, keys):
    """Called by name, as no CUDA tensor is at hand to be dispatched on."""
    g = torch.Generator().manual_seed(0)
    u, y, v = torch.randn(40, 12, generator=g), torch.arange(40) % 3, torch.arange(40) % 2
    other = torch.randn(30, 12, generator=g) if keys else None
    tensors = dict.fromkeys(supcon.TENSORS) | {
        "views": v,
        "positive_coef": torch.tensor([[1.0, 0.5], [1.0, 0.0]]),
        "anchors": v < 1,
    }
    if keys:
        tensors |= {"ref_labels": y[:30], "ref_views": v[:30]}
    options = supcon.SETTINGS | {"precision": "ieee", "reduction": reduction, "detach_weights": False, "scale": 0.5}
    upstream = torch.rand(40, generator=g) if reduction == "none" else None
    arguments = (u, other, y, 0.0, torch.tensor(1.5), *tensors.values(), *options.values(), upstream)
    with interpreted(kernel_module, supcon_pairs):
        ours = supcon._on_cuda(*arguments, True, keys)
        without = supcon._on_cuda(*arguments[:-1], None, False, False)
        keys_only = supcon._on_cuda(*arguments, False, True) if keys else None
    expected = supcon._on_cpu(*arguments, True, keys)
    for got, want in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(without[0], ours[0])
    assert without[1].numel() == without[2].numel() == 0
    if keys:
        assert keys_only[1].numel() == 0
        torch.testing.assert_close(keys_only[2], ours[2])


def test_limits_are_those_of_the_launcher():
    from fastanchor.reference.checks import PRECISIONS

    assert PRECISIONS == supcon_launch.PRECISIONS
    assert supcon_launch.Options() == supcon_launch.Options(**supcon.SETTINGS)


# ---------------------------------------------------------------- the check itself


def variant(
    n_features=32, many_rows=False, keys="own", beta_tensor=False, views=False, instances=False, anchors=False, **settings
):
    found, reason = supcon._covers(
        CPU, torch.float32, n_features, many_rows=many_rows, keys=keys, beta_tensor=beta_tensor, views=views, instances=instances,
        anchors=anchors, **supcon.SETTINGS | settings,
    )  # fmt: skip
    assert found, reason
    return found


VARIANTS = [
    {}, {"detach_weights": False, "beta_tensor": True}, {"weight": "topk", "k": 5}, {"weight": "pow", "precision": "tf32"},
    {"denominator": "pairwise", "normalizer": "count"}, {"denominator": "negatives", "hard_negative_beta": 2.0},
    {"views": True, "instances": True}, {"keys": "with gradient", "reduction": "none"}, {"keys": "given", "views": True},
    {"temperature": 0.01, "precision": "ieee"}, {"selection": "leaking", "anchors": True}, {"detach_keys": True, "n_features": 16},
]  # fmt: skip


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_kernels_that_are_right_pass(options):
    with interpreted(kernel_module, supcon_pairs):
        variant(**options).check(CPU)


@pytest.mark.parametrize("options", [{}, {"reduction": "none", "instances": True}, {"keys": "with gradient"}], ids=str)
def test_many_rows_are_checked_without_an_n_by_n_matrix(options, monkeypatch):
    """4,200 rows take the interpreter too long; what is checked of them is the same with 300."""
    monkeypatch.setattr(supcon_check, "MANY_ROWS", 300)
    sizes = []
    real = supcon_check.reference
    monkeypatch.setattr(supcon_check, "reference", lambda u, **k: sizes.append((len(u), k["ref_embeddings"])) or real(u, **k))
    large = variant(many_rows=True, **options)
    with interpreted(kernel_module, supcon_pairs):
        large.check(CPU)
    assert len(sizes) == 6  # three cases, truth and yardstick
    assert all(keys is not None and (n == 130) == (len(keys) == 300) for n, keys in sizes[4:])


def test_few_anchors_among_many_rows_are_the_dense_loss():
    """The truth of that case, against the reference with an anchor mask."""
    case = variant(many_rows=True, instances=True, reduction="none")._case("many rows", 300, 8, 1.0, seed=3, few_anchors=True)
    x = case.u.double().requires_grad_()
    rows, keys, tensors = supcon_check._few_anchors(x, case.few, case.tensors)
    ours = hard_supcon(rows, ref_embeddings=keys, reduction="none", **tensors)
    dense = hard_supcon(x, reduction="none", **case.tensors)
    torch.testing.assert_close(ours, dense[case.few], rtol=1e-12, atol=1e-14)
    assert not dense[~case.tensors["anchors"]].any()
    (got,), (want,) = torch.autograd.grad(ours.sum(), x), torch.autograd.grad(dense.sum(), x)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("wrong", ["loss", "gradient", "not a number", "last row", "keys"])
def test_kernels_that_are_wrong_are_found(wrong, monkeypatch):
    real = supcon_launch.loss_and_grad

    def broken(embeddings, *arguments, **options):
        loss, grad, ref_grad = real(embeddings, *arguments, **options)
        if wrong == "loss":
            loss = loss * 1.0005
        elif wrong == "gradient":
            grad = grad * 1.01
        elif wrong == "not a number":
            grad = grad.index_fill(0, torch.tensor(3), torch.nan)
        elif wrong == "last row":
            grad = grad.index_fill(0, torch.tensor(len(grad) - 1), 0.0)
        else:
            ref_grad = ref_grad * 0.99
        return loss, grad, ref_grad

    monkeypatch.setattr(supcon_launch, "loss_and_grad", broken)
    named = {"loss": "loss of random embeddings", "keys": "gradient of the keys of random"}.get(
        wrong, "gradient of random embeddings"
    )
    with interpreted(kernel_module, supcon_pairs), pytest.raises(AssertionError, match=f"^{named}.* is off by .* is allowed$"):
        variant(keys="with gradient").check(CPU)


# ---------------------------------------------------------------- what people see


def test_doctor_says_which_and_why(monkeypatch, checks):
    rows = {row["part"]: row for row in doctor.backends(CPU)}
    assert rows["hard-positive SupCon"]["backend"] == "triton"
    assert rows["hard-positive SupCon"]["why"].startswith("checked against the reference on this device")
    assert checks[0].beta_tensor and checks[0].width == 128
    assert rows["attack's kernels"]["backend"] == "torch" and "need a CUDA device" in rows["attack's kernels"]["why"]
    monkeypatch.setenv("FASTANCHOR_KERNELS", "off")
    row = next(row for row in doctor.backends(CPU) if row["part"] == "hard-positive SupCon")
    assert row == {
        "part": "hard-positive SupCon", "backend": "torch", "why": "dense reference implementation; FASTANCHOR_KERNELS=off",
    }  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_kernels_pass_on_this_device(options):
    variant(**options).check(torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"keys": "with gradient"}, {"reduction": "none"}], ids=str)
def test_kernels_pass_on_this_device_with_many_rows(options):
    variant(n_features=128, many_rows=True, **options).check(torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("loss", [HardSupConLoss(), HardSupConLoss(reduction="none"), SupConLoss(0.2)])
def test_auto_is_the_kernels_on_cuda_and_agrees_with_torch(loss):
    generator = torch.Generator().manual_seed(0)
    u, y = torch.randn(200, 128, generator=generator).cuda(), (torch.arange(200) % 10).cuda()
    assert losses.choose_backend("auto", u, **loss.options)[0] == "triton"
    found = []
    for backend in ("auto", "torch"):
        loss.backend = backend
        x = u.clone().requires_grad_()
        value = loss(x, y)
        value.sum().backward()
        found.append((value.detach(), x.grad))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-3, atol=1e-4)
    assert (found[0][1] - found[1][1]).norm() < 5e-3 * found[1][1].norm()
