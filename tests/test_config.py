"""Settings: every key's type and range, the errors' sentences, recipes and YAML files, and writing and reading back."""

import dataclasses
import inspect
import re
from typing import get_args, get_origin

import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fastanchor import settings
from fastanchor.config import Config, parse_number
from fastanchor.errors import UserError
from fastanchor.evaluate.protocol import parse_attack
from fastanchor.methods import METHODS
from fastanchor.settings import dump, from_dict, get, keys, load_file, load_recipe, parse_flags, ranges, recipe_names
from fastanchor.train.checks import check_config

KEYS = keys()
RANGES = ranges(Config())


def parse(*flags):
    return parse_flags(list(flags), Config())


def message_of(call, *args, **kwargs):
    with pytest.raises(UserError) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def nested(key, value):
    """The mapping that a recipe would hold for a dotted key."""
    *groups, name = key.split(".")
    for group in [name, *reversed(groups)]:
        value = {group: value}
    return value


def set_key(config, key, value):
    """The configuration with one dotted key replaced."""
    name, _, rest = key.partition(".")
    return dataclasses.replace(config, **{name: set_key(getattr(config, name), rest, value) if rest else value})


def flag(key):
    return "--" + key.replace("_", "-")


# -- numbers ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, value",
    [("8/255", 8 / 255), ("0.031", 0.031), ("1e-3", 1e-3), ("-1/2", -0.5), ("3", 3.0), (" 2 / 4 ", 0.5), ("1.5/255", 1.5 / 255), ("1/0", None), ("x", None),
     ("", None), ("8//255", None), ("1/2/3", None)],
)  # fmt: skip
def test_numbers_and_fractions(text, value):
    if value is None:
        with pytest.raises(ValueError):
            parse_number(text)
    else:
        assert parse_number(text) == value


@given(st.integers(-(10**6), 10**6), st.integers(1, 10**6))
def test_fractions_are_correctly_rounded(top, bottom):
    assert parse_number(f"{top}/{bottom}") == top / bottom


# -- ranges -----------------------------------------------------------------------------------------------------------------

NUMBERS = [-1e9, -3, -1, -0.5, -1e-9, 0, 1e-9, 0.1, 0.5, 0.500001, 0.999, 1, 2, 7, 7.5, 8, 500, 1e9]
INTERVALS = {  # what the sentence says, stated a second time
    "> 0": lambda v: v > 0, ">= 0": lambda v: v >= 0, ">= 1": lambda v: v >= 1,
    "in [0, 256]": lambda v: 0 <= v <= 256, "in [8, 4096]": lambda v: 8 <= v <= 4096,
    "in [0, 1)": lambda v: 0 <= v < 1, "in (0, 0.5]": lambda v: 0 < v <= 0.5, "in (0, 1)": lambda v: 0 < v < 1,
    "a list, each >= 0": lambda v: all(x >= 0 for x in v), "a list of at least one attack": lambda v: len(v) > 0,
}  # fmt: skip


def is_whole(key):
    hint = KEYS[key]
    return hint is int or int in get_args(hint)


def candidates(key):
    """Values of the key's type, in and out of every interval."""
    if key == "eval.attacks":
        return [(), ("pgd20",), ("fgsm", "pgd20")]
    if get_origin(KEYS[key]) is tuple:
        return [(), (0.0,), (3.0, 5.0), (-1.0,), (5.0, -0.5)]
    return [int(v) for v in NUMBERS if v == int(v)] if is_whole(key) else [float(v) for v in NUMBERS]


def shown(value):
    return f"{value:g}" if isinstance(value, float) else str(value)


def test_range_keys_exist_and_every_number_has_one():
    assert set(RANGES) <= set(KEYS)
    numeric = {
        key for key, hint in KEYS.items() if hint not in (str, bool) and "Literal" not in str(hint) and hint != (str | None)
    }
    assert numeric - set(RANGES) == {"loss.beta"}  # of any sign


@pytest.mark.parametrize("key", RANGES)
def test_every_range_is_what_its_sentence_says(key):
    test, sentence = RANGES[key]
    values = candidates(key)
    assert [bool(test(v)) for v in values] == [INTERVALS[sentence](v) for v in values]
    assert {bool(test(v)) for v in values} == {True, False}
    assert test(get(Config(), key)) if get(Config(), key) is not None else type(None) in get_args(KEYS[key])


@pytest.mark.parametrize("key", RANGES)
def test_values_out_of_range_are_refused_by_name(key):
    test, sentence = RANGES[key]
    bad = [v for v in candidates(key) if not test(v)]
    value = bad[-1]
    words = [repr(v) if isinstance(v, float) else str(v) for v in (value if isinstance(value, tuple) else (value,))]
    expected = f"{key} = {shown(value)}: must be {sentence}"
    assert message_of(parse, flag(key), *words) == expected
    in_recipe = list(value) if isinstance(value, tuple) else value
    assert message_of(from_dict, nested(key, in_recipe), "r.yaml") == f"r.yaml: {expected}"


@pytest.mark.parametrize("key", RANGES)
def test_values_in_range_are_taken(key):
    good = [v for v in candidates(key) if RANGES[key][0](v)]
    value = good[0]
    assert get(from_dict(nested(key, list(value) if isinstance(value, tuple) else value), "r.yaml"), key) == value


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_numbers_are_finite(value):
    assert message_of(parse, "--loss.beta", value) == f"loss.beta = {value}: must be a finite number"
    assert message_of(parse, "--optim.milestones", "3", value) == f"optim.milestones = {value}: must be a finite number"


# -- unknown keys, wrong types ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--attack.epz", "0.1"], "unknown setting attack.epz = 0.1; did you mean 'attack.eps'?"),
        (["--epoch", "3"], "unknown setting epoch = 3; did you mean 'epochs'?"),
        (["--epoch=3"], "unknown setting epoch = 3; did you mean 'epochs'?"),
        (["--milestones", "3"], "unknown setting milestones = 3; did you mean 'optim.milestones'?"),
        (["--no-epochs"], "unknown setting no_epochs; did you mean 'epochs'?"),
        (["--data.no-root", "x"], "unknown setting data.no_root = x; did you mean 'data.root'?"),
        (["--zzzzzzzzz"], "unknown setting zzzzzzzzz"),
        (["--attack", "3"], "unknown setting attack = 3; did you mean 'attack.bn'?"),
        (["stray"], "'stray' is not a flag; settings are written --key value"),
        (["--epochs", "x"], "epochs = x: must be a whole number"),
        (["--epochs", "1.5"], "epochs = 1.5: must be a whole number"),
        (["--epochs"], "epochs: must be a whole number"),
        (["--epochs="], "epochs = : must be a whole number"),
        (["--epochs", "3", "4"], "epochs = 3 4: takes one value"),
        (["--epochs", "None"], "epochs = None: must be a whole number"),
        (["--data.limit", "x"], "data.limit = x: must be a whole number or None"),
        (["--attack.eps", "8/0"], "attack.eps = 8/0: must be a number, such as 0.1 or 8/255"),
        (["--optim.clip-grad-norm", "x"], "optim.clip_grad_norm = x: must be a number, such as 0.1 or 8/255 or None"),
        (["--attack.norm", "l3"], "attack.norm = l3: must be one of linf, l2"),
        (["--attack.bn", "evil"], "attack.bn = evil: must be one of eval, train, train_frozen"),
        (["--optim.milestones", "3", "x"], "optim.milestones = 3 x: must be a list, each a number, such as 0.1 or 8/255"),
        (["--channels-last", "true"], "channels_last = true: takes no value; write --channels-last or its no- form"),
        (["--data.skip-broken=1"], "data.skip_broken = 1: takes no value; write --data.skip-broken or its no- form"),
        (["--eval.attacks"], "eval.attacks = (): must be a list of at least one attack"),
    ],
)
def test_bad_flags_are_one_sentence(flags, message):
    assert message_of(parse, *flags) == message


@pytest.mark.parametrize("key", KEYS)
def test_every_key_refuses_what_is_not_of_its_type(key):
    """In a recipe: a mapping for all, and a word where a number, a choice or a switch is wanted."""
    assert message_of(from_dict, nested(key, {"a": 1}), "r").startswith(f"r: {key} is not a group of settings")
    if KEYS[key] in (str, tuple[str, ...]) or KEYS[key] == (str | None):
        return
    message = message_of(from_dict, nested(key, "zz"), "r")
    assert message.startswith(f"r: {key} = zz: must be ")
    assert message.removeprefix(f"r: {key} = zz: must be ") == (
        "true or false" if KEYS[key] is bool else settings._describe(KEYS[key])
    )


def test_narrow_terminals_do_not_change_messages(monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    for key in ("loss.beta_warmup_epochs", "stage2.weight_decay"):
        assert message_of(parse, flag(key), "x") == f"{key} = x: must be a number, such as 0.1 or 8/255"


# -- ways of writing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, key, value",
    [
        (["--attack.eps", "4/255"], "attack.eps", 4 / 255),
        (["--attack.eps=4/255"], "attack.eps", 4 / 255),
        (["--attack.step-size", "0.1"], "attack.step_size", 0.1),
        (["--attack.step_size=0.1"], "attack.step_size", 0.1),
        (["--batch-size", "7"], "batch_size", 7),
        (["--batch_size", "7"], "batch_size", 7),
        (["--loss.beta", "-1.5"], "loss.beta", -1.5),
        (["--loss.beta", "-1/2"], "loss.beta", -0.5),
        (["--loss.beta", "-1e-3"], "loss.beta", -1e-3),
        (["--loss.beta=-1/2"], "loss.beta", -0.5),
        (["--no-channels-last"], "channels_last", False),
        (["--no_channels_last"], "channels_last", False),
        (["--no-channels-last", "--channels-last"], "channels_last", True),
        (["--data.skip-broken"], "data.skip_broken", True),
        (["--data.skip-broken", "--data.no-skip-broken"], "data.skip_broken", False),
        (["--data.limit", "50"], "data.limit", 50),
        (["--data.limit", "50", "--data.limit", "None"], "data.limit", None),
        (["--optim.clip-grad-norm", "1/2"], "optim.clip_grad_norm", 0.5),
        (["--optim.milestones", "3", "7/2"], "optim.milestones", (3.0, 3.5)),
        (["--optim.milestones"], "optim.milestones", ()),
        (["--eval.attacks", "fgsm", "pgd20:eps=0.031,step_size=0.003"], "eval.attacks", ("fgsm", "pgd20:eps=0.031,step_size=0.003")),
        (["--epochs", "3", "--epochs", "4"], "epochs", 4),
        (["--data.source", "folder:/a b/ü=1"], "data.source", "folder:/a b/ü=1"),
        (["--data.root=--epochs"], "data.root", "--epochs"),
        (["--attack.objective", "ce+hsc"], "attack.objective", "ce+hsc"),
    ],
)  # fmt: skip
def test_ways_of_writing_flags(flags, key, value):
    assert parse(*flags) == set_key(Config(), key, value)


@pytest.mark.parametrize(
    "values, key, value",
    [
        ({"attack": {"eps": "4/255"}}, "attack.eps", 4 / 255),
        ({"attack.eps": "4/255"}, "attack.eps", 4 / 255),
        ({"optim": {"lr": "1e-4"}}, "optim.lr", 1e-4),
        ({"channels_last": False}, "channels_last", False),
        ({"data": {"skip_broken": True}}, "data.skip_broken", True),
        ({"data": {"limit": None}}, "data.limit", None),
        ({"eval": {"attacks": "pgd20"}}, "eval.attacks", ("pgd20",)),
        ({"optim": {"milestones": []}}, "optim.milestones", ()),
        ({"optim": {"milestones": (1, 2.5)}}, "optim.milestones", (1.0, 2.5)),
        ({"optim": {"milestones": [1, "3/2"]}}, "optim.milestones", (1.0, 1.5)),
        ({"data": {"root": "--epochs"}}, "data.root", "--epochs"),
        ({"data": {"root": "-x"}}, "data.root", "-x"),
        ({}, "epochs", 110),
    ],
)
def test_ways_of_writing_recipes(values, key, value):
    assert from_dict(values, "r") == set_key(Config(), key, value)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"atack": {"eps": 1}}, "r: atack is not a group of settings; did you mean 'attack'?"),
        ({"attack": {"epz": 1}}, "r: unknown setting attack.epz = 1; did you mean 'attack.eps'?"),
        ({"epochz": 1}, "r: unknown setting epochz = 1; did you mean 'epochs'?"),
        ({"attack": 3}, "r: unknown setting attack = 3; did you mean 'attack.bn'?"),
        ({"attack": None}, "r: unknown setting attack = None; did you mean 'attack.bn'?"),
        ({"epochs": {"a": 1}}, "r: epochs is not a group of settings"),
        ({"epochs": [1, 2]}, "r: epochs = 1 2: takes one value"),
        ({"epochs": True}, "r: epochs = True: must be a whole number"),
        ({"epochs": 3.0}, "r: epochs = 3.0: must be a whole number"),
        ({"channels_last": "yes"}, "r: channels_last = yes: must be true or false"),
        ({"channels_last": None}, "r: channels_last = None: must be true or false"),
        ({"help": True}, "r: unknown setting help = True"),
        ({1: 2}, "r: unknown setting 1 = 2"),
        ([1], "r: a recipe is a mapping of settings, found list"),
        ("epochs", "r: a recipe is a mapping of settings, found str"),
    ],
)
def test_bad_recipes_are_one_sentence(values, message):
    assert message_of(from_dict, values, "r") == message


# -- files ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, message",
    [
        (b"attack: [1, 2", r"not valid YAML in line 1: "),
        (b"epochs: 3\nattack:\n\t- eps", r"not valid YAML in line 3: found character '\\t' that cannot start any token"),
        (b"epochs: 3\n  lr: 4\n", r"not valid YAML in line 2: mapping values are not allowed here"),
        (b"", r"a recipe is a mapping of settings, found NoneType"),
        (b"- epochs", r"a recipe is a mapping of settings, found list"),
        (b"just words", r"a recipe is a mapping of settings, found str"),
        (b"\xff\xfe\x00\x81", r"cannot be read: 'utf-8' codec can't decode byte 0xff"),
        (b"a\x00b: 1", r"not valid YAML: unacceptable character #x0000"),
        (b"seed: 2024-13-45", r"not valid YAML: month must be in 1..12"),
        (b"epochs: !!python/object/apply:os.getcwd []", r"not valid YAML in line 1: could not determine a constructor"),
        (b"? [a, b]\n: 1", r"not valid YAML in line 1: found unhashable key"),
        (b"epochs: 0", r"epochs = 0: must be >= 1"),
    ],
)
def test_bad_files_are_one_sentence(tmp_path, content, message):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    for read in (load_file, lambda p: load_recipe(str(p))):
        assert re.match(re.escape(f"{path}: ") + message, message_of(read, path))


def test_missing_files_and_folders(tmp_path):
    missing = tmp_path / "no.yaml"
    assert message_of(load_recipe, str(missing)) == f"{missing}: no such file"
    assert message_of(load_recipe, str(tmp_path)).startswith(f"{tmp_path}: cannot be read: ")


def test_recipe_file_with_a_byte_order_mark_and_comments(tmp_path):
    path = tmp_path / "own.yml"
    path.write_bytes("\ufeff# méthode\nepochs: 3\n".encode())
    assert load_recipe(str(path)) == set_key(Config(), "epochs", 3)


# -- recipes ----------------------------------------------------------------------------------------------------------------


def test_names_of_recipes():
    names = recipe_names()
    assert {"anchor_resnet18_cifar10", "pgd_at_resnet18_cifar10", "standard_resnet18_cifar10"} <= set(names)
    for short in ("anchor", "pgd_at", "standard"):
        assert load_recipe(short) == load_recipe(f"{short}_resnet18_cifar10")
    message = message_of(load_recipe, "ancor")
    assert message == (
        f"recipe 'ancor' is not known; did you mean 'anchor'?; recipes: {', '.join(names)}, or the path of a .yaml file"
    )
    assert "did you mean 'standard_resnet18_cifar10'?" in message_of(load_recipe, "standard_resnet18_cifar")
    assert message_of(load_recipe, 3).startswith("recipe '3' is not known")


def test_the_help_of_method_names_all_of_them():
    text = inspect.getsource(Config)
    listed = text[text.index('"""', text.index("method: str")) :].split(", or the path")[0]
    assert re.findall(r"\w+", listed.replace("(undefended training)", "")) == sorted(METHODS)


@pytest.mark.parametrize("name", recipe_names())
def test_packaged_recipes_are_complete_and_go_together(name):
    config = load_recipe(name)
    if config.method == "clead_code":
        assert message_of(check_config, config).startswith("loss.source = None: must be the run or checkpoint")
        config = set_key(config, "loss.source", __file__)
    check_config(config)
    source, eps = ("folder:imagenet", [4 / 255]) if name.endswith("imagenet") else ("cifar10", [8 / 255, 0.031])
    assert config != Config() and config.data.source == source and config.attack.eps in eps
    steps = [8 / 765] if name.endswith("imagenet") else [2 / 255, 0.007]
    assert config.attack.steps == 1 or config.attack.step_size in steps or config.method == "clead_code"
    for text in (*config.eval.attacks, config.val.attack):
        assert parse_attack(text, default_eps=config.attack.eps).eps > 0
    assert from_dict(settings.to_dict(config), "again") == config


@pytest.mark.parametrize("name", [None, *recipe_names()])
def test_dump_reads_back_equal(tmp_path, name):
    config = Config() if name is None else load_recipe(name)
    (tmp_path / "config.yaml").write_text(dump(config), encoding="utf-8")
    assert load_file(tmp_path / "config.yaml") == config


text = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=20)


@given(
    eps=st.floats(0, 10), lr=st.floats(1e-300, 10), beta=st.floats(allow_nan=False, allow_infinity=False), seed=st.integers(0, 2**70),
    milestones=st.lists(st.floats(0, 1e6), max_size=4), limit=st.none() | st.integers(1, 10**9), switch=st.booleans(),
    root=st.none() | text.filter(lambda s: s != "None"), attacks=st.lists(text, min_size=1, max_size=3),
)  # fmt: skip
@example(8 / 255, 2e-5, -0.0, 0, [], None, True, "--epochs 3", ["pgd20:eps=8/255", "null"])
@example(0.0, 1e-300, -1e-7, 0, [1e5], 1, False, "on", ["3", "1e5"])
@hypothesis_settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_configuration_reads_back_equal(tmp_path, eps, lr, beta, seed, milestones, limit, switch, root, attacks):
    config = Config(seed=seed, channels_last=switch)
    for key, value in (("attack.eps", eps), ("optim.lr", lr), ("loss.beta", beta), ("optim.milestones", tuple(milestones)),
                       ("data.limit", limit), ("data.root", root), ("eval.attacks", tuple(attacks))):  # fmt: skip
        config = set_key(config, key, value)
    (tmp_path / "config.yaml").write_text(dump(config), encoding="utf-8")
    assert load_file(tmp_path / "config.yaml") == config


def test_flags_beat_the_recipe_and_leave_the_rest():
    recipe = load_recipe("anchor")
    config = parse_flags(["--attack.eps", "4/255", "--eval.attacks", "fgsm", "--no-channels-last"], recipe)
    expected = set_key(set_key(set_key(recipe, "attack.eps", 4 / 255), "eval.attacks", ("fgsm",)), "channels_last", False)
    assert config == expected
    assert parse_flags([], recipe) == recipe


@pytest.mark.parametrize("name", ["anchor", "standard"])
def test_help_lists_every_key_with_the_recipes_value(capsys, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "80")  # one column of settings
    recipe = load_recipe(name)
    with pytest.raises(SystemExit) as stop:
        parse_flags(["--help"], recipe)
    assert not stop.value.code
    # A setting is a line `  --key KIND`, then its text further to the right.
    _, *parts = re.split(r"^  (--[\w.-]+).*$", capsys.readouterr().out, flags=re.MULTILINE)
    texts = {name: " ".join(text.split()) for name, text in zip(parts[::2], parts[1::2], strict=True)}
    for key in keys(type(recipe)):
        value = get(recipe, key)
        words = [f"{v:g}" if isinstance(v, float) else str(v) for v in (value if isinstance(value, tuple) else (value,))]
        assert f"(default: {' '.join(words)})" in texts[flag(key)], key
    assert texts["--attack.steps"] == f"Gradient steps. (default: {recipe.attack.steps})"


# -- settings that do not go together ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--attack.objective", "hsc", "--loss.hsc", "0"],
         "attack.objective = hsc: needs loss.hsc > 0, the attack would have nothing to maximise"),
        (["--attack.objective", "ce+hsc", "--loss.hsc", "0"],
         "attack.objective = ce+hsc: needs loss.hsc > 0, the attack would have nothing to maximise"),
        (["--loss.ce-adv", "0", "--loss.hsc", "0"], "loss.ce_adv = loss.ce_clean = loss.hsc = 0: at least one must be > 0"),
        (["--method", "standard", "--stage2.mode", "alf"], "stage2.mode = alf: undefended training has no stage 2; write none"),
        (["--method", "trades", "--attack.objective", "kl", "--attack.start-radius", "0"],
         "attack.start_radius = 0: the objective kl has no gradient at the clean images; write a radius > 0"),
        (["--attack.no-project", "--attack.eps", "0"],
         "attack.eps = 0: bounds nothing where attack.project is false; the method standard trains on clean images"),
        (["--attack.start", "zero", "--attack.start-radius", "0.1"],
         "attack.start_radius = 0.1: is that of start = uniform or bernoulli, not of zero"),
        (["--method", "trades", "--attack.objective", "ce+hsc"],
         "attack.objective = ce+hsc: the adversary of TRADES maximises kl or ce"),
        (["--method", "supcon"],
         "stage2.mode = none: nothing in SupCon trains the classifier; write slf, alf or aff"),
        (["--engine.kernels", "on", "--loss.beta", "500"],
         "engine.kernels = on: exp weights need |beta| <= 40, loss.beta = 500"),
        (["--optim.nesterov", "--optim.momentum", "0"], "optim.nesterov: needs optim.momentum > 0"),
        (["--val.attack", "autoattack"], "val.attack = autoattack: too slow for every epoch; use pgdN or cwN"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together(flags, message):
    assert message_of(check_config, parse(*flags)) == message


@pytest.mark.parametrize("flags", [["--val.attack", "pgdx"], ["--eval.attacks", "fgsm", "pgdx"]])
def test_attacks_are_checked_before_training(flags):
    assert message_of(check_config, parse(*flags)).startswith("attack 'pgdx': 'pgdx' is not known; did you mean 'pgd20'?")


def test_good_settings_pass():
    check_config(Config())
    check_config(parse("--method", "standard"))
    check_config(parse("--loss.hsc", "0", "--attack.objective", "ce"))


@pytest.mark.parametrize("key", ["graph", "kernels"])
def test_on_and_off_of_yaml_are_texts(tmp_path, key):
    """YAML reads them as truth values."""
    for text, value in (("off", "off"), ("on", "on"), ("auto", "auto")):
        (tmp_path / "recipe.yaml").write_text(f"engine: {{{key}: {text}}}\n")
        assert getattr(load_file(tmp_path / "recipe.yaml").engine, key) == value
