"""Wrong input: the contract's exit code, three helpful lines, OUTPUT untouched."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import save_file

from converter.checkpoint.hub import reason
from converter.checkpoint.record import rerecord
from converter.cli import main
from tests.checkpoints import Recipe, read_all, write_hf

Damage = Callable[[Path], object]


def _config(**changes: object) -> Damage:
    def damage(hf: Path) -> None:
        path = hf / "config.json"
        changed = json.loads(path.read_text()) | changes
        # An ellipsis leaves the field out.
        path.write_text(json.dumps({k: v for k, v in changed.items() if v is not ...}))

    return damage


def _tensors(change: Callable[[dict[str, np.ndarray]], object]) -> Damage:
    def damage(hf: Path) -> None:
        tensors = read_all(hf)
        change(tensors)
        save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})

    return damage


def _shard(change: Damage) -> Damage:
    def damage(hf: Path) -> None:
        (hf / "model.safetensors").unlink()
        write_hf(hf, Recipe(shards=2))
        change(hf)

    return damage


def _index(name: str) -> Damage:
    def damage(hf: Path) -> None:
        path = hf / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        index["weight_map"]["transformer.wte.weight"] = name
        path.write_text(json.dumps(index))

    return _shard(damage)


def _truncate(hf: Path) -> None:
    path = hf / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])


def _header(text: str) -> Damage:
    def damage(hf: Path) -> None:
        raw = text.encode()
        (hf / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + b"\0" * 64)

    return damage


def _swap_head(tensors: dict[str, np.ndarray]) -> None:
    tensors["transformer.wpe.weight"] = tensors["transformer.wpe.weight"].T.copy()


def _integer_weight(tensors: dict[str, np.ndarray]) -> None:
    tensors["transformer.wpe.weight"] = tensors["transformer.wpe.weight"].astype(np.int32)


DAMAGES: dict[str, tuple[Damage, str]] = {
    "missing shard": (_shard(lambda hf: (hf / "model-00002-of-00002.safetensors").unlink()), "00002-of-00002"),
    "index leaves the directory": (_index("../other.safetensors"), "transformer.wte.weight"),
    "index names an absolute path": (_index("/etc/passwd"), "transformer.wte.weight"),
    "index names a drive": (_index("C:x.safetensors"), "transformer.wte.weight"),
    "index names the wrong shard": (_index("model-00003-of-00002.safetensors"), "model-00003"),
    "index without weight_map": (
        _shard(lambda hf: (hf / "model.safetensors.index.json").write_text("{}")),
        "weight_map",
    ),
    "truncated file": (_truncate, "model.safetensors"),
    "empty file": (lambda hf: (hf / "model.safetensors").write_bytes(b"") and None, "model.safetensors"),
    "duplicate key": (
        _header('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
                '"a":{"dtype":"F32","shape":[15],"data_offsets":[4,64]}}'),
        "model.safetensors",
    ),
    "overlapping offsets": (
        _header('{"a":{"dtype":"F32","shape":[16],"data_offsets":[0,64]},'
                '"b":{"dtype":"F32","shape":[16],"data_offsets":[0,64]}}'),
        "model.safetensors",
    ),
    "wrong shape": (_tensors(_swap_head), "transformer.wpe.weight has shape [4, 9]"),
    "unknown key": (_tensors(lambda t: t.update(score=np.zeros(3, np.float32))), "score"),
    "missing key": (_tensors(lambda t: t.pop("transformer.h.1.ln_2.bias") is None), "transformer.h.1.ln_2.bias"),
    "integer weight": (_tensors(_integer_weight), "transformer.wpe.weight"),
    "wrong model type": (_config(model_type="gpt2"), "gpt2"),
    "heads that do not divide": (_config(num_heads=3), "divisible"),
    "more layers than tensors": (
        _config(num_layers=10**6, attention_types=[[["global"], 10**6]], attention_layers=None), "layers"),
    "a billion layers": (_config(attention_types=[[["global"], 10**9]], attention_layers=...), "attention_types"),
    "negative size": (_config(vocab_size=-1), "vocab_size"),
    "size that is no integer": (_config(hidden_size=4.0), "hidden_size"),
    "eps that is no number": (_config(layer_norm_epsilon="small"), "epsilon"),
    "layers for another depth": (_config(attention_layers=["local"]), "attention_layers"),
    "untied without a head": (_config(tie_word_embeddings=False), "lm_head.weight"),
    "activation TL lacks": (_config(activation_function="quick_gelu"), "quick_gelu"),
    "config that is no JSON": (lambda hf: (hf / "config.json").write_text("{") and None, "config.json"),
    "config that is a list": (lambda hf: (hf / "config.json").write_text("[]") and None, "config.json"),
    "no config": (lambda hf: (hf / "config.json").unlink(), "--cfg"),
    "no weights": (lambda hf: (hf / "model.safetensors").unlink(), "model.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_source(damage: str, tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", Recipe())
    DAMAGES[damage][0](tmp_path / "hf")
    _refused(tmp_path, ["hf-to-tl", str(tmp_path / "hf")], 3, DAMAGES[damage][1])


def _refused(tmp_path: Path, arguments: list[str], code: int, says: str) -> None:
    """Exit code, three lines, no traceback; an OUTPUT that was there is as it was, no debris."""
    output = tmp_path / "out"
    output.mkdir()
    (output / "config.json").write_text("precious")
    (output / "neoconvert.json").write_text("{}")
    rerecord(output)
    before = {
        path for path in tmp_path.rglob("*") if "out" in path.parts or path.parent == tmp_path
    }
    result = CliRunner().invoke(main, [*arguments, str(output), "--overwrite", "--no-verify"])
    assert result.exit_code == code, result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 3, result.stderr
    assert lines[0].startswith("Error: ")
    assert lines[1].startswith("   in: ")
    assert lines[2].startswith("   do: ")
    assert says in result.stderr
    assert not result.stdout
    assert sorted(p.name for p in output.iterdir()) == ["config.json", "neoconvert.json"]
    assert (output / "config.json").read_text() == "precious"
    assert {p for p in tmp_path.rglob("*") if "out" in p.parts or p.parent == tmp_path} == before


def test_no_such_source(tmp_path: Path) -> None:
    _refused(tmp_path, ["hf-to-tl", str(tmp_path / "nothing/here")], 3, "no such")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("neo-hff", "Did you mean neo-hf?"),
        ("./neo-hff", "Did you mean neo-hf?"),
        ("sub/m.safetensor", "Did you mean sub/m.safetensors?"),
        ("neo", None),
        ("owner/neo-hff", None),
    ],
)
def test_a_place_with_a_slip(
    given: str, says: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_hf(tmp_path / "neo-hf", Recipe())
    write_hf(tmp_path / "sub", Recipe())
    (tmp_path / "sub/model.safetensors").rename(tmp_path / "sub/m.safetensors")
    (tmp_path / "neo-hf.reference").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused = CliRunner().invoke(main, ["hf-to-tl", given, "out"])
    assert refused.exit_code == 3
    assert (says in refused.stderr) if says else ("Did you mean" not in refused.stderr)


def test_source_and_output_exchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_hf(tmp_path / "neo-hf", Recipe())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused = CliRunner().invoke(main, ["hf-to-tl", "new", "neo-hf"])
    assert "did you mean neoconvert hf-to-tl neo-hf new?" in refused.stderr
    refused = CliRunner().invoke(main, ["hf-to-tl", "EleutherAI/gpt-neo-125m", "neo-hf"])
    assert "did you mean" not in refused.stderr


def test_what_the_hub_says_has_no_name_of_a_class() -> None:
    error = OSError("Got: ConnectError: [Errno -2] Name or service not known\nAn error happened")
    assert reason(error) == "[Errno -2] Name or service not known"
    assert reason(OSError()) == "OSError"


def test_already_converted(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", Recipe())
    _refused(tmp_path, ["tl-to-hf", str(tmp_path / "hf")], 3, "already")


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth"])
def test_pickle_without_the_flag(suffix: str, tmp_path: Path) -> None:
    torch.save({}, tmp_path / f"model{suffix}")
    _refused(tmp_path, ["tl-to-hf", str(tmp_path / f"model{suffix}")], 3, "--allow-pickle")


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("this ran",)


def test_pickle_that_runs_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"a": _Evil()}, tmp_path / "model.pt")
    _refused(
        tmp_path, ["tl-to-hf", "--allow-pickle", str(tmp_path / "model.pt")], 3, "weights_only"
    )
    assert "this ran" not in capsys.readouterr().out


def test_what_torch_thinks_of_a_pickle_is_not_shown(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "model.pt", pickle_protocol=4)
    _refused(
        tmp_path, ["tl-to-hf", "--allow-pickle", str(tmp_path / "model.pt")], 3, "weights_only"
    )
    assert [str(warning.message) for warning in recwarn] == []


def test_compressed_pickle_archive(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10**6)
    _refused(tmp_path, ["tl-to-hf", "--allow-pickle", str(tmp_path / "bomb.pt")], 3, "compressed")


@pytest.mark.parametrize("output", ["hf", "hf/../hf", ".", "link"])
def test_output_is_source(output: str, tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", Recipe())
    (tmp_path / "link").symlink_to(tmp_path / "hf")
    before = sorted(tmp_path.rglob("*"))
    arguments = ["hf-to-tl", str(tmp_path / "hf"), str(tmp_path / output), "--overwrite"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert "same place" in result.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_output_exists(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", Recipe())
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("years of work")
    convert = ["hf-to-tl", str(tmp_path / "hf"), str(tmp_path / "out"), "--no-verify"]
    for arguments in (convert, [*convert, "--overwrite"]):  # no checkpoint: not ours to replace
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 2
        assert len(result.stderr.splitlines()) == 3
        assert (tmp_path / "out/thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--dtype", "int8"],
        ["--max-shard-size", "big"],
        ["--process", "fold"],
        ["--layout", "x"],
        ["--revision", "a"],
    ],
)
def test_usage(arguments: list[str], tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", Recipe())
    result = CliRunner().invoke(
        main, ["hf-to-tl", str(tmp_path / "hf"), str(tmp_path / "o"), *arguments]
    )
    assert result.exit_code == 2
    assert not (tmp_path / "o").exists()


def test_error_as_json(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["inspect", str(tmp_path / "no/such"), "--json"])
    document = json.loads(result.stdout)
    assert (result.exit_code, document["exit_code"], document["command"]) == (3, 3, "inspect")
    assert document["error"]["type"] == "SourceNotFound"


def test_float16_overflow_is_refused(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", Recipe())
    tensors = {name: np.full_like(t, 7e4) for name, t in read_all(tmp_path / "hf").items()}
    save_file(tensors, tmp_path / "hf/model.safetensors", metadata={"format": "pt"})
    _refused(tmp_path, ["hf-to-tl", "--dtype", "float16", str(tmp_path / "hf")], 3, "float16")
