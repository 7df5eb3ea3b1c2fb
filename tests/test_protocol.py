"""The grammar of evaluation attacks: defaults, options, messages, and what is printed and used as a file name."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastanchor.errors import UserError
from fastanchor.evaluate.protocol import GRAMMAR, AttackSpec, fraction, parse_attack

EPS = 8 / 255


def parse(text, eps=EPS):
    return parse_attack(text, default_eps=eps)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("pgd20", AttackSpec("pgd20", EPS, 2 / 255, 20, "ce", "uniform", 1, "linf")),
        ("pgd1", AttackSpec("pgd1", EPS, 2 / 255, 1)),
        (" pgd20: ", AttackSpec("pgd20", EPS, 2 / 255, 20)),
        ("cw100", AttackSpec("cw100", EPS, 2 / 255, 100, "cw", "uniform", 1, "linf")),
        ("fgsm", AttackSpec("fgsm", EPS, EPS, 1, "ce", "zero", 1, "linf")),
        ("autoattack", AttackSpec("autoattack", EPS, 2 / 255, 1)),
        ("pgd20:eps=0.031,step_size=0.003,restarts=2", AttackSpec("pgd20", 0.031, 0.003, 20, restarts=2)),
        ("pgd20:eps=4/255", AttackSpec("pgd20", 4 / 255, 1 / 255, 20)),
        ("pgd20:step-size=1/255, start=zero", AttackSpec("pgd20", EPS, 1 / 255, 20, start="zero")),
        ("cw20:norm=l2,eps=0.5", AttackSpec("cw20", 0.5, 0.125, 20, "cw", norm="l2")),
        ("fgsm:eps=0.1", AttackSpec("fgsm", 0.1, 0.1, 1, start="zero")),
        ("fgsm:start=uniform,step_size=10/255", AttackSpec("fgsm", EPS, 10 / 255, 1, start="uniform")),
        ("autoattack:eps=0.5,norm=l2", AttackSpec("autoattack", 0.5, 0.125, 1, norm="l2")),
        ("pgd20:eps=0", AttackSpec("pgd20", 0.0, 1e-8, 20)),
    ],
)
def test_defaults_and_options(text, expected):
    assert parse(text) == expected


@pytest.mark.parametrize(
    "text, message",
    [
        ("pdg20", f"attack 'pdg20': 'pdg20' is not known; did you mean 'pgd20'?; write {GRAMMAR}"),
        ("pgd", f"attack 'pgd': 'pgd' is not known; did you mean 'pgd20'?; write {GRAMMAR}"),
        ("pgd0", f"attack 'pgd0': 'pgd0' is not known; did you mean 'pgd20'?; write {GRAMMAR}"),
        ("pgd-5", f"attack 'pgd-5': 'pgd-5' is not known; did you mean 'pgd20'?; write {GRAMMAR}"),
        ("fgms", f"attack 'fgms': 'fgms' is not known; did you mean 'fgsm'?; write {GRAMMAR}"),
        ("", f"attack '': '' is not known; write {GRAMMAR}"),
        ("pgd20:epz=1", "attack 'pgd20:epz=1': 'epz=1' is not understood; did you mean 'eps'?; "
                        "allowed here: eps, step_size, restarts, start, norm"),
        ("pgd20:eps", "attack 'pgd20:eps': 'eps' is not understood; did you mean 'eps'?; "
                      "allowed here: eps, step_size, restarts, start, norm"),
        ("autoattack:restarts=2", "attack 'autoattack:restarts=2': 'restarts=2' is not understood; allowed here: eps, norm"),
        ("pgd20:eps=x", "attack 'pgd20:eps=x': eps = 'x' is not a number"),
        ("pgd20:eps=1/0", "attack 'pgd20:eps=1/0': eps = '1/0' is not a number"),
        ("pgd20:eps=", "attack 'pgd20:eps=': eps = '' is not a number"),
        ("pgd20:restarts=1.5", "attack 'pgd20:restarts=1.5': restarts = '1.5' is not a whole number"),
        ("pgd20:restarts=0", "attack 'pgd20:restarts=0': restarts = 0: must be >= 1"),
        ("pgd20:eps=-0.1", "attack 'pgd20:eps=-0.1': eps = -0.1: must be >= 0"),
        ("pgd20:eps=nan", "attack 'pgd20:eps=nan': eps = nan: must be >= 0"),
        ("pgd20:eps=inf", "attack 'pgd20:eps=inf': eps = inf: must be >= 0"),
        ("pgd20:step_size=0", "attack 'pgd20:step_size=0': step_size = 0: must be > 0"),
        ("pgd20:step_size=inf", "attack 'pgd20:step_size=inf': step_size = inf: must be > 0"),
        ("pgd20:start=gaussian", "attack 'pgd20:start=gaussian': start = 'gaussian': must be one of uniform, zero"),
        ("pgd20:norm=l1", "attack 'pgd20:norm=l1': norm = 'l1': must be one of linf, l2"),
    ],
)  # fmt: skip
def test_bad_attacks_are_one_sentence(text, message):
    with pytest.raises(UserError) as error:
        parse(text)
    assert str(error.value) == message


@pytest.mark.parametrize(
    "text, described",
    [
        ("pgd20", "PGD-20 (eps 8/255, step 2/255, uniform start, 1 restart)"),
        ("pgd20:eps=0.031,step_size=0.003,restarts=2", "PGD-20 (eps 0.031, step 0.003, uniform start, 2 restarts)"),
        ("pgd10:eps=0.1", "PGD-10 (eps 0.1, step 0.025, uniform start, 1 restart)"),
        ("cw20:start=zero", "CW-20 (eps 8/255, step 2/255, no random start, 1 restart)"),
        ("fgsm", "FGSM (eps 8/255, step 8/255, no random start, 1 restart)"),
        ("pgd20:norm=l2,eps=0.5", "PGD-20 (eps 0.5, step 0.125, uniform start, 1 restart, l2)"),
        ("pgd20:norm=l2,eps=1", "PGD-20 (eps 1, step 0.25, uniform start, 1 restart, l2)"),
        ("pgd20:eps=6/255", "PGD-20 (eps 6/255, step 0.005882, uniform start, 1 restart)"),
        ("autoattack", "AutoAttack standard (eps 8/255, linf)"),
        ("autoattack:eps=128/255,norm=l2", "AutoAttack standard (eps 128/255, l2)"),
        ("pgd20:eps=0", "PGD-20 (eps 0, step 1e-08, uniform start, 1 restart)"),
    ],
)
def test_describe(text, described):
    assert parse(text).describe() == described


@given(st.integers(1, 254))
def test_fractions_read_back(levels):
    assert fraction(levels / 255) == f"{levels}/255"
    assert fraction((levels + 0.3) / 255).count("/") == 0


sizes = st.one_of(st.integers(1, 64).map(lambda n: n / 255), st.floats(1e-8, 10))
specs = st.builds(
    AttackSpec, name=st.sampled_from(["pgd20", "pgd2", "cw20"]), eps=st.one_of(st.just(0.0), sizes), step_size=sizes,
    steps=st.just(20), start=st.sampled_from(["uniform", "zero"]), restarts=st.integers(1, 12), norm=st.sampled_from(["linf", "l2"]),
)  # fmt: skip


@given(specs, specs)
def test_keys_differ_where_attacks_differ(first, second):
    assert (first.key() == second.key()) == (first == second)
    assert not set(first.key()) & set('/\\:*?"<>| ')  # a file's name on every system


@given(specs, st.sampled_from(["eps", "step_size"]))
def test_the_smallest_difference_of_a_number_shows_in_the_key(spec, name):
    other = dataclasses.replace(spec, **{name: math.nextafter(getattr(spec, name), 1)})
    assert other.key() != spec.key()


def test_keys_are_readable():
    assert parse("pgd20").key() == "pgd20-linf-eps8_255-step2_255-uniform-x1"
    assert parse("pgd20:eps=0.031,step_size=0.003").key() == "pgd20-linf-eps0.031-step0.003-uniform-x1"
    assert parse("autoattack:eps=0.5,norm=l2").key() == "autoattack-l2-eps0.5"


@given(specs, sizes)
def test_with_eps_keeps_the_proportion(spec, eps):
    other = spec.with_eps(eps)
    assert other.eps == eps
    assert dataclasses.replace(other, eps=spec.eps, step_size=spec.step_size) == spec
    if spec.eps:
        assert other.step_size == pytest.approx(max(eps * spec.step_size / spec.eps, 1e-8), rel=1e-12)


@pytest.mark.parametrize("name, step", [("pgd20", 0.025), ("fgsm", 0.1)])
def test_with_eps_from_zero_takes_the_default_proportion(name, step):
    assert parse(name, eps=0.0).with_eps(0.1) == parse(name, eps=0.1)
    assert parse(name, eps=0.0).with_eps(0.1).step_size == step
    assert parse(name).with_eps(0.0).step_size > 0  # a step of 0 is no attack that PGD accepts


@given(specs)
def test_build_is_the_attack_of_the_specification(spec):
    attack = spec.build()
    assert (attack.eps, attack.step_size, attack.steps, attack.start, attack.norm) == (
        spec.eps, spec.step_size, spec.steps, spec.start, spec.norm,
    )  # fmt: skip
    assert (attack.bn, attack.precision, attack.restarts, attack.objective_name) == ("eval", "fp32", 1, "ce")


def test_build_of_cw_maximises_the_margin():
    assert parse("cw20").build().objective_name == "cw"
