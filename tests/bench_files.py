"""Small files as bench/ writes them, on a device that does not exist: for the tests of bench.schema, bench.plots, bench.record."""

import json

FAKE = "fake GPU"
CEILINGS = {"bf16_matmul": 4e14, "fp32_matmul": 4e13, "copy_bandwidth": 2.5e12}
ABOUT = {
    "fastanchor": "0.1.0", "commit": "0123456789ab", "command": "gpu.py --out /home/someone/runs/x", "python": "3.12.1",
    "platform": "Linux", "device": FAKE, "cuda": "13.0", "cudnn": 91000, "threads": 16,
    "packages": {"torch": "2.11.0+cu130", "triton": "3.6.0", "numpy": "2.5.0", "tensorboard": None},
}  # fmt: skip
ATTACKS = {
    "naive, fp32": 1.0, "reference": 1.3, "eager, not folded": 2.1, "folded, aten": 3.2, "folded, cudnn": 3.4,
    "folded, aten, kernels": 3.5, "graphed, aten": 6.0, "graphed, cudnn": 6.5, "graphed, aten, kernels": 6.9,
    "graphed, triton, kernels": 7.2, "compiled": 5.0, "compiled + graphed": 7.9,
}  # fmt: skip
STEPS = {
    "naive, fp32": 1.0, "engine, bf16, no graph": 4.0, "engine, bf16, attack graphed": 6.0, "engine, bf16, graph": 8.0,
    "engine, fp32, graph": 2.5, "engine, bf16, graph, compile": 12.0,
}  # fmt: skip


def machine(device=FAKE, **about):
    """A row of bench.machine.describe."""
    said = {**ABOUT, "device": device, **about}
    return {"device": device, "about": said, "ceilings": CEILINGS, "fp32_of_convolutions": "tf32", "threads": said["threads"]}


def timed(ms, ratio=None, spread=0.1):
    """The fields of timing.summary: ranges reach `spread` beyond the medians, to both sides."""
    row = {"ms": ms, "ms_range": [ms * (1 - spread), ms * (1 + spread)], "rounds": 5}
    if ratio is not None:
        row |= {"ratio": ratio, "ratio_range": [ratio * (1 - spread), ratio * (1 + spread)] if ratio != 1 else [1.0, 1.0]}
    return row


def rates(images, ms):
    return {"images_per_s": 1e3 * images / ms, "model_tflops": 100.0, "share_of_bf16_matmul": 0.25, "peak_memory_mb": 900.0}


def attack_rows(batches=(128, 1024, 512)):
    for precision in ("bf16", "fp32"):
        for batch in batches:
            naive = 40.0 * batch / 128
            for name, ratio in ATTACKS.items():
                ratio = ratio if precision == "bf16" or ratio == 1 else 0.6 * ratio
                fields = {"batch": batch, "precision": precision, "cudnn_benchmark": False}
                yield "attack", name, {**fields, **timed(naive / ratio, ratio), **rates(batch, naive / ratio)}


def step_rows(batches=(128, 1024, 512)):
    for method, factor in (("PGD-AT", 1.0), ("ANCHOR", 1.25)):
        for batch in batches:
            naive, fields = 60.0 * factor * batch / 128, {"method": method, "batch": batch, "cudnn_benchmark": False}
            for name, ratio in STEPS.items():
                ms = naive / ratio
                row = {**fields, **timed(ms, ratio), **rates(batch, ms), "extrapolated_s_per_epoch": ms * 50 / batch}
                yield "steps", name, {**row, "first_step_s": 3.0}
            for precision, ms in (("bf16", 0.05 * naive), ("fp32", 0.2 * naive)):
                bounds = {f"{kind}_overlap_s_per_epoch": x * ms * 50 / batch for kind, x in (("full", 0.8), ("no", 1.2))}
                row = {**fields, "ms": ms, "extrapolated_s_per_epoch": ms * 50 / batch, **bounds, **rates(batch, ms)}
                yield "steps", f"predicted, {precision}", row
        epoch = {"images": 49_920, "seconds": 4.0 * factor, "precision": "bf16", "graph": "on", "loss": 2.3, "notes": {}}
        yield "steps", "timed epoch", {**fields, **epoch, **rates(49_920, 4000 * factor)}


def kernel_rows():
    for n in (8192, 32768, 1024, 3072, 65536, 512):
        work, base = 6 * n * n * 128, {"n": n, "d": 128, "function": "hard SupCon", "sets": 3}
        for name, rate in (("eager", 2e13), ("ours, fp16", 2.6e14), ("compiled, TF32", 6e13)):
            if n <= 16384 or name.startswith("ours"):
                ms = 1e3 * work / rate + 0.02
                yield "supcon_speed", name, {**base, **timed(ms, 1.0), "forward_ms": ms / 3, "backward_ms": ms / 1.5}
        clip = {**base, "function": "other function: CLIP's loss of (z, z)"}
        yield "supcon_speed", "memeff", {**clip, **timed(0.001), "forward_ms": 0.001, "backward_ms": 0.001}
    for what in ("pgd_step linf 1024", "pgd_step l2 1024", "start_noise linf 1024", "augment 1024", "bn_fold ResNet-18"):
        for name, rate in (("eager", 900.0), ("kernel", 2100.0), ("compiled", 1500.0)):
            yield "small", name, {"what": what, **timed(0.02, rate / 900), "gb_per_s": rate}
        yield "small", "against the truth", {"what": what, "largest_difference": 1e-7, "ok": True}
    for channels, pixels in ((64, 32), (128, 16), (256, 8), (512, 4)):
        layer = {"batch": 128, "channels": channels, "out_channels": channels, "pixels": pixels, "dtype": "bf16"}
        for name, ms in (
            ("forward, aten", 0.05),
            ("forward, triton", 0.04),
            ("to the input", 0.06),
            ("forward + residual, aten", 0.01),
        ):
            yield "convs", name, {**layer, **timed(ms * (1 + pixels / 100))}


def run_file(rows, *, kind="bench.gpu", device=FAKE, quick=False, **about):
    """What bench.results.Results writes, with the machine's row first (device None: without)."""
    found = {
        "schema": 1, "kind": kind, "started": "2026-11-30T10:00:00+0000",
        "settings": {"out": "/home/someone/runs/x", "device": "cpu" if device and device.startswith("CPU") else "cuda", "quick": quick, "batches": [128]},
        "parts": {}, "results": [],
    }  # fmt: skip
    given = [] if device is None else [("environment", "device and ceilings", machine(device, **about))]
    for i, (part, name, values) in enumerate([*given, *rows]):
        found["results"].append({"part": part, "name": name, "at_s": float(i), **values})
        found["parts"][part] = {"status": "done", "seconds": 1.0}
    return found


def gpu_file(**options):
    """A run of bench.gpu with rows of every part that is drawn."""
    return run_file([*attack_rows(), *step_rows(), *kernel_rows()], **options)


def bench_file(*, added=True, device="CPU: fake, 2 threads"):
    """What `make bench` writes; added: with the project's own key."""
    entries = []
    sizes = {"width": 4, "batch": 8, "pixels": 16, "steps": 2, "rounds": 3}
    for test, group in (("test_attack[{}]", "attack, PGD-2"), ("test_whole_step[PGD-AT-{}]", "whole step, PGD-AT, PGD-2")):
        for precision, ours in (("fp32", 0.5), ("bf16", 0.25)):
            info = {"threads": 2}
            for peer, theirs in (("naive", 1.0), ("second_rung", 0.55)):
                ratio = theirs / ours
                info |= {
                    f"{peer}_median_s": theirs,
                    f"{peer}_ratio_median": ratio,
                    f"{peer}_ratio_range": [0.9 * ratio, 1.2 * ratio],
                }
                info |= {f"{peer}_range_s": [0.9 * theirs, 1.1 * theirs]} if added else {}
            stats = {"min": 0.9 * ours, "max": 1.1 * ours, "median": ours, "rounds": 3, "data": [0.9 * ours, ours, 1.1 * ours]}
            entries.append(
                {
                    "name": test.format(precision),
                    "group": group,
                    "params": {"precision": precision},
                    "extra_info": info,
                    "stats": stats,
                }
            )
    found = {
        "machine_info": {"node": "secret-host", "cpu": {"brand_raw": "fake"}, "python_version": "3.12.1"},
        "commit_info": {"id": "0123456789abcdef", "dirty": False}, "benchmarks": entries,
        "datetime": "2026-11-29T09:00:00+00:00", "version": "5.3.1",
    }  # fmt: skip
    if added:
        environment = machine(device, threads=2, cudnn=None, packages={"torch": "2.13.0+cpu"})
        found["fastanchor"] = {"schema": 1, "kind": "make bench", "environment": environment, "settings": sizes}
    return found


def ladder_file(*, ceilings=True):
    """What bench.ladder writes; ceilings: with those of the machine."""
    names = ["naive: loss.backward(), NCHW, fp32", "naive, bf16 autocast + channels-last", "input gradient only (reference)",
             "+ channels-last", "+ BatchNorm folded (eager)", "+ bf16"]  # fmt: skip
    rungs = [
        {"name": name, **timed(100.0 / ratio, ratio), "gain": 1.0, "differing_percent": 0.0, "raised_loss": 0.01}
        for name, ratio in zip(names, (1.0, 2.0, 1.3, 1.6, 1.9, 4.0), strict=True)
    ]
    settings = {"width": 4, "batch": 8, "pixels": 16, "steps": 2, "train_steps": 3, "rounds": 5}
    environment = machine("CPU: fake, 2 threads", threads=2, cudnn=None)
    ladders = {"attack alone, PGD-2": rungs, "whole training step, ANCHOR, PGD-3": rungs}
    return {
        "schema": 1,
        "environment": environment if ceilings else environment["about"],
        "settings": settings,
        "ladders": ladders,
    }


def put(folder, name, found):
    """Write a file; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(json.dumps(found), encoding="utf-8")
    return path
