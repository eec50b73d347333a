"""What the commands print with --json is what `converter.schema` says, and the schema is strict."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner
from jsonschema import Draft202012Validator

from converter import schema
from converter.cli import main
from tests.models import random_hf

VALIDATOR = Draft202012Validator(schema.load())
Documents = dict[str, dict[str, Any]]


def faults(document: Any) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in VALIDATOR.iter_errors(document)]


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Documents:
    """One document of every kind, from the commands themselves."""
    root = tmp_path_factory.mktemp("schema")
    hf, other = random_hf(root / "hf"), random_hf(root / "other", seed=1)

    def run(*arguments: object, code: int = 0) -> dict[str, Any]:
        result = CliRunner().invoke(main, [*map(str, arguments), "--json"])
        assert result.exit_code == code, result.output
        document: dict[str, Any] = json.loads(result.stdout)
        return document

    manifest = root / "manifest.jsonl"
    line = {"command": "hf-to-tl", "source": str(hf), "output": str(root / "many"), "verify": False}
    rows = [line, line | {"source": str(root / "no"), "output": str(root / "none")}]
    manifest.write_text("\n".join(map(json.dumps, rows)))
    result = CliRunner().invoke(main, ["batch", str(manifest), "--json"])
    batch = dict(zip(("batch line", "batch failed", "batch"), result.stdout.splitlines()))  # noqa: B905

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("converter.demo.tour.MODEL", hf)
        demo = run("demo", root / "demo")
    return {
        "demo": demo,
        "hf-to-tl": run("hf-to-tl", hf, root / "tl", "--process", "default"),
        "tl-to-hf": run("tl-to-hf", root / "tl", root / "back", "--no-verify"),
        "bake": run("bake", hf, root / "baked", "--dtype", "float16"),
        "dry run": run("hf-to-tl", hf, root / "dry", "--dry-run"),
        "export-onnx": run("export-onnx", root / "baked"),
        "verify": run("verify", hf, root / "tl"),
        "verify failed": run("verify", hf, other, code=1),
        "verify weights": run("verify", hf, root / "tl", "--check", "weights"),
        "reference": run("reference", hf, root / "hf.reference"),
        "explain": run("explain", hf, root / "tl"),
        "explain different": run("explain", hf, other),
        "inspect": run("inspect", root / "tl"),
        "env": run("env"),
        "error": run("hf-to-tl", root / "nothing", root / "out", code=3),
        **{name: json.loads(text) for name, text in batch.items()},
        "usage error": run("hf-to-tl", hf, root / "tl", code=2),
        "no such option": run("verify", hf, "--efort", "quick", code=2),
        "no such choice": run("bake", hf, root / "b", "--effort", "most", code=2),
        "no argument": run("batch", code=2),
        "no such command": run("hf-to-lt", hf, code=2),
    }


def test_the_schema_is_one() -> None:
    Draft202012Validator.check_schema(schema.load())


def test_every_command_keeps_it(documents: Documents) -> None:
    named = {document["command"] for document in documents.values()}
    assert named == {*main.commands, "neoconvert"}
    assert {name: found for name, d in documents.items() if (found := faults(d))} == {}


def test_what_click_refuses(documents: Documents) -> None:
    error = documents["no such option"]["error"]
    assert error.pop("what").startswith("No such option '--efort'.")
    assert error == {
        "type": "UsageError",
        "where": "neoconvert verify",
        "do": "See neoconvert verify --help.",
    }
    assert documents["no such command"]["error"]["where"] == "neoconvert"
    shown = CliRunner().invoke(main, ["verify", "--efort", "quick", "--json"]).stderr
    assert shown == CliRunner().invoke(main, ["verify", "--efort", "quick"]).stderr


def test_a_failed_conversion_shows_its_verification(documents: Documents) -> None:
    verified = {key: documents["verify failed"][key] for key in ("passed", "runtimes", "probes")}
    failed = documents["error"] | {"exit_code": 1, "verification": verified}
    assert len(faults(failed)) == 2, "weights and first_divergence are missing"


def required(node: Any, rule: Any) -> Iterator[tuple[Any, str]]:
    """Each object in a document with each key that the schema says it must have."""
    rules = [rule]
    while rules:
        rule = rules.pop()
        if "$ref" in rule:
            rules.append(schema.load()["$defs"][rule["$ref"].removeprefix("#/$defs/")])
        rules += [*rule.get("allOf", ()), *rule.get("anyOf", ())]
        if "if" in rule:
            holds = Draft202012Validator(rule["if"]).is_valid(node)
            rules.append(rule["then"] if holds else rule.get("else", {}))
        if isinstance(node, dict):
            yield from ((node, key) for key in rule.get("required", ()) if key in node)
            named = rule.get("properties", {})
            for key, value in node.items():
                yield from required(value, named.get(key, rule.get("additionalProperties", {})))
        if isinstance(node, list) and node:
            yield from required(node[0], rule.get("items", {}))


@pytest.mark.parametrize(
    "name",
    ["hf-to-tl", "verify failed", "explain", "inspect", "error", "batch line", "batch failed"],
)
def test_a_required_key_that_is_lost_or_mistyped(name: str, documents: Documents) -> None:
    document = copy.deepcopy(documents[name])
    places = list(required(document, schema.load()))
    assert len(places) > 7
    for place, key in places:
        value = place.pop(key)
        assert faults(document), f"without {key}"
        place[key] = object()
        assert faults(document), f"with {key} of no JSON type"
        place[key] = value
    assert not faults(document)


def test_more_keys_may_come(documents: Documents) -> None:
    document = copy.deepcopy(documents["verify"])
    document["new"] = document["probes"][0]["new"] = {"anything": [1]}
    assert not faults(document)


def test_numbers_that_are_not_finite_are_null(documents: Documents) -> None:
    document = copy.deepcopy(documents["verify"])
    document["probes"][0]["ratio"] = None
    assert not faults(document)
    document["probes"][0]["ratio"] = "NaN"
    assert faults(document)
