"""Every figure of README.md's tables is the one that was recorded, and no figure of a GPU stands there without a GPU's record.

Where each comes from, below the record that the README's own section links to:
* `make demo`: `demo-compare.json` (accuracies, images), `demo.log` (seconds); CPU.
* photographs: `photos-*/eval/*.json` (accuracies, images), `photos-*/summary.csv` (losses, epochs), `photos-*/env.json`; CPU.
* How fast: `bench.json` of `make bench` (ratios, ranges, rounds, sizes, device), `bench.log` (minutes), `speedrun.json`; CPU.
"""

import csv
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RECORDS = ROOT / "bench" / "records"
LINK = re.compile(r"bench/records/([\w.-]+)")
NUMBER = re.compile(r"\d+(?:\.\d+)?")
# By the first cells of its header: a table of figures that is not here is one that nothing checks.
DEMO = ("run", "clean %")
PHOTOS = ("test attack, 1,000 images", "ANCHOR %")
SPEED = ("", "engine, fp32")
NOT_YET = ("No figure of a GPU has been measured yet", "Nothing has run on a GPU yet")
# A device or the interface to it, and a number in a unit of speed, time, memory or accuracy, or a factor.
GPU_WORDS = re.compile(r"\b(GPUs?|CUDA|H100|H200|A100|B200|L40S?|RTX \d+)\b")
UNITS = (
    "x", "\u00d7", "times", "%", "points", "us", "\u00b5s", "ms", "s", "sec", "seconds?", "minutes?", "min", "hours?", "h", "[MG]i?B",
    "[TGM]B/s", "[TG]FLOP/s", "TFLOPS", "images/s", "s/epoch",
)  # fmt: skip
MEASURED = re.compile(rf"\d\s?(?:{'|'.join(UNITS)})(?![\w%])")


def sections(text):
    """Heading -> its text; code blocks left out."""
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    parts = re.split(r"^#+ (.+)$", text, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def tables(text):
    """Every table as a list of rows of cells, the header first."""
    found = re.findall(r"(?:^\|.*\|\n)+", text, flags=re.M)
    rows = [[[cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines()] for table in found]
    return [[cells for cells in table if not all(set(cell) <= set("-: ") and cell for cell in cells)] for table in rows]


def table(text, header):
    """The section and the table that begins with these cells, or (None, None)."""
    for section in sections(text).values():
        for found in tables(section):
            if tuple(found[0][: len(header)]) == header:
                return section, found
    return None, None


def record(section, file):
    """The one record with this file of those that a section links to."""
    found = [RECORDS / name for name in sorted(set(LINK.findall(section))) if (RECORDS / name / file).exists()]
    assert len(found) == 1, f"the section must link to one record with {file}: {found}"
    return found[0]


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def says(section, expected, where):
    """A problem unless the sentence stands in the section."""
    flat = " ".join(section.split())
    return [] if expected in flat else [f"{where} gives {expected!r}, which README.md does not say"]


def differs(cells, expected, where):
    return [] if cells == expected else [f"{where} gives {expected}, README.md says {cells}"]


def demo(text):
    section, found = table(text, DEMO)
    folder = record(section, "demo.log")
    recorded = load(folder / "demo-compare.json")
    (attack,) = recorded["rows"][0]["robust"]
    problems = differs(found[0], ["run", "clean %", attack.replace("PGD-20", "PGD-20 %", 1)], "demo-compare.json")
    rows = [[row["name"], f"{row['clean']['mean']:.2f}", f"{row['robust'][attack]['mean']:.2f}"] for row in recorded["rows"]]
    problems += differs(found[1:], rows, "demo-compare.json")
    (count,) = {row["count"] for row in recorded["rows"]}
    problems += says(section, f"({count} test images, {'one seed' if len(recorded['seeds']) == 1 else recorded['seeds']}", "demo")
    minutes, seconds = re.search(r"^real\s+(\d+)m([\d.]+)s", (folder / "demo.log").read_text(), flags=re.M).groups()
    return problems + says(section, f"On two CPU cores {60 * int(minutes) + float(seconds):.0f} s once installed", "demo.log")


def photos(text):
    section, found = table(text, PHOTOS)
    folder = record(section, "photos-anchor")
    runs = [folder / "photos-anchor", folder / "photos-standard"]
    judged = [{row["description"]: row for row in map(load, sorted((run / "eval").glob("*.json")))} for run in runs]
    problems = differs(found[0], [PHOTOS[0], "ANCHOR %", "undefended %"], "the two runs")
    for name, *cells in found[1:]:
        if name == "none (clean)":
            # Each attack's file has it: they must agree.
            expected = [f"{value:.1f}" for run in judged for value in {round(row["clean_accuracy"], 6) for row in run.values()}]
        else:
            names = [
                key
                for key in judged[0]
                if key == name or key.startswith(name.removesuffix(")") + ", step 8/255, no random start")
            ]
            if len(names) != 1:
                problems.append(f"{name} is no attack of {folder.name}/photos-anchor/eval")
                continue
            expected = [f"{run[names[0]]['robust_accuracy']:.1f}" for run in judged]
        problems += differs(cells, expected, f"{folder.name}: {name}")
    if len(found) - 1 != 1 + len(judged[0]):
        problems.append("the photographs' table has not one row for each recorded attack")
    counts = {row["count"] for run in judged for row in run.values()}
    problems += differs([PHOTOS[0]], [f"test attack, {count:,} images" for count in counts], "eval/*.json")
    (limit,) = {row["limit"] for run in judged for row in run.values()}
    with (runs[0] / "summary.csv").open(newline="") as file:
        epochs = list(csv.DictReader(file))
    losses = [float(epochs[i]["loss"]) for i in (0, -1)]
    problems += says(section, f"the training loss falls from {losses[0]:.2f} to {losses[1]:.2f}", "summary.csv")
    problems += says(section, f"{limit:,} of the training images", "eval/*.json")
    problems += says(section, f"{len(epochs)} epochs, two CPU cores", "summary.csv")
    problems += [] if load(runs[0] / "env.json")["device"].startswith("CPU") else ["the photographs' record is not a CPU's"]
    return problems


def cell(found, peer):
    low, high = found["extra_info"][f"{peer}_ratio_range"]
    return f"{found['extra_info'][f'{peer}_ratio_median']:.2f} ({low:.2f} to {high:.2f})"


def speed(text):
    section, found = table(text, SPEED)
    folder = record(section, "bench.json")
    recorded = load(folder / "bench.json")
    timed = {entry["name"]: entry for entry in recorded["benchmarks"]}
    header = [
        "", "engine, fp32", "engine, bf16", "engine, bf16, beside input-gradient code", "engine, bf16, beside the second rung",
    ]  # fmt: skip
    tests = {
        "attack alone": ("test_attack[{}]", "torchattacks"),
        "whole step, PGD-AT": ("test_whole_step[PGD-AT-{}]", "naive_input_gradient"),
        "whole step, ANCHOR": ("test_whole_step[ANCHOR-{}]", "naive_input_gradient"),
    }
    rows = []
    for what, (name, alone) in tests.items():
        columns = (("fp32", "naive"), ("bf16", "naive"), ("bf16", alone), ("bf16", "second_rung"))
        rows.append([what, *(cell(timed[name.format(dtype)], peer) for dtype, peer in columns)])
    problems = differs(found, [header, *rows], f"{folder.name}/bench.json")
    made = recorded["fastanchor"]["settings"]
    (rounds,) = {timed[name.format("fp32")]["stats"]["rounds"] for name, _ in tests.values()}
    words = {2: "two", 6: "six", 7: "seven"}
    row = recorded["fastanchor"]["environment"]
    processor = re.fullmatch(r"CPU: (.+), \d+ threads", row["device"])[1]
    problems += says(
        section, f"On {words[row['threads']]} CPU cores with bf16 instructions ({processor}, ResNet-18", "bench.json"
    )
    sizes = f"ResNet-18 of width {made['width']}, batch {made['batch']}, PGD-{made['steps']}"
    problems += says(
        section, f"{sizes}), all in one process and in turns, median over {words[rounds]} rounds and range", "bench.json"
    )
    seconds = float(re.search(r"passed in ([\d.]+)s", (folder / "bench.log").read_text())[1])
    problems += says(section, f"in {words[round(seconds / 60)]} minutes", "bench.log")
    run = load(folder / "speedrun.json")["results"][-1]
    said = f"From random weights to {run['robust_mean']:.1f} % PGD-20 accuracy on the handwritten digits: {run['seconds_mean']:.1f} s"
    problems += says(section, f"{said} on these two cores, mean of {run['n']} seeds", "speedrun.json")
    return problems + ([] if run["holds"] and run["p"] < 0.01 else ["the speedrun's claim does not hold"])


def device_of(found):
    """The device that a JSON file of ours says it ran on, or None."""
    if not isinstance(found, dict):
        return None
    rows = [row for row in found.get("results", []) if isinstance(row, dict)]
    for holder in (found, found.get("environment"), *rows, *(row.get("about") for row in rows)):
        device = holder.get("device") if isinstance(holder, dict) else None
        if isinstance(device, str):
            return device
    return None


def gpu_of(folder):
    """The name of the GPU that a record's JSON gives, or None."""
    devices = [device_of(load(path)) for path in sorted(folder.rglob("*.json"))]
    return next((device for device in devices if device and not device.lower().startswith(("cpu", "cuda"))), None)


def is_table(paragraph):
    return paragraph.lstrip().startswith("|")


def blocks(section):
    """(paragraph, the one before it, its block): a block is a paragraph, or a table with the paragraphs around it."""
    paragraphs = re.split(r"\n\s*\n", section.strip())
    for i, paragraph in enumerate(paragraphs):
        near = {i}
        for j in (i - 1, i, i + 1):
            if 0 <= j < len(paragraphs) and is_table(paragraphs[j]):
                near |= {j - 1, j, j + 1}
        yield (
            paragraph,
            paragraphs[i - 1] if i else "",
            "\n".join(paragraphs[j] for j in sorted(near) if 0 <= j < len(paragraphs)),
        )


def gpu_claims(text, records=RECORDS):
    """Figures of a GPU in blocks that link to no record with a GPU's name; and "not yet" dropped too early or kept too long.

    A table is a GPU's if its head, or the sentence before it, names one; and a row is that names one itself.
    """
    problems = []
    for section in sections(text).values():
        for paragraph, before, block in blocks(section):
            if any(gpu_of(records / name) for name in LINK.findall(block)):
                continue
            sentences = re.split(r"(?<=[.:;])\s+", " ".join(paragraph.split()))
            if is_table(paragraph):
                sentences = paragraph.splitlines()
                led_in = re.split(r"(?<=[.;])\s+", " ".join(before.split()))[-1]
                if GPU_WORDS.search(f"{led_in} {sentences[0]}") and re.search(r"\d\.\d", paragraph):
                    problems.append(f"a GPU's table without a GPU's record: {sentences[0]}")
            claims = [said for said in sentences if GPU_WORDS.search(said) and MEASURED.search(said)]
            problems += [f"a GPU's figure without a GPU's record: {said}" for said in claims]
    flat = " ".join(text.split())
    if any(gpu_of(folder) for folder in records.iterdir()):
        problems += [f"there is a GPU's record, yet README.md says {said!r}" for said in NOT_YET if said in flat]
    elif NOT_YET[0] not in flat:
        problems.append(f"there is no GPU's record, and README.md does not say {NOT_YET[0]!r}")
    return problems


def numbers_of(value):
    """Every number in a JSON value."""
    if isinstance(value, (dict, list)):
        return [found for part in (value.values() if isinstance(value, dict) else value) for found in numbers_of(part)]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


def other_tables(text, records=RECORDS):
    """Tables that no check above knows: each decimal or percentage must be a number of a record linked beside it, rounded.

    A share in the JSON may be a percentage here; bare whole numbers are settings.
    """
    problems = []
    for section in sections(text).values():
        for paragraph, _, block in blocks(section):
            if not is_table(paragraph) or tuple(tables(paragraph + "\n")[0][0][:2]) in (DEMO, PHOTOS, SPEED):
                continue
            files = [path for name in LINK.findall(block) for path in (records / name).rglob("*.json")]
            found = [number for path in files for number in numbers_of(load(path))]
            for figure in re.findall(r"\d+\.\d+|\d+(?= ?%)", paragraph):
                decimals = len(figure.partition(".")[2])
                if figure not in {f"{unit * number:.{decimals}f}" for number in found for unit in (1, 100)}:
                    problems.append(f"{figure}: in a table that nothing checks, and in no record linked beside it")
    return problems


@pytest.mark.parametrize("check", [demo, photos, speed, gpu_claims, other_tables])
def test_what_the_readme_says_is_what_was_recorded(check):
    assert check(README) == []


@pytest.mark.parametrize("header, check", [(DEMO, demo), (PHOTOS, photos), (SPEED, speed)])
def test_any_figure_that_is_changed_is_noticed(header, check):
    """Each number of each table, one after the other, by its last digit."""
    start = README.index("| " + " | ".join(header) + " |" if header[0] else "| | " + header[1])
    end = README.index("\n\n", start)
    numbers = list(NUMBER.finditer(README, start, end))
    assert len(numbers) >= 11
    for number in numbers:
        last = number.end() - 1
        changed = f"{README[:last]}{(int(README[last]) + 1) % 10}{README[last + 1 :]}"
        try:
            problems = check(changed)
        except TypeError:  # the table is no longer found by its header
            problems = ["no table"]
        assert problems, f"{number[0]} at {README[max(0, last - 40) : last + 1]!r} may be changed unnoticed"


@pytest.mark.parametrize(
    "check, said, instead",
    [
        (demo, "two CPU cores 81 s", "two CPU cores 80 s"),
        (demo, "(359 test images", "(360 test images"),
        (demo, "[Record](bench/records/2026-11-22_attack-engine-cpu)", "[Record](bench/records/2026-11-22_first-figures-cpu)"),
        (photos, "from 5.00 to 4.60", "from 5.00 to 4.50"),
        (photos, "10 epochs, two CPU cores", "10 epochs, two cores"),
        (speed, "median over seven rounds", "median over nine rounds"),
        (speed, "width 32, batch 32", "width 64, batch 32"),
        (speed, "On two CPU cores with bf16", "On two cores with bf16"),
        (speed, "mean of 10 seeds", "mean of 12 seeds"),
        (speed, "your machine in six minutes", "your machine in two minutes"),
        (gpu_claims, "**No figure of a GPU has been measured yet**", "GPUs follow"),
        (other_tables, "## The engine\n", "## The engine\n\n| kernel | x |\n|---|---|\n| SupCon | 3.1 |\n"),
    ],
)
def test_sentences_beside_the_tables_are_checked_too(check, said, instead):
    assert said in README
    assert check(README.replace(said, instead, 1))


@pytest.mark.parametrize(
    "sentence",
    [
        "On an H100 the attack is 12.5x as fast.", "One epoch takes 3.2 s on a GPU.", "The H200 reaches 61 % of its matmul rate.",
        "On one GPU, an attack of 512 images needs 41 ms.", "A GPU gives 30,000 images/s.", "It is 9 times as fast on CUDA.",
        "[CPU record](bench/records/2026-11-22_attack-engine-cpu): 4 ms on an A100.",
        "| H100 | ms |\n|---|---|\n| ours | 3.1 |", "On one H100:\n\n| | time |\n|---|---|\n| ours | 3.1 |",
        "| what | time |\n|---|---|\n| ours, H100 | 3 ms |",
    ],
)  # fmt: skip
def test_a_gpu_figure_needs_a_record_with_a_gpu(sentence, tmp_path):
    assert gpu_claims(f"{README}\n\n{sentence}\n")
    # With a record that names one, once the README no longer says that there is none.
    (tmp_path / "h100").mkdir()
    row = {"part": "environment", "name": "device and ceilings", "device": "NVIDIA H100 80GB HBM3"}
    (tmp_path / "h100" / "gpu.json").write_text(json.dumps({"schema": 1, "settings": {"device": "cuda"}, "results": [row]}))
    apart = "\n\n" if is_table(sentence.splitlines()[-1]) else " "
    said = f"# A\n\n{sentence}{apart}([record](bench/records/h100))\n"
    assert gpu_claims(said, tmp_path) == []
    assert gpu_claims(f"{said}\n{NOT_YET[1]}.\n", tmp_path)
    row["device"] = "CPU: AMD EPYC, 2 threads"
    (tmp_path / "h100" / "gpu.json").write_text(json.dumps({"schema": 1, "settings": {"device": "cuda"}, "results": [row]}))
    assert gpu_claims(f"{said}\n{NOT_YET[0]}.\n", tmp_path)


def test_a_new_table_is_checked_against_the_record_beside_it(tmp_path):
    (tmp_path / "h100").mkdir()
    found = {"results": [{"ms": 3.1416, "share_of_floor": 0.617, "ok": True}]}
    (tmp_path / "h100" / "gpu.json").write_text(json.dumps(found))
    said = "# A\n\n| batch | ms | share |\n|---|---|---|\n| 128 | {} | {} % |\n\n[record](bench/records/{})\n"
    assert other_tables(said.format("3.14", "62", "h100"), tmp_path) == []
    for wrong in (("3.15", "62", "h100"), ("3.14", "61", "h100"), ("3.14", "62", "h200"), ("1.00", "62", "h100")):
        assert len(other_tables(said.format(*wrong), tmp_path)) >= 1, wrong


@pytest.mark.parametrize(
    "sentence",
    ["Kernels compile for A100, RTX 30 and 40, H100 and B200.", "On a GPU the step is one CUDA graph.", "No GPU is needed."],
)
def test_words_about_gpus_without_a_figure_are_free(sentence):
    assert gpu_claims(f"{README}\n\n{sentence}\n") == []


def test_every_record_that_is_linked_is_there_and_says_what_it_is_of():
    """A CPU's, ahead-of-time compilation, the interpreter's, or a GPU's by its name, in the record's own README."""
    linked = set(LINK.findall(README))
    assert linked
    for name in linked | {folder.name for folder in RECORDS.iterdir() if folder.is_dir()}:
        text = (RECORDS / name / "README.md").read_text(encoding="utf-8")
        gpu = gpu_of(RECORDS / name)
        if gpu:
            assert gpu in text, f"{name}: its README does not name {gpu}"
        else:
            assert re.search(r"\bCPU\b|[Aa]head-of-time compilation, no GPU|[Ii]nterpreter", text), f"{name}: of which device?"
            assert not re.search(r"^Device: .*NVIDIA", text, flags=re.M)
