"""The statements beside an artifact, as others' tools read them; and directories that others sign."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import converter
from converter.checkpoint.record import changes, rerecord
from tests.models import random_hf

PAGE = Path(__file__).parent.parent / "docs/files.md"
Statements = list[dict[str, Any]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("attested")
    source = random_hf(root / "neo", seed=3, scale=1.5)
    converter.hf_to_tl(source, root / "verified", process="default", effort="quick", graph=converter.Graph())  # fmt: skip
    converter.bake(source, root / "unverified", check=False)
    return root


def statements(directory: Path) -> Statements:
    text = (directory / "neoconvert.intoto.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def provenance(root: Path) -> dict[str, Any]:
    return statements(root / "verified")[0]


@pytest.fixture
def result(root: Path) -> dict[str, Any]:
    return statements(root / "verified")[1]


def test_the_subjects_are_the_files(root: Path) -> None:
    for name in ("verified", "unverified"):
        files = {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in (root / name).iterdir()
            if not path.name.startswith("neoconvert.")
        }
        assert len(files) > 2
        for statement in statements(root / name):
            assert statement["_type"] == "https://in-toto.io/Statement/v1"
            assert {s["name"]: s["digest"]["sha256"] for s in statement["subject"]} == files
        assert changes(root / name) == {}


def test_provenance_says_what_was_asked_and_from_what(
    provenance: dict[str, Any], root: Path
) -> None:
    assert provenance["predicateType"] == "https://slsa.dev/provenance/v1"
    definition = provenance["predicate"]["buildDefinition"]
    asked = definition["externalParameters"]
    assert (asked["source"], asked["command"], asked["ledger"]) == ("neo", "hf-to-tl", "compact")
    assert "fold_ln" in asked["process"]
    assert "check" not in asked
    became = definition["internalParameters"]
    assert became["applied"] == asked["process"]
    assert not set(became) & set(asked)
    assert len({d["name"] for d in definition["resolvedDependencies"]}) > 1
    config = hashlib.sha256((root / "neo/config.json").read_bytes()).hexdigest()
    assert {"name": "neo/config.json", "digest": {"sha256": config}} in definition["resolvedDependencies"]  # fmt: skip
    builder = provenance["predicate"]["runDetails"]["builder"]
    assert builder["version"]["neoconvert"] == converter.__version__


def test_the_result_names_every_test(result: dict[str, Any], root: Path) -> None:
    assert result["predicateType"] == "https://in-toto.io/attestation/test-result/v0.1"
    predicate = result["predicate"]
    verification = json.loads((root / "verified/neoconvert.json").read_text())["verification"]
    assert predicate["result"] == "PASSED"
    assert predicate["failedTests"] == []
    probes = {f"{p['runtime']}: {p['name']}" for p in verification["probes"]}
    links = {
        f"{e['link']}: {e['subject']}" for e in verification["evidence"] if e["outcome"] == "same"
    }
    assert "weights: the weights" in links
    assert set(predicate["passedTests"]) == probes | links
    assert predicate["configuration"][0]["annotations"]["effort"] == "quick"


def test_a_verification_says_nothing_of_places(root: Path) -> None:
    """With a graph and a processed model: every runtime, every link."""
    for name in ("neoconvert.json", "neoconvert.intoto.jsonl"):
        text = (root / "verified" / name).read_text()
        for place in (str(root), ".partial", str(Path.home()), sys.prefix):
            assert place not in text, (name, place)


def test_what_was_not_verified_has_no_result(root: Path) -> None:
    assert [s["predicateType"] for s in statements(root / "unverified")] == [
        "https://slsa.dev/provenance/v1"
    ]


def test_what_was_edited_is_attested_no_more(root: Path, tmp_path: Path) -> None:
    converter.bake(root / "neo", tmp_path / "out", check=False)
    (tmp_path / "out/generation_config.json").write_text("{}")
    rerecord(tmp_path / "out")
    assert not (tmp_path / "out/neoconvert.intoto.jsonl").exists()


def test_a_hub_model_has_its_package_url() -> None:
    from converter.checkpoint.attestation import lines

    commit = "0123456789abcdef0123456789abcdef01234567"
    document = {
        "files": {"config.json": {"bytes": 1, "sha256": "ab"}},
        "source": {"given": "EleutherAI/gpt-neo-125m", "revision": commit, "tensors": {}},
        "output": {"layout": "hf"},
        "source_sha256": "cd",
        "versions": {},
        "options": {},
        "route": "plain",
        "steps": [],
        "reverse": "none",
        "verification": None,
    }
    (line,) = lines(document).splitlines()
    (source,) = json.loads(line)["predicate"]["buildDefinition"]["resolvedDependencies"]
    assert source["uri"] == f"pkg:huggingface/EleutherAI/gpt-neo-125m@{commit}"
    assert source["digest"] == {"neoconvertTensors": "cd", "gitCommit": commit}


@pytest.mark.parametrize("which", ["provenance", "result"])
def test_in_toto_reads_it(which: str, request: pytest.FixtureRequest) -> None:
    """Strictly: no field that the specification does not name, and none of another type."""
    pytest.importorskip("in_toto_attestation", reason="needs in-toto-attestation (the dev extra)")
    from google.protobuf import json_format  # type: ignore[import-untyped]
    from in_toto_attestation.predicates.provenance.v1.provenance_pb2 import Provenance
    from in_toto_attestation.predicates.test_result.v0.test_result_pb2 import TestResult
    from in_toto_attestation.v1.statement import Statement
    from in_toto_attestation.v1.statement_pb2 import Statement as Message

    def read(document: dict[str, Any]) -> Any:
        message = json_format.ParseDict(document, Message())
        Statement.copy_from_pb(message).validate()
        predicate: Any = Provenance() if which == "provenance" else TestResult()
        json_format.ParseDict(document["predicate"], predicate)
        return predicate

    document = request.getfixturevalue(which)
    predicate = read(document)
    if which == "provenance":
        assert predicate.build_definition.build_type == "urn:neoconvert:conversion:1"
        assert predicate.run_details.builder.id == "urn:neoconvert:cli"
    else:
        assert (predicate.result, len(predicate.configuration)) == ("PASSED", 1)
    faults: list[dict[str, Any]] = [
        {"_type": "https://in-toto.io/Statement/v0.1"},
        {"subject": []},
        {"subjects": 1},
    ]
    for fault in faults:
        with pytest.raises((ValueError, json_format.ParseError)):
            read(document | fault)
    with pytest.raises(json_format.ParseError):
        read(document | {"predicate": document["predicate"] | {"passed_test": []}})


@pytest.mark.skipif(
    find_spec("model_signing") is None, reason="needs model-signing (the dev extra)"
)
def test_a_signed_directory(root: Path, tmp_path: Path) -> None:
    """With a key of one's own, offline. A changed, lost or added file is caught."""
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    (tmp_path / "key.pem").write_bytes(
        key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
    )
    (tmp_path / "key.pub").write_bytes(
        key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
    )
    out = tmp_path / "neo-tl"
    converter.hf_to_tl(root / "neo", out, process="default", check=False)

    sign, verify = re.findall(r"^\$ (model_signing .*)$", PAGE.read_text("utf-8"), re.MULTILINE)

    def run(command: str) -> int:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        full = os.environ | {"PATH": path}
        done = subprocess.run(command.split(), cwd=tmp_path, env=full, capture_output=True)
        return done.returncode

    def is_signed() -> bool:
        from model_signing import verifying

        config = verifying.Config().use_elliptic_key_verifier(public_key=tmp_path / "key.pub")
        try:
            config.verify(out, tmp_path / "neo-tl.sig")
        except ValueError:
            return False
        return True

    assert run(sign) == 0
    signed = json.loads((tmp_path / "neo-tl.sig").read_text())
    assert signed["dsseEnvelope"]["payloadType"] == "application/vnd.in-toto+json"
    assert run(verify) == 0
    assert is_signed()
    for name in sorted(path.name for path in out.iterdir()):
        before = (out / name).read_bytes()
        changed = bytearray(before)
        changed[len(changed) // 2] ^= 1
        (out / name).write_bytes(changed)
        assert not is_signed(), name
        (out / name).unlink()
        assert not is_signed(), name
        (out / name).write_bytes(before)
    (out / "more").write_text("mine")
    assert run(verify) != 0
    (out / "more").unlink()
    assert is_signed()
