"""Is a file what bench/, or `fastanchor bench-data`, writes? Checked against schemas/*.json: every field, with its unit.

    python -m bench.schema FILE...

Beyond the schemas: no number but a computed outcome is NaN or infinite, and a range contains what it is the range of. Parts and
fields that the schemas do not know are let through. Exit status 0, or 2 with a sentence for each file that is none.
"""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastanchor.errors import UserError

FOLDER = Path(__file__).parent / "schemas"
# Which schema, by a key that only its files have; in this order.
BY_KEY = {"results": "run", "ladders": "ladder", "benchmarks": "bench", "turned_bad": "compare"}
# By `kind`, which is then the schema's name.
BY_KIND = ("agreement", "bench-data")
PROGRAMS = (
    "bench.gpu, bench.peers, bench.speedrun, bench.ladder, bench.compare, bench.aot, bench.agreement, make bench or fastanchor "
    "bench-data"
)
# Keys of `make bench` that begin with a recipe's name: a schema cannot ask for them.
OF_A_RECIPE = ("median_s", "range_s", "ratio_median", "ratio_range")
# A range and its median come out of the same numbers, but JSON's decimals may be another program's.
ROUNDING = 1e-9


def kind_of(found: Any) -> str:
    """run | ladder | bench | compare | aot | agreement | bench-data: the schema of a file. UserError where it is of none."""
    if isinstance(found, dict):
        for key, name in BY_KEY.items():
            if key in found:
                return name
        if "rows" in found and "gpu" in found:
            return "aot"
        if found.get("kind") in BY_KIND:
            return found["kind"]
    raise UserError(f"is no file of {PROGRAMS}")


def validate(found: dict[str, Any]) -> None:
    """Raises UserError that names the field, its value and what is expected, for the first field that is wrong."""
    name = kind_of(found)
    errors = sorted(_validator(name).iter_errors(found), key=lambda error: [str(part) for part in error.absolute_path])
    if errors:
        error = errors[0]
        while error.context:  # of anyOf and the like, the alternative that came closest
            error = min(error.context, key=lambda inner: (-len(inner.absolute_path), inner.validator == "type"))
        raise UserError(f"{_place(found, list(error.absolute_path))}: {_expected(error)}")
    for i, entry in enumerate(found["benchmarks"] if name == "bench" else ()):
        needed = (f"{recipe}_{key}" for recipe in entry["extra_info"].get("flops_ratio", ()) for key in OF_A_RECIPE)
        if missing := [key for key in needed if key not in entry["extra_info"]]:
            raise UserError(f"{_place(found, ['benchmarks', i, 'extra_info'])}: {missing[0]!r} is missing")
    for where, span, key, value in _ranges(found, []):
        low, high = span
        if low > high:
            raise UserError(f"{_place(found, where)} = {span}: must be the least and then the greatest")
        if value is not None and not low - ROUNDING * abs(low) <= value <= high + ROUNDING * abs(high):
            raise UserError(f"{_place(found, where)} = {span}: must contain {key}, which is {value}")


def read(path: Path) -> Any:
    """What a file of JSON holds, whatever it is. UserError, with the file's name, where it cannot be read or is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):  # also bytes that are no text, and brackets within brackets by the thousand
        raise UserError(f"{path}: is not JSON") from None


def load(path: Path) -> dict[str, Any]:
    """The file's JSON, validated. UserError, with the file's name, where it cannot be read or is not valid."""
    found = read(path)
    try:
        validate(found)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return found


@functools.cache
def _validator(name: str) -> Any:
    try:
        import jsonschema
        from referencing import Registry, Resource
    except ImportError:
        raise UserError('checking a file needs jsonschema: pip install "fastanchor[dev]"') from None
    schemas = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))}
    registry = Registry().with_resources([(file, Resource.from_contents(schema)) for file, schema in schemas.items()])
    plain = jsonschema.Draft202012Validator
    # JSON has no NaN, Python's reader takes it: no number of a schema is one.
    checker = plain.TYPE_CHECKER.redefine("number", lambda _, value: _is_number(value) and math.isfinite(value))
    validator = jsonschema.validators.extend(plain, type_checker=checker)
    return validator(schemas[f"{name}.json"], registry=registry)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _place(found: Any, path: list[str | int]) -> str:
    """`results[3].ms (attack: naive, fp32)`: the field, and which result it belongs to."""
    text, said, here = "", "", found
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
        here = here[step]
        if isinstance(step, int) and isinstance(here, dict) and isinstance(here.get("name"), str):
            said = f" ({here['part']}: {here['name']})" if isinstance(here.get("part"), str) else f" ({here['name']})"
    return f"{text or 'the file'}{said}"


def _expected(error: Any) -> str:
    """The sentence's end: what the field holds and what it must be."""
    value = error.instance
    shown = value if isinstance(value, (int, float, bool)) or value is None else repr(value)
    shown = f"{str(shown)[:60]}..." if len(str(shown)) > 60 else shown
    match error.validator:
        case "required":
            return error.message.replace(" is a required property", " is missing")
        case "type":
            kinds = [error.validator_value] if isinstance(error.validator_value, str) else error.validator_value
            return f"is {shown}: must be {' or '.join('a finite number' if kind == 'number' else kind for kind in kinds)}"
        case "minimum":
            return f"is {shown}: must be at least {error.validator_value}"
        case "maximum":
            return f"is {shown}: must be at most {error.validator_value}"
        case "exclusiveMinimum":
            return f"is {shown}: must be above {error.validator_value}"
        case "const":
            return f"is {shown}: must be {error.validator_value!r}"
        case "enum":
            return f"is {shown}: must be of {', '.join(repr(choice) for choice in error.validator_value)}"
        case "not":
            return f"is {shown}: must be a number"
        case "minItems" | "maxItems":
            return f"is {shown}: must have {error.validator_value} entries"
        case "minLength" | "minProperties":
            return "is empty"
    return error.message[:200]


def _ranges(found: Any, path: list[str | int]) -> Iterator[tuple[list[str | int], list[float], str, float | None]]:
    """(where, [least, greatest], name, value) of every range, with the median or mean that belongs to it."""
    children = enumerate(found) if isinstance(found, list) else found.items() if isinstance(found, dict) else ()
    for key, value in children:
        if isinstance(key, str) and key.endswith(("_range", "_range_s")) and _is_span(value):
            owners = (key.replace("_range", end) for end in ("", "_median", "_ms"))
            owner = next((name for name in owners if _is_number(found.get(name))), None)
            yield [*path, key], value, owner or "", found.get(owner)
        else:
            yield from _ranges(value, [*path, key])
    if isinstance(found, dict) and all(_is_number(found.get(key)) for key in ("min", "median", "max")):
        yield path, [found["min"], found["max"]], "median", found["median"]


def _is_span(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    files = sys.argv[1:] if arguments is None else arguments
    if not files or any(file.startswith("-") for file in files):
        print("usage: python -m bench.schema FILE...", file=sys.stderr)
        return 0 if files in (["-h"], ["--help"]) else 2
    bad = 0
    for file in files:
        try:
            found = load(Path(file))
            print(f"{file}: valid ({_validator(kind_of(found)).schema['title'].partition(':')[0]})")
        except UserError as error:
            print(f"bench.schema: {error}", file=sys.stderr)
            bad = 2
    return bad


if __name__ == "__main__":
    sys.exit(main())
