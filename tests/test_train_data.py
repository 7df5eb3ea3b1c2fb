"""Training on every data backend: the same bits from arrays, files that stay files, resume, samplers and extra images."""

import gc
import shutil
import weakref

import numpy as np
import pytest
import torch
from graph_emulator import Emulator
from PIL import Image
from test_step import CPU
from test_step_graphed import IMAGES, LABELS, SEEDS, assert_same, make_step
from test_train import SMALL, assert_equal_bits, config_of, weights

from fastanchor import graphs
from fastanchor.config import Config
from fastanchor.data import feeds, sources
from fastanchor.data.dali import find_dali
from fastanchor.data.encoded import Encoded
from fastanchor.data.extra import Mixed
from fastanchor.errors import UserError
from fastanchor.models import build_model
from fastanchor.pipeline import load_images, train_and_judge
from fastanchor.settings import parse_flags
from fastanchor.train import loop
from fastanchor.train.loop import train
from fastanchor.train.progress import Reporter
from fastanchor.train.run import RunDir

needs_dali = pytest.mark.skipif(not find_dali()[0], reason="DALI is not installed")
STREAMED = [pytest.param("torch", id="torch"), pytest.param("dali", id="dali", marks=needs_dali)]


def trained(path, config, images=None, **options):
    run = RunDir(path)
    train(config, load_images(config) if images is None else images, run, **options)
    return run


def losses(run):
    return [row["loss"] for row in run.history()]


@pytest.fixture(scope="module")
def resident(tmp_path_factory):
    """Runs of the resident backend by augmentation and views, made once."""
    made = {}

    def run(*flags):
        if flags not in made:
            config = config_of("--epochs", "2", "--data.backend", "resident", *flags)
            made[flags] = trained(tmp_path_factory.mktemp("resident") / "run", config)
        return made[flags]

    return run


@pytest.mark.parametrize("backend", STREAMED)
@pytest.mark.parametrize(
    "flags", [(), ("--loss.views", "clean+aug+adv", "--stage2.mode", "alf")], ids=["two views", "three views, two stages"]
)
def test_every_backend_trains_to_the_same_bits(backend, flags, resident, tmp_path):
    config = config_of("--epochs", "2", "--data.backend", backend, "--data.workers", "1", *flags)
    run = trained(tmp_path / "run", config)
    assert_equal_bits(weights(run), weights(resident(*flags)))
    assert losses(run) == losses(resident(*flags))


@pytest.mark.parametrize("backend", STREAMED)
def test_contrastive_views_differ_by_rounding_alone(backend, resident, tmp_path):
    """Crops are resized by another library, to 8 bits by Pillow; the colours are the same draws."""
    flags = ("--data.augment", "simclr", "--optim.lr", "0.001")
    run = trained(
        tmp_path / "run",
        config_of("--epochs", "2", "--data.backend", backend, "--data.workers", "0" if backend == "torch" else "1", *flags),
    )
    for found, expected in zip(losses(run), losses(resident(*flags)), strict=True):
        assert found == pytest.approx(expected, rel=0.01)
    assert losses(run) != pytest.approx(losses(resident("--optim.lr", "0.001")), rel=0.001)


@pytest.mark.parametrize("backend", STREAMED)
@pytest.mark.parametrize(
    "names, flags",
    [(("aug",), []), (("aug",), ["--data.augment", "simclr"]), (("clean", "aug"), ["--loss.views", "clean+aug+adv"])],
    ids=["crop", "simclr", "three views"],
)
def test_a_captured_step_takes_streamed_batches(backend, names, flags):
    """As a CUDA graph: the emulator's replays have the bits of plain steps; batches come with other numbers in the same shapes."""
    spec = feeds.FeedSpec(names, "simclr" if flags[:1] == ["--data.augment"] else "crop_flip", CPU, workers=0)
    split = sources.Split(IMAGES, LABELS)
    steps = {graph: make_step("--engine.graph", graph, *flags) for graph in ("on", "off")}
    for step in steps.values():
        feed = feeds.open_feed(backend, split, spec)
        step.load = feed.load
        with graphs.use_recorder(Emulator):
            for epoch in range(2):
                step.reset(SEEDS)
                for batch in feed.epoch(torch.arange(60), 12, seed=epoch):
                    assert all(len(part) == 12 for part in batch)
                    step(*batch, progress=0.5 * epoch)
    assert len(steps["on"]._graphs) == 1 and len(steps["off"]._graphs) == 0
    assert_same(steps["on"], steps["off"])


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """JPEG files of several sizes in two classes: a bright corner tells which."""
    root = tmp_path_factory.mktemp("photographs")
    rng = np.random.RandomState(0)
    for part, count in (("train", 24), ("test", 6)):
        for label, name in enumerate(("ape", "bee")):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                height, width = rng.randint(40, 70, 2)
                pixels = rng.randint(0, 120, (height, width, 3)).astype(np.uint8)
                pixels[:, : width // 2] += np.uint8(120 * label)
                Image.fromarray(pixels).save(root / part / name / f"{number}.jpg", quality=90)
    return root


FILES = (
    "--batch-size 12 --epochs 2 --data.image-size 32 --data.augment resized_crop_flip --data.limit 200 --optim.lr 0.01".split()
)


def files_config(root, *flags):
    return parse_flags([*SMALL, *FILES, "--data.source", f"folder:{root}", *flags], Config())


@pytest.mark.parametrize("backend", STREAMED)
def test_a_folder_is_trained_from_its_files_and_judged(backend, photographs, tmp_path, capsys):
    config = files_config(photographs, "--data.backend", backend, "--data.workers", "1", "--eval.attacks", "pgd2")
    images = load_images(config)
    assert isinstance(images.train, Encoded) and isinstance(images.test, Encoded)
    (result,) = train_and_judge(config, RunDir(tmp_path / "run"), resume=False, reporter=Reporter())
    assert result["count"] == 12
    said = f"data: kept as JPEG and PNG files: the {backend} backend decodes them batch by batch; fed by {backend}: data.backend"
    assert said in capsys.readouterr().out
    assert (tmp_path / "run" / "report.html").exists()


def test_evaluation_does_not_depend_on_how_the_images_are_kept(photographs, tmp_path):
    config = files_config(photographs, "--data.augment", "crop_flip", "--epochs", "1", "--eval.attacks", "pgd2")
    results = {}
    for backend in ("resident", "torch"):
        kept = parse_flags(["--data.backend", backend, "--data.workers", "0"], config)
        (results[backend],) = train_and_judge(kept, RunDir(tmp_path / backend), resume=False, reporter=Reporter())
    # The crops begin from the same decoded and resized squares: the training's bits agree too.
    assert results["resident"]["clean_per_class"] == results["torch"]["clean_per_class"]
    assert_equal_bits(weights(RunDir(tmp_path / "resident")), weights(RunDir(tmp_path / "torch")))


@pytest.mark.parametrize("backend", STREAMED)
def test_a_run_from_files_resumes_to_the_same_bits(backend, photographs, tmp_path):
    config = files_config(photographs, "--data.backend", backend, "--data.workers", "1", "--epochs", "3")
    images = load_images(config)
    whole = trained(tmp_path / "whole", config, images)

    class Killed(BaseException):
        pass

    class Stopping(Reporter):
        steps = 0

        def step(self):
            self.steps += 1
            if self.steps == 5:  # in the middle of epoch 2
                raise Killed

    with pytest.raises(Killed):
        trained(tmp_path / "cut", config, images, reporter=Stopping())
    assert len(RunDir(tmp_path / "cut").history()) == 1
    cut = trained(tmp_path / "cut", config, images, resume=True)
    assert_equal_bits(weights(cut), weights(whole))
    assert losses(cut) == losses(whole)


def test_resume_refuses_other_files(photographs, tmp_path):
    config = files_config(photographs, "--data.backend", "torch", "--data.workers", "0", "--epochs", "1")
    run = trained(tmp_path / "run", config)
    images = load_images(config)
    with pytest.raises(UserError, match="are not those that the run began with"):
        train(config, sources.ImageSet(images.name, images.class_names, images.val, images.val, images.test), run, resume=True)


@needs_dali
def test_anchor_trains_a_resnet50_on_224_pixels_through_dali(photographs, tmp_path):
    """Real images enlarged to photographs of many sizes, the ImageNet recipe at toy size."""
    root = tmp_path / "large"
    rng = np.random.RandomState(1)
    for path in photographs.glob("*/*/[0-7].jpg"):
        target = root / path.relative_to(photographs)
        target.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as image:
            image.resize(tuple(rng.randint(224, 400, 2)), Image.Resampling.BICUBIC).save(target)
    from fastanchor.settings import load_recipe

    flags = (
        f"--data.source folder:{root} --model.width 4 --model.head-hidden 16 --model.head-dim 8 --batch-size 6 --epochs 2 "
        "--data.val-fraction 0.2 --val.attack pgd2 --attack.steps 2 --optim.lr 0.01 --data.workers 2 --precision fp32"
    ).split()
    config = parse_flags(flags, load_recipe("anchor_resnet50_imagenet"))
    images = load_images(config)
    assert images.image_shape == (224, 224) and isinstance(images.train, Encoded) and images.train.sizes.unique().numel() > 4
    lines = []
    reporter = Reporter()
    reporter.say = lines.append
    run = trained(tmp_path / "run", config, images, reporter=reporter)
    assert any(line.startswith("data: kept as JPEG") and "; fed by dali: " in line for line in lines)
    assert len(run.history()) == 2 and all(np.isfinite(losses(run)))
    assert run.history()[0]["accuracy_adv"] >= 0


@pytest.mark.parametrize("backend", ["resident", *STREAMED])
def test_a_stage_gives_its_memory_back_before_the_next_begins(backend, tmp_path, monkeypatch):
    """Without the help of the cyclic collector, which may come late: on a GPU two sets and two stages' graphs do not fit."""
    opened, alive, open_feed = [], [], feeds.open_feed

    def watched(*args):
        alive.append([feed() is not None for feed in opened])
        feed = open_feed(*args)
        opened.append(weakref.ref(feed))
        return feed

    monkeypatch.setattr(feeds, "open_feed", watched)
    monkeypatch.setattr(loop, "check_device", lambda *args: None)
    flags = ["--stage2.mode", "alf", "--stage2.epochs", "1", "--data.workers", "0", "--engine.graph", "on"]
    config = config_of("--epochs", "1", "--data.limit", "60", "--data.backend", backend, *flags)
    gc.collect()
    gc.disable()
    try:
        with graphs.use_recorder(Emulator):
            trained(tmp_path / "run", config)
    finally:
        gc.enable()
    assert alive == ([[]] if backend == "resident" else [[], [False]])


@pytest.mark.parametrize("augment", ["crop_flip", "simclr"])
def test_a_resumed_run_keeps_the_backend_that_auto_chose(augment, photographs, tmp_path, monkeypatch):
    """Its bits are the backend's, and memory is another every time."""
    config = files_config(photographs, "--data.workers", "0", "--data.augment", augment, "--data.image-size", "48")
    monkeypatch.setattr(feeds, "free_memory", lambda device: 10**9)
    whole, cut = trained(tmp_path / "whole", config), RunDir(tmp_path / "cut")
    shutil.copytree(whole.path, cut.path)
    monkeypatch.setattr(feeds, "free_memory", lambda device: 1000)
    (cut.checkpoints / "previous.pt").replace(cut.checkpoints / "last.pt")
    train_and_judge(config, cut, resume=True, reporter=Reporter())
    assert cut.open().data.backend == whole.open().data.backend != "auto"
    assert_equal_bits(weights(cut), weights(whole))


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--data.sampler m_per_class --data.per-class 7", "data.per_class is 7, and it must divide the 32"),
        (
            "--data.sampler m_per_class --data.per-class 8 --stage2.mode alf --stage2.batch-size 50",
            "stage 2: data.per_class is 8",
        ),
        ("--data.decoder mixed", "data.decoder = mixed: needs a CUDA device, this is cpu"),
        ("--data.backend dali", "data.backend = dali: "),
    ],
)
def test_what_cannot_be_fed_is_said_before_the_run_s_folder_exists(flags, message, tmp_path, monkeypatch):
    monkeypatch.setattr(feeds, "find_dali", lambda: (False, "DALI is not installed"))
    with pytest.raises(UserError, match=f"^{message}"):
        trained(tmp_path / "run", config_of(*flags.split()))
    assert not (tmp_path / "run").exists()


def test_narrow_networks_on_photographs_are_refused_on_a_cpu(photographs, tmp_path):
    config = files_config(photographs, "--data.augment", "crop_flip", "--data.image-size", "56", "--epochs", "1")
    with pytest.raises(
        UserError, match="^channels_last = True: on a CPU torch's gradient of 1x1 convolutions of 4 channels is broken at 56 pix"
    ):
        trained(tmp_path / "run", config)
    assert not (tmp_path / "run").exists()
    trained(tmp_path / "run", parse_flags(["--no-channels-last"], config))
    loop.check_narrow_convolutions(build_model("resnet18", num_classes=2, width=16), (224, 224), CPU)
    loop.check_narrow_convolutions(build_model("resnet50", num_classes=2, width=4), (224, 224), CPU)


def test_samplers_and_extra_images(tmp_path):
    base = config_of("--epochs", "1", "--data.limit", "100", "--data.workers", "0")
    extra = tmp_path / "extra.npz"
    rng = np.random.RandomState(0)
    np.savez(extra, image=rng.randint(0, 256, (300, 32, 32, 3)).astype(np.uint8), label=rng.randint(0, 10, 300))
    for number, flags in enumerate(
        (
            "--data.sampler class_balanced",
            "--data.sampler m_per_class --data.per_class 4",
            f"--data.extra {extra} --data.extra-share 0.5",
        )
    ):
        config = parse_flags(flags.split(), base)
        first = trained(tmp_path / f"resident{number}", config)
        second = trained(tmp_path / f"torch{number}", parse_flags(["--data.backend", "torch"], config))
        assert_equal_bits(weights(first), weights(second))
        assert losses(first) == losses(second)
    assert losses(first) != losses(trained(tmp_path / "plain", base))


def test_extra_images_of_another_kind_are_refused(tmp_path, photographs):
    extra = tmp_path / "extra.npz"
    np.savez(extra, image=np.zeros((20, 16, 16, 3), np.uint8), label=np.zeros(20, np.int64))
    with pytest.raises(UserError, match="16x16"):
        load_images(config_of("--data.extra", str(extra)))
    with pytest.raises(UserError, match="data.extra: extra images are mixed into images decoded in memory only"):
        load_images(files_config(photographs, "--data.backend", "torch", "--data.extra", str(extra)))


# Which backend


def test_the_choice_and_its_reason(photographs, monkeypatch):
    cpu = torch.device("cpu")
    small = sources.load("synthetic", limit=200).train
    backend, why = feeds.choose("auto", small, cpu)
    assert (backend, why) == ("resident", "the images are in memory already")
    monkeypatch.setattr(feeds, "find_dali", lambda: (False, "DALI is not installed"))
    monkeypatch.setattr(feeds, "free_memory", lambda device: 1000)
    assert feeds.choose("auto", small, cpu)[0] == "resident"  # of what is there no copy is made
    both = "1.1 MiB of images do not fit into memory's 0.0 MiB, and DALI is not installed"
    assert feeds.choose("auto", Mixed(small, small), cpu) == ("torch", both)
    encoded = load_images(files_config(photographs, "--data.backend", "torch")).train
    assert feeds.choose("auto", encoded, cpu) == ("torch", "the images are kept encoded, and DALI is not installed")
    monkeypatch.setattr(feeds, "find_dali", lambda: (True, "DALI 2.4.0"))
    assert feeds.choose("auto", encoded, cpu) == ("dali", "the images are kept encoded; DALI 2.4.0")
    assert feeds.choose("torch", encoded, cpu) == ("torch", "data.backend = torch")


def test_backends_that_cannot_serve_are_refused(photographs, monkeypatch):
    cpu = torch.device("cpu")
    encoded = load_images(files_config(photographs, "--data.backend", "torch")).train
    with pytest.raises(UserError, match="data.backend = resident: keeps decoded images in memory"):
        feeds.open_feed("resident", encoded, feeds.FeedSpec(("aug",), "crop_flip", cpu))
    monkeypatch.setattr(feeds, "find_dali", lambda: (False, "not installed"))
    with pytest.raises(UserError, match="data.backend = dali: not installed"):
        feeds.choose("dali", encoded, cpu)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", STREAMED)
@pytest.mark.parametrize("graph", ["on", "off"])
def test_streamed_training_on_a_gpu(backend, graph, tmp_path):
    """Both backends take the host's draws, so the losses are those of torch's loader without a graph, to rounding."""
    flags = ["--device", "cuda", "--epochs", "2", "--data.workers", "2"]
    expected = trained(tmp_path / "plain", config_of(*flags, "--data.backend", "torch", "--engine.graph", "off"))
    run = trained(tmp_path / "run", config_of(*flags, "--data.backend", backend, "--engine.graph", graph))
    assert losses(run) == pytest.approx(losses(expected), rel=0.02)


@pytest.mark.gpu
@needs_dali
@pytest.mark.parametrize("decoder", ["mixed", "cpu"])
def test_photographs_on_a_gpu(decoder, photographs, tmp_path):
    config = files_config(photographs, "--data.backend", "dali", "--data.decoder", decoder, "--device", "cuda")
    assert np.isfinite(losses(trained(tmp_path / "run", config))).all()


def test_memory_of_a_container_counts(tmp_path, monkeypatch):
    files = {"memory.max": "1000000", "memory.current": "400000", "memory.stat": "anon 5\ninactive_file 100000\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(feeds, "CONTAINER", tmp_path)
    assert feeds.free_memory(CPU) == 700000
    assert feeds.budget(CPU) == 280000
    (tmp_path / "memory.max").write_text("max\n")
    assert feeds.free_memory(CPU) > 10**8
