"""The attack alone, naive code beside the engine: `make bench` (pytest-benchmark), CPU figures.

`python -m bench.ladder` shows what each stage of the engine contributes.
"""

from __future__ import annotations

import functools

import pytest

from bench import cases
from bench.turns import CPU, not_installed, take_turns
from fastanchor.attacks import PGD
from fastanchor.data import views
from fastanchor.models import mac_count


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_attack(benchmark, sizes, precision):
    benchmark.group = f"attack, PGD-{sizes.steps}"
    numbers = {"eps": cases.EPS, "step_size": cases.STEP_SIZE, "steps": sizes.steps}
    images_u8, labels = cases.make_batch(sizes.batch, sizes.pixels, CPU)
    images = views.to_float(images_u8)
    noise = cases.make_noise(images)

    def peer(second_rung):
        model = cases.make_model(sizes.width, CPU, channels_last=second_rung)
        given, start = (images, noise) if second_rung else (images.contiguous(), noise.contiguous())
        return cases.make_naive_attack(model, given, labels, start, sizes.steps, bf16=second_rung)

    peers = {"naive": peer(False), "second_rung": peer(True)}
    left_out = not_installed(torchattacks="torchattacks")
    if not left_out:
        import torchattacks

        # No start can be given to it: it attacks the noisy images, which is the same work. fp32, BatchNorm in eval mode.
        model = cases.make_model(sizes.width, CPU, channels_last=False)
        attack = torchattacks.PGD(model, cases.EPS, cases.STEP_SIZE, sizes.steps, random_start=False)
        peers["torchattacks"] = functools.partial(attack, (images + noise).clamp(0, 1).contiguous(), labels)
    attack = PGD(**numbers, start=noise, precision=precision, check_inputs=False)
    engine = functools.partial(attack, cases.make_model(sizes.width, CPU), images, labels)
    # Each step: a forward and the input's gradient, 2 FLOPs a multiply-add.
    flops = 4 * sizes.steps * mac_count(cases.make_model(sizes.width, CPU), sizes.pixels)
    take_turns(
        benchmark, engine, peers, rounds=sizes.rounds, images=sizes.batch, flops=flops, precision=precision, left_out=left_out
    )
