"""The figures of bench/: the numbers drawn are the file's, labels keep apart, and what cannot be drawn is a sentence."""

import json
import re
import xml.etree.ElementTree as ElementTree

import bench_files
import pytest

from bench import cost, plot_draw, plot_read, plot_roofline, plots
from bench.plot_draw import Dot, Line, Panel, Point

pytest.importorskip("matplotlib")


def drawn(tmp_path, found, name="file.json"):
    """{name of the figure: Figure} and the sentences."""
    run = plot_read.read(bench_files.put(tmp_path, name, found))
    with plot_draw.style():
        figures, missing = plots.draw(run)
    return {made.name: made.figure for made in figures}, missing


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Figures and sentences of the canned files, by kind: drawing takes a second each, and they stay as they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plot_roofline, "count", cheap_count)
        found = {"run": drawn(tmp_path_factory.mktemp("run"), bench_files.gpu_file())}
    for kind, make in {"bench": bench_files.bench_file, "ladder": bench_files.ladder_file}.items():
        found[kind] = drawn(tmp_path_factory.mktemp(kind), make())
    return found


def cheap_count(method, precision, steps, width, pixels, batch, gpu):
    """In place of a count of the whole network, which takes seconds."""
    assert (width, pixels, steps, gpu) == (64, 32, 10, True)
    flops = batch * {None: 22e9, "PGD-AT": 25e9, "ANCHOR": 29e9}[method]
    return flops, flops / {"bf16": 130, "fp32": 65}[precision]


def caption(figure):
    return next(text.get_text() for text in figure.texts if text.get_gid() == "caption").replace("\n", " ")


def rows(ax):
    """{name of the row: [(value, (low, high) or None)]} as drawn, by where they stand."""
    names = [label.get_text().replace("\n", " ") for label in ax.get_yticklabels()]
    ticks = list(ax.get_yticks())
    found = {name: [] for name in names}
    whiskers = {
        round(line.get_ydata()[0], 6): tuple(line.get_xdata())
        for line in ax.lines
        if len(line.get_xdata()) == 2 and line.get_marker() == "None" and line.get_ydata()[0] == line.get_ydata()[1]
    }
    for line in ax.lines:
        if line.get_marker() not in ("None", ""):
            (x,), (y,) = line.get_xdata(), line.get_ydata()
            name = names[min(range(len(ticks)), key=lambda i: abs(ticks[i] - y))]
            found[name].append((x, whiskers.get(round(y, 6))))
    return found


def panels(figure):
    return {ax.get_title(loc="left").replace("\n", " "): rows(ax) for ax in figure.axes}


def test_the_ladder_of_bench_ladder(tmp_path):
    figures, missing = drawn(tmp_path, bench_files.ladder_file(ceilings=False))
    assert list(figures) == ["ladder"] and [line.endswith("no ceilings of its device") for line in missing] == [True]
    found = panels(figures["ladder"])
    assert list(found) == ["attack alone, PGD-2", "whole training step, ANCHOR, PGD-3"]
    ((value, span),) = found["attack alone, PGD-2"]["+ bf16"]
    assert value == 4.0 and span == pytest.approx((3.6, 4.4))
    assert [value for row in found["attack alone, PGD-2"].values() for value, _ in row] == [1.0, 2.0, 1.3, 1.6, 1.9, 4.0]
    ax = figures["ladder"].axes[0]
    assert ax.get_xscale() == "linear" and ax.get_xlim()[0] == 0
    assert any(list(line.get_xdata()) == [1, 1] for line in ax.lines)  # naive is marked
    said = caption(figures["ladder"])
    for part in (
        "CPU: fake, 2 threads",
        "torch 2.11.0",
        "commit 0123456789ab",
        "width 4",
        "batch 8",
        "PGD-2 (attack alone)",
        "5 rounds",
    ):
        assert part in said


def test_the_ladders_of_a_gpu_run(made):
    figures, missing = made["run"]
    assert [line.partition(": ")[2] for line in missing] == [
        "no seconds an epoch beside peers: it has no measured training step of one",
        "no figure of what each method costs: it has no measured step of other methods",
    ]
    assert list(figures) == [
        "ladder-attack", "ladder-steps", "epochs", "roofline-steps", "roofline-supcon", "roofline-convs", "bandwidth",
    ]  # fmt: skip
    found = panels(figures["ladder-attack"])
    bf16, fp32 = found.values()
    assert [value for value, _ in bf16["graphed, aten, kernels"]] == [6.9] * 3  # a dot for each batch
    assert [value for value, _ in fp32["compiled + graphed"]] == pytest.approx([0.6 * 7.9] * 3)
    assert set(bf16) == set(bench_files.ATTACKS)
    assert figures["ladder-attack"].axes[0].get_xscale() == "log"  # from 0.7 to 8.7 times
    assert "predicted, bf16" not in panels(figures["ladder-steps"])["PGD-AT"]
    assert "GPU: fake GPU" in caption(figures["ladder-attack"]) and "batch 128/512/1024" in caption(figures["ladder-attack"])


def test_seconds_an_epoch_of_a_gpu_run(made):
    figures, _ = made["run"]
    found = panels(figures["epochs"])["ANCHOR"]
    # 75 ms a batch of 128: 50,000 / 128 of them.
    assert found["naive, fp32"][0][0] == pytest.approx(0.075 * 50_000 / 128)
    assert found["naive, fp32"][0][1] == pytest.approx((0.9 * 0.075 * 50_000 / 128, 1.1 * 0.075 * 50_000 / 128))
    (value, span), *_ = found["predicted, bf16"]
    assert value == pytest.approx(0.05 * 0.075 * 50_000 / 128) and span == pytest.approx((0.8 * value, 1.2 * value))
    assert found["timed epoch (bf16, graph on)"] == [(pytest.approx(5.0 * 50_000 / 49_920), None)]
    assert "PREDICTED by bench.cost" in caption(figures["epochs"]) and "not measured" in caption(figures["epochs"])
    hollow = [line for ax in figures["epochs"].axes for line in ax.lines if line.get_markerfacecolor() == plot_draw.LIGHT["page"]]
    assert len(hollow) == 12  # two precisions, three batches, two methods


def test_make_bench_with_and_without_the_projects_key(tmp_path, made):
    figures, missing = made["bench"]
    assert list(figures) == ["ladder", "epochs", "roofline"]
    assert [line.partition(": ")[2].partition(":")[0] for line in missing] == ["no figure of what each method costs"]
    found = panels(figures["ladder"])["attack, PGD-2"]
    names = ["naive, fp32", "second rung, bf16 autocast + channels-last", "engine, fp32", "engine, bf16"]
    assert list(found) == names
    assert [value for row in found.values() for value, _ in row] == pytest.approx([1, 1 / 0.55, 2, 4])
    assert found[names[1]][0][1] is None  # the file has no ratios of it by round
    # Each engine beside those that took turns with it, and with nobody else.
    seconds = panels(figures["epochs"])
    for precision, engine in (("fp32", 3125), ("bf16", 1562.5)):
        found = seconds[f"whole step, PGD-AT, PGD-2: in turns with the engine in {precision}"]
        assert list(found) == [*names[:2], f"engine, {precision}"]
        assert [row[0][0] for row in found.values()] == pytest.approx([6250, 0.55 * 6250, engine])
    figures, missing = drawn(tmp_path, bench_files.bench_file(added=False))
    assert list(figures) == ["ladder"] and len(missing) == 3
    assert "how many images a step had" in missing[0] and "no ceilings" in missing[2]
    assert "torch's version not in the file" in caption(figures["ladder"])


def test_peers_stand_beside_ours(tmp_path):
    def row(name, ms, **more):
        fields = {
            "peer": "Repo: train",
            "what": "step",
            "batch": 8,
            "steps": 10,
            "width": 64,
            "extrapolated_s_per_epoch": ms * 6.25,
        }
        return "peers", name, {**fields, **bench_files.timed(ms, 40.0 / ms), **more}

    alone = {
        "peer": "Other: a name that is so long that the title of its panel has to go on in a second line",
        "counterpart": None,
    }
    given = [row("Repo: train", 40.0), row("engine, bf16", 10.0), row(alone["peer"], 80.0, **alone)]
    figures, missing = drawn(tmp_path, bench_files.run_file(given, kind="bench.peers"))
    assert missing == []
    first, second = panels(figures["epochs-peers"]).items()
    assert first[0] == "Repo: train, batch 8, PGD-10" and second[0].startswith("Other: ")
    assert first[1]["its own code"][0] == (250.0, pytest.approx((225.0, 275.0)))
    assert first[1]["engine, bf16"][0][0] == 62.5 and second[1]["its own code"][0][0] == 500.0
    figure = figures["epochs-peers"]
    assert all(box.x1 <= figure.bbox.width for _, box in boxes(figure))  # the long title is wrapped


def points_of(figure):
    return sorted(
        (line.get_xdata()[0], line.get_ydata()[0]) for line in figure.axes[0].lines if line.get_marker() not in ("None", "")
    )


def test_the_roofline_of_the_attack_is_bench_costs_count_over_the_measured_time(made):
    figures, _ = made["bench"]
    found = points_of(figures["roofline"])
    flops, moved = plot_roofline.count(None, "bf16", 2, 4, 16, 8, False)
    # The engine's, 250 ms, and the second rung's, 550 ms, at the same FLOP per byte.
    for ms in (250, 550):
        assert any(point == pytest.approx((flops / moved, 1e3 * flops / ms)) for point in found)
    whole, _ = plot_roofline.count("PGD-AT", "bf16", 2, 4, 16, 8, False)
    assert whole > flops and len(found) == 8
    lines = [line for line in figures["roofline"].axes[0].lines if line.get_marker() == "None"]
    ceilings = bench_files.CEILINGS
    (x0, _), (y0, y1) = lines[0].get_xdata(), lines[0].get_ydata()
    assert y0 / x0 == pytest.approx(ceilings["copy_bandwidth"]) and y1 == ceilings["bf16_matmul"]
    assert {line.get_ydata()[0] for line in lines[1:3]} == {ceilings["bf16_matmul"], ceilings["fp32_matmul"]}


def test_the_roofline_of_a_gpu_run_has_the_quickest_of_each_at_one_batch(made):
    """At all batches the engine is equally quick here: the first counts."""
    found = points_of(made["run"][0]["roofline-steps"])
    expected = []
    for method, naive in ((None, 40.0), ("PGD-AT", 60.0), ("ANCHOR", 75.0)):
        best = {"bf16": naive / (12.0 if method else 7.9), "fp32": naive / (2.5 if method else 0.6 * 7.9), "naive": naive}
        for who, ms in best.items():
            flops, moved = cheap_count(method, "fp32" if who == "naive" else who, 10, 64, 32, 128, True)
            expected.append((flops / moved, 1e3 * flops / ms))
    assert found == [pytest.approx(point) for point in sorted(expected)]


def test_the_roofline_of_the_kernels(made):
    figures, _ = made["run"]
    found = points_of(figures["roofline-supcon"])
    flops, moved = cost.loss_work(8192, 128)
    assert flops == 6 * 8192**2 * 128
    ms = 1e3 * flops / 2.6e14 + 0.02
    assert any(point == pytest.approx((flops / moved, 1e3 * flops / ms)) for point in found)
    # Ours at six N, and the quickest of the others where they fit; CLIP's loss is another function and stays out.
    assert len(found) == 6 + 4
    assert "memeff" not in " ".join(text.get_text() for text in figures["roofline-supcon"].axes[0].texts)
    convs = points_of(figures["roofline-convs"])
    flops, moved = 18 * 128 * 64 * 64 * 32**2, 2 * (2 * 128 * 64 * 32**2 + 9 * 64 * 64)
    assert plot_roofline.conv_work(128, 64, 64, 32) == (flops, moved)
    assert len(convs) == 8 and any(point == pytest.approx((flops / moved, 1e3 * flops / (0.04 * 1.32))) for point in convs)


def test_the_ladders_rungs_have_a_roofline_with_the_ceilings(made):
    figures, missing = made["ladder"]
    assert list(figures) == ["ladder", "roofline-1", "roofline-2"] and missing == []
    found = points_of(figures["roofline-1"])
    fp32, bf16 = (plot_roofline.count(None, precision, 2, 4, 16, 8, False) for precision in ("fp32", "bf16"))
    # naive and its second rung, three stages in fp32, and the last in bf16.
    expected = [(fp32, 100), (bf16, 50), (fp32, 100 / 1.3), (fp32, 100 / 1.6), (fp32, 100 / 1.9), (bf16, 25)]
    assert found == [pytest.approx(p) for p in sorted((flops / moved, 1e3 * flops / ms) for (flops, moved), ms in expected)]


def test_the_bandwidth_of_the_small_kernels(made):
    figures, _ = made["run"]
    (found,) = panels(figures["bandwidth"]).values()
    assert [value for value, _ in found["augment 1024"]] == [900, 2100, 1500]
    assert found["augment 1024"][1][1] == pytest.approx((2100 / 1.1, 2100 / 0.9))
    assert any(list(line.get_xdata()) == [2500, 2500] for line in figures["bandwidth"].axes[0].lines)


def boxes(figure):
    """Of every text that a reader sees, in pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    texts = list(figure.texts)
    for ax in figure.axes:
        texts += [*ax.texts, ax.title, ax._left_title, ax.xaxis.label, ax.yaxis.label]
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            texts += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    for legend in figure.legends:
        texts += legend.get_texts()
    return [
        (text.get_text(), text.get_window_extent(renderer)) for text in texts if text.get_text().strip() and text.get_visible()
    ]


@pytest.mark.parametrize("kind", ["run", "bench", "ladder"])
def test_no_text_overlaps_another_or_leaves_the_page(made, kind):
    figures, _ = made[kind]
    for name, figure in figures.items():
        found = boxes(figure)
        for i, (text, box) in enumerate(found):
            assert box.x0 >= 0 and box.x1 <= figure.bbox.width + 1 and box.y0 >= -1, (name, text)
            # The copy line's label is slanted: its box is mostly empty.
            clash = [other for other, b in found[:i] if not (text + other).startswith("copy") and "copy" not in other
                     and min(box.x1, b.x1) - max(box.x0, b.x0) > 1 and min(box.y1, b.y1) - max(box.y0, b.y0) > 2.5]  # fmt: skip
            assert clash == [], (name, text)


def test_labels_of_points_that_touch_stand_in_their_order():
    with plot_draw.style():
        points = [Point(10.0, 1e9 * 1.04**i, f"point {i}", "s") for i in range(5)]
        figure = plot_draw.plane(points, [("roof", 1e11)], 1e9, title="t", caption="c")
    heights = {text: box.y0 for text, box in boxes(figure) if text.startswith("point")}
    assert sorted(heights, key=heights.get) == [f"point {i}" for i in range(5)]


def test_the_axis_of_the_dots_is_honest():
    with plot_draw.style():
        near = plot_draw.dots([Panel("a", {"x": [Dot(2.0, 1.9, 2.1)], "y": [Dot(9.0)]})], title="t", xlabel="x", caption="c")
        far = plot_draw.dots(
            [Panel("a", {"x": [Dot(0.5)], "y": [Dot(9.0)]})], title="t", xlabel="x", caption="c", line=Line(1, "base")
        )
    assert near.axes[0].get_xscale() == "linear" and near.axes[0].get_xlim()[0] == 0
    assert far.axes[0].get_xscale() == "log" and "logarithmic axis" in far.axes[0].get_xlabel()
    assert far.axes[0].get_xlim()[0] < 0.5 and far.axes[0].get_xlim()[1] > 9


def test_the_command_writes_svg_and_png_and_says_what_is_missing(tmp_path, capsys):
    path = bench_files.put(tmp_path, "ladder.json", bench_files.ladder_file(ceilings=False))
    assert plots.main([str(path), "--out", str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["ladder-ladder.png", "ladder-ladder.svg"]
    assert "no roofline: the file holds no ceilings" in captured.err
    svg = (tmp_path / "out" / "ladder-ladder.svg").read_text()
    texts = ["".join(element.itertext()) for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert "4.00" in texts and any("CPU: fake" in text for text in texts)
    assert "Verdana, sans-serif" in svg and not re.search(r"\d{4}-\d\d-\d\dT", svg)  # no date: the same figure, the same file
    first = svg
    assert plots.main([str(path), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "ladder-ladder.svg").read_text() == first
    width = int.from_bytes((tmp_path / "out" / "ladder-ladder.png").read_bytes()[16:20], "big")
    assert width == plot_draw.WIDTH * plot_draw.PNG_DPI


def test_nothing_to_draw_is_exit_2(tmp_path, capsys):
    empty = bench_files.put(tmp_path, "gpu.json", bench_files.run_file([("attack", "x", {"left_out": "no time"})]))
    assert plots.main([str(empty), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 9 and all("gpu.json: no " in line for line in said) and not (tmp_path / "out").exists()
    aot = {"triton": "3", "torch": "2", "python": "3", "gpu": None, "rows": [json.loads(AOT)]}
    assert plots.main([str(bench_files.put(tmp_path, "aot.json", aot))]) == 2
    assert "bench.aot has no figures" in capsys.readouterr().err
    (tmp_path / "bad.json").write_text('{"results": []}')
    for arguments, says in (([tmp_path / "bad.json"], "is missing"), ([empty, tmp_path / "b" / "gpu.json"], "cannot be read")):
        assert plots.main(list(map(str, arguments))) == 2
        captured = capsys.readouterr()
        assert says in captured.err and captured.err.count("\n") == 1


@pytest.mark.parametrize("where, reason", [("taken", "File exists"), ("taken/below", "Not a directory")])
def test_no_folder_to_draw_into_is_exit_2(tmp_path, where, reason, capsys):
    path = bench_files.put(tmp_path, "ladder.json", bench_files.ladder_file(ceilings=False))
    (tmp_path / "taken").write_text("mine")
    assert plots.main([str(path), "--out", str(tmp_path / where)]) == 2
    said = capsys.readouterr().err
    assert said == f"bench.plots: {tmp_path / where}: cannot be a folder to write into ({reason})\n"
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_figure_that_cannot_be_written_is_exit_2(tmp_path, capsys):
    path = bench_files.put(tmp_path, "ladder.json", bench_files.ladder_file(ceilings=False))
    (tmp_path / "out" / "ladder-ladder.svg").mkdir(parents=True)
    assert plots.main([str(path), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "ladder-ladder.svg" in said and said.count("\n") == 1


AOT = """{"kernel": "k", "arch": 90, "variant": "default", "precision": "fp16", "D": 128, "tile": "64 x 64", "warps": 4,
"stages": 2, "registers": 200, "spilled": 0, "shared": 1000, "wgmma": 4, "faults": []}"""


def test_a_quick_run_and_a_file_without_its_machine_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(plot_roofline, "count", lambda *size: (1e9, 1e8))
    figures, _ = drawn(tmp_path, bench_files.run_file(bench_files.attack_rows((128,)), quick=True))
    assert "--quick" in caption(figures["ladder-attack"])
    figures, missing = drawn(tmp_path, bench_files.run_file(bench_files.attack_rows((128,)), device=None))
    assert "a GPU that the file does not name" in caption(figures["ladder-attack"])
    assert any("no roofline: the file holds no ceilings" in line for line in missing)


def test_a_gpu_that_may_use_tf32_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(plot_roofline, "count", cheap_count)
    figures, _ = drawn(tmp_path, bench_files.run_file(bench_files.attack_rows((128,))))
    assert "may use TF32" in caption(figures["roofline-steps"])


@pytest.mark.parametrize(
    "value, text", [(0.0135, "0.0135"), (0.78, "0.78"), (4.306, "4.31"), (12.34, "12.3"), (6250.4, "6250"), (0, "0")]
)
def test_numbers_beside_the_dots(value, text):
    assert plot_draw.number(value) == text


def test_two_ceilings_that_are_close_have_labels_apart():
    """A processor that converts bf16 multiplies in fp32 as fast, or faster."""
    with plot_draw.style():
        roofs = [("bf16 matmul", 1.0e11), ("fp32 matmul", 1.02e11)]
        figure = plot_draw.plane([Point(30.0, 5e10, "attack", "fp32")], roofs, 1e10, title="t", caption="c")
    first, second = (box for text, box in boxes(figure) if "matmul" in text)
    assert first.y1 < second.y0  # the higher one's stands above
