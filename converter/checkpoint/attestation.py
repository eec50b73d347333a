"""What neoconvert.json says, as in-toto statements: for policy engines and signers.

neoconvert.intoto.jsonl has one statement a line: SLSA provenance v1 of the conversion, and where it
was verified, a test result v0.1. Both are about every file beside it but neoconvert.json, which lists
it. They are not signed: whoever publishes a model signs, with `model_signing` or `cosign`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

STATEMENT = "https://in-toto.io/Statement/v1"
SLSA_PROVENANCE = "https://slsa.dev/provenance/v1"
TEST_RESULT = "https://in-toto.io/attestation/test-result/v0.1"
BUILD_TYPE = "urn:neoconvert:conversion:1"
BUILDER = "urn:neoconvert:cli"
"""Wherever someone runs the command. A platform that runs it makes a statement of its own."""
VERIFICATION = "urn:neoconvert:verification:1"
TENSORS = "neoconvertTensors"
"""The algorithm of a digest: lowercase hex SHA-256 of a line "NAME SHA-256" for each tensor, sorted
by name, as in neoconvert.json's `source_sha256`."""
_COMMIT = re.compile(r"[0-9a-f]{40}")


def lines(document: dict[str, Any]) -> bytes:
    """The file, of a neoconvert.json whose `files` are all but these two."""
    statements = [_statement(document, SLSA_PROVENANCE, _provenance(document))]
    if document["verification"]:
        statements.append(_statement(document, TEST_RESULT, _result(document["verification"])))
    return "".join(json.dumps(s, separators=(",", ":")) + "\n" for s in statements).encode()


def _statement(document: dict[str, Any], kind: str, predicate: dict[str, Any]) -> dict[str, Any]:
    return {
        "_type": STATEMENT,
        "subject": [
            {"name": name, "digest": {"sha256": entry["sha256"]}}
            for name, entry in document["files"].items()
        ],
        "predicateType": kind,
        "predicate": predicate,
    }


def _provenance(document: dict[str, Any]) -> dict[str, Any]:
    source, options = document["source"], dict(document["options"])
    options.pop("check", None)  # changes no byte of the files
    asked = {
        "source": source["given"],
        "revision": source["revision"],
        "adapter": source.get("adapter", {}).get("given"),
        **options,
    }
    became = {
        "route": document["route"],
        "applied": document["steps"],
        "undone": document["reverse"],
        "written": document["output"]["layout"],
    }
    return {
        "buildDefinition": {
            "buildType": BUILD_TYPE,
            "externalParameters": {k: v for k, v in asked.items() if v is not None},
            "internalParameters": became,
            "resolvedDependencies": list(_dependencies(document)),
        },
        "runDetails": {"builder": {"id": BUILDER, "version": document["versions"]}},
    }


def _dependencies(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    source, revision = document["source"], document["source"]["revision"]
    model: dict[str, Any] = {
        "name": source["given"],
        "digest": {TENSORS: document["source_sha256"]},
    }
    if revision:
        model["uri"] = f"pkg:huggingface/{quote(source['given'])}@{revision}"
        if _COMMIT.fullmatch(revision):
            model["digest"]["gitCommit"] = revision
    yield model
    for name, entry in source.get("files", {}).items():
        if "sha256" in entry:
            yield {"name": f"{source['given']}/{name}", "digest": {"sha256": entry["sha256"]}}
    for name, entry in source.get("adapter", {}).get("tensors", {}).items():
        name = f"{source['adapter']['given']}: {name}"
        yield {"name": name, "digest": {"sha256": entry["sha256"]}}


def _result(verification: dict[str, Any]) -> dict[str, Any]:
    """What could not be compared is in neither list: a policy that wants it does not find it."""
    passed: list[str] = []
    failed: list[str] = []
    for probe in verification["probes"]:
        (passed if probe["passed"] else failed).append(f"{probe['runtime']}: {probe['name']}")
    for evidence in verification["evidence"]:
        name = f"{evidence['link']}: {evidence['subject']}"
        if evidence["outcome"] in ("same", "differs"):
            (passed if evidence["outcome"] == "same" else failed).append(name)
    said = {name: verification.get(name) for name in ("effort", "max_ratio", "runtimes")}
    return {
        "result": "PASSED" if verification["passed"] else "FAILED",
        "configuration": [{"name": "verification", "uri": VERIFICATION, "annotations": said}],
        "passedTests": list(dict.fromkeys(passed)),
        "failedTests": list(dict.fromkeys(failed)),
    }
