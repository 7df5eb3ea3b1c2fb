"""The schemas of bench/'s files: what the programs wrote is valid, and a file with a wrong field is refused by a sentence."""

import copy
import json
from pathlib import Path

import bench_files
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import gpu, schema
from bench.timing import summary
from fastanchor.errors import UserError

RECORDS = Path(__file__).parents[1] / "bench" / "records"
# Of fastanchor's own programs: training runs, evaluations, `fastanchor compare`.
NOT_OF_BENCH = {"env.json", "demo-compare.json", "precision-digits.json", "precision-photos.json", "compare.json"}
MADE = {
    "run": bench_files.gpu_file, "bench": bench_files.bench_file, "ladder": bench_files.ladder_file,
    "old bench": lambda: bench_files.bench_file(added=False), "old ladder": lambda: bench_files.ladder_file(ceilings=False),
}  # fmt: skip


def refused(found, says):
    with pytest.raises(UserError) as caught:
        schema.validate(found)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_all_records_are_valid():
    """Every JSON file of a record is checked, but for those of other programs, which are no file of bench."""
    checked = 0
    for path in sorted(RECORDS.glob("*/*.json")):
        if path.name in NOT_OF_BENCH:
            refused(json.loads(path.read_text()), "is no file of bench.gpu")
        else:
            schema.load(path)
            checked += 1
    assert checked >= 4


def test_what_bench_gpu_writes_is_valid(tmp_path):
    parts = "environment,small,sanitizer"  # the others' rows are held to it where they are run, in test_bench.py
    assert gpu.main(["--quick", "--device", "cpu", "--only", parts, "--out", str(tmp_path)]) == 0
    found = schema.load(tmp_path / "gpu.json")
    assert {row["part"] for row in found["results"]} >= set(parts.split(","))


@pytest.mark.parametrize("kind", MADE)
def test_the_canned_files_are_valid(kind):
    schema.validate(MADE[kind]())


def test_later_versions_may_add_parts_and_fields():
    found = bench_files.gpu_file()
    found["results"].append({"part": "new", "name": "x", "at_s": 1.0, "anything": None})
    found["results"][3]["new_field"] = {"a": [1]}
    found["new_key"] = 1
    schema.validate(found)


def changed(found, path, value):
    """A copy with one field set, or taken away (value ...)."""
    found = copy.deepcopy(found)
    at = found
    for step in path[:-1]:
        at = at[step]
    if value is ...:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return found


NAN, INFINITE = float("nan"), float("inf")
# results[0] is the machine, results[1] the first attack: naive.
WRONG_RUN = [
    (("schema",), 2, "schema: is 2: must be 1"),
    (("kind",), "bench.else", "kind: is 'bench.else': must be of 'bench.gpu'"),
    (("started",), "yesterday", "started"),
    (("results",), {}, "results: is {}: must be array"),
    (("results", 1, "name"), ..., "results[1]: 'name' is missing"),
    (("results", 1, "ms"), ..., "results[1] (attack: naive, fp32): 'ms' is missing"),
    (("results", 1, "ms"), -1.0, "results[1].ms (attack: naive, fp32): is -1.0: must be above 0"),
    (("results", 1, "ms"), 0, "must be above 0"),
    (("results", 1, "ms"), NAN, "is nan: must be a finite number"),
    (("results", 1, "ms"), INFINITE, "is inf: must be a finite number"),
    (("results", 1, "ms"), "36", "is '36': must be a finite number"),
    (("results", 1, "ms"), True, "is True: must be a finite number"),
    (("results", 1, "ms_range"), [1.0], "must have 2 entries"),
    (("results", 1, "ms_range"), [50.0, 60.0], "must contain ms, which is 40.0"),
    (("results", 1, "ms_range"), [44.0, 36.0], "must be the least and then the greatest"),
    (("results", 1, "ratio_range"), [1.1, 1.2], "must contain ratio, which is 1.0"),
    (("results", 1, "ratio_range"), [NAN, 1.2], "is nan: must be a finite number"),
    (("results", 1, "rounds"), 0, "must be at least 1"),
    (("results", 1, "batch"), 2.5, "is 2.5: must be integer"),
    (("results", 1, "peak_memory_mb"), -3, "must be at least 0"),
    (("results", 1, "left_out"), "", "is empty"),
    (("results", 0, "ceilings", "copy_bandwidth"), NAN, "is nan"),
    (("results", 0, "ceilings"), ..., "'ceilings' is missing"),
    (("results", 0, "about", "packages", "torch"), ..., "'torch' is missing"),
    (("results", 0, "about", "commit"), 12, "must be string or null"),
    (("parts", "attack", "status"), "fine", "must be of 'done'"),
]  # fmt: skip


@pytest.mark.parametrize("path, value, says", WRONG_RUN)
def test_a_wrong_run_is_named(path, value, says):
    found = bench_files.run_file(bench_files.attack_rows((128,)))
    schema.validate(found)
    refused(changed(found, path, value), says)


@pytest.mark.parametrize(
    "kind, path, value, says",
    [
        ("bench", ("benchmarks", 0, "stats", "median"), 9.0, "must contain median, which is 9.0"),
        ("bench", ("benchmarks", 0, "stats", "min"), -1.0, "(test_attack[fp32]): is -1.0: must be above 0"),
        ("bench", ("benchmarks", 0, "extra_info", "naive_ratio_range"), [5, 6], "must contain naive_ratio_median, which is 2.0"),
        ("bench", ("benchmarks", 0, "extra_info", "naive_range_s"), [5, 6], "must contain naive_median_s, which is 1.0"),
        ("bench", ("benchmarks", 0, "extra_info", "naive_median_s"), NAN, "is nan"),
        ("bench", ("fastanchor", "settings", "batch"), ..., "'batch' is missing"),
        ("bench", ("fastanchor", "environment", "about"), ..., "'about' is missing"),
        ("bench", ("datetime",), ..., "'datetime' is missing"),
        ("ladder", ("ladders", "attack alone, PGD-2", 1, "gain"), 0, "must be above 0"),
        ("ladder", ("ladders", "attack alone, PGD-2", 1, "differing_percent"), 101, "must be at most 100"),
        ("ladder", ("ladders",), {}, "is empty"),
        ("ladder", ("environment", "about", "device"), 3, "must be string"),
        ("old ladder", ("environment", "device"), ..., "'device' is missing"),
        ("ladder", ("settings", "width"), "wide", "must be integer"),
    ],
)
def test_wrong_files_of_the_others(kind, path, value, says):
    refused(changed(MADE[kind](), path, value), says)


@pytest.mark.parametrize(
    "path, value, says",
    [
        (("recipe",), ..., "'recipe' is missing"),
        (("settings", "image_size"), [32], "must have 2 entries"),
        (("settings", "kept"), "in a box", "must be of 'decoded', 'encoded'"),
        (("environment", "packages", "torch"), ..., "'torch' is missing"),
        (("recommended", "agrees"), "yes", "must be boolean"),
        (("rows", 1, "backend"), "disk", "(resident): is 'disk': must be of 'none', 'resident'"),
        (("rows", 1, "feeding"), ..., "rows[1] (resident): 'feeding' is missing"),
        (("rows", 1, "alone", "ms"), 0, "rows[1].alone.ms (resident): is 0: must be above 0"),
        (("rows", 1, "alone", "images_per_s"), 1.0, "must contain images_per_s, which is 1.0"),
        (("rows", 1, "feeding", "cost_percent"), NAN, "is nan: must be a finite number"),
        (("rows", 1, "feeding", "cost_percent"), -99.0, "must contain cost_percent, which is -99.0"),
    ],
)
def test_wrong_input_pipelines_are_named(path, value, says):
    found = json.loads((RECORDS / "2026-11-22_data-cpu" / "folder.json").read_text())
    refused(changed(found, path, value), says)
    found["rows"][1] = {key: found["rows"][1][key] for key in ("name", "backend", "flags", "workers", "decoder")}
    schema.validate(changed(found, ("rows", 1, "left_out"), "no room"))


def test_a_recipe_whose_cost_is_not_there_is_named():
    found = bench_files.bench_file()
    entry = found["benchmarks"][0]
    entry["name"], info = "test_methods", entry["extra_info"]
    info["precision"] = "bf16"
    with pytest.raises(UserError, match="'flops_ratio' is missing"):
        schema.validate(found)
    info["flops_ratio"] = {"naive": 2.0}
    schema.validate(found)
    info["flops_ratio"]["trades"] = 1.2
    with pytest.raises(UserError, match=r"extra_info \(test_methods\): 'trades_median_s' is missing"):
        schema.validate(found)


def test_an_outcome_may_be_nan_and_a_left_out_row_needs_nothing():
    """A kernel that computes NaN is a result, and one that was not run has no time."""
    row = {"case": "default", "regime": "mid", "n": 8, "d": 4, "precision": "fp16", "loss_relative": NAN, "ok": False}
    schema.validate(bench_files.run_file([("supcon", "kernels", row), ("attack", "x", {"left_out": "no GPU"})]))
    refused(bench_files.run_file([("supcon", "kernels", {**row, "loss_relative": "none"})]), "is 'none': must be a number")


times = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=7)


@settings(max_examples=60, deadline=None)
@given(times=times, data=st.data())
def test_what_timing_makes_of_any_rounds_is_valid_and_a_ratio_outside_its_range_is_not(times, data):
    base = data.draw(st.lists(st.floats(1e-6, 1e6), min_size=len(times), max_size=len(times)))
    row = {"batch": 8, "precision": "fp32", "images_per_s": 1.0, "model_tflops": 1.0, "share_of_bf16_matmul": 0.1}
    row |= summary(times, base)
    found = bench_files.run_file([("attack", "folded", row)], device=None)
    schema.validate(found)
    key = data.draw(st.sampled_from(["ratio", "ms"]))
    outside = data.draw(st.sampled_from([row[f"{key}_range"][0] * 0.999, row[f"{key}_range"][1] * 1.001]))
    refused(bench_files.run_file([("attack", "folded", {**row, key: outside})], device=None), f"must contain {key}")


def test_a_range_below_zero_contains_its_value():
    fields = {"how": "feeding the step", "batch": 8, "images_per_s": 1.0, **bench_files.timed(1.0, 1.0)}
    row = {**fields, "cost_percent": -2.0, "cost_percent_range": [-3.0, -1.0]}
    schema.validate(bench_files.run_file([("data", "resident", row)]))
    refused(bench_files.run_file([("data", "resident", {**row, "cost_percent": -4.0})]), "must contain cost_percent, which is -4")


def test_the_command_names_every_wrong_file(tmp_path, capsys):
    good = bench_files.put(tmp_path, "good.json", bench_files.gpu_file())
    wrong = bench_files.put(tmp_path, "wrong.json", bench_files.run_file([("attack", "x", {})]))
    (tmp_path / "text.json").write_text("{")
    assert schema.main([str(good)]) == 0 and "valid" in capsys.readouterr().out
    assert schema.main(list(map(str, (good, wrong, tmp_path / "text.json", tmp_path / "none.json")))) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 3 and "wrong.json: results[1] (attack: x): 'batch' is missing" in lines[0]
    assert "text.json: is not JSON" in lines[1] and "none.json: cannot be read (No such file" in lines[2]
    assert schema.main([]) == 2


def test_every_field_of_the_schemas_is_described():
    """They are the documentation of the format: a field says what it is, itself or by what it refers to."""

    def fields(node, where):
        for key, value in node.items() if isinstance(node, dict) else ():
            if key in ("properties", "patternProperties"):
                yield from ((f"{where}.{name}", field) for name, field in value.items())
            for inner in value if isinstance(value, list) else [value]:
                yield from fields(inner, f"{where}.{key}")

    files = {path.name: json.loads(path.read_text()) for path in schema.FOLDER.glob("*.json")}
    assert set(files) == {
        "common.json",
        "run.json",
        "bench.json",
        "ladder.json",
        "compare.json",
        "aot.json",
        "agreement.json",
        "bench-data.json",
    }
    undescribed = [
        where
        for name, found in files.items()
        for where, field in fields(found, name)
        if not {"description", "$ref", "const", "items", "type", "enum", "if", "pattern"} & set(field)
    ]
    assert undescribed == []
    numbers = [
        where
        for name, found in files.items()
        for where, field in fields(found, name)
        if field.get("type") in ("number", "integer") and "description" not in field
    ]
    assert numbers == []
