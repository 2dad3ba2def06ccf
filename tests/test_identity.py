"""The error tree, model identities and safe writing."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import steermoe_local
from steermoe_local import errors
from steermoe_local._util.files import replacing, sha256_file, timestamp
from steermoe_local.errors import FormatError, ModelMismatchError, StorageError, UsageError
from steermoe_local.identity import ModelIdentity
from tests.support.builders import HEX, identity


def test_every_error_is_listed_and_in_the_tree() -> None:
    defined = {n for n, v in vars(errors).items() if isinstance(v, type)}
    assert set(re.findall(r"\w+Error", errors.__doc__ or "")) == defined
    for name in defined:
        assert issubclass(getattr(errors, name), errors.SteerMoEError)
        assert getattr(steermoe_local, name) is getattr(errors, name)
        assert name in steermoe_local.__all__
    assert errors.NativeError("x", -3).code == -3
    assert errors.NativeError("x").code is None


def test_short_and_dict() -> None:
    model = identity(16, 64, 8)
    assert model.short == "olmoe (16 layers, 64 experts, top-8, router 01234567)"
    assert ModelIdentity.from_dict(model.to_dict()) == model
    assert model.shape == (16, 64)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": ""}, "m.architecture: ''"),
        ({"n_layer": 0}, "m.n_layer: 0 "),
        ({"n_layer": True}, "m.n_layer: True"),
        ({"n_expert": 1 << 40}, "m.n_expert: "),
        ({"n_expert_used": 5}, "m.n_expert_used: 5 "),
        ({"router_sha256": HEX.upper()}, "m.router_sha256: "),
        ({"colour": 1}, "m.colour: "),
    ],
)
def test_impossible_fields(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(FormatError) as caught:
        ModelIdentity.from_dict(identity().to_dict() | changes, "m")
    assert words in str(caught.value)


def test_missing_fields() -> None:
    data = identity().to_dict()
    del data["n_layer"]
    with pytest.raises(FormatError, match=r"m\.n_layer: missing"):
        ModelIdentity.from_dict(data, "m")
    with pytest.raises(FormatError, match="m: not an object"):
        ModelIdentity.from_dict([], "m")


def test_require_same() -> None:
    model = identity()
    assert model.require_same(identity(), "map.json", "model.gguf") == []
    other = replace(model, architecture="qwen3moe", router_sha256="9" * 64)
    for force in (False, True):
        with pytest.raises(ModelMismatchError) as caught:
            model.require_same(other, "map.json", "model.gguf", force)
        assert str(caught.value).startswith(f"map.json: made for {model.short}")
        assert f"model.gguf is {other.short}" in str(caught.value)


def test_force_lets_another_router_pass_with_a_warning() -> None:
    model, other = identity(), identity(router_sha256="9" * 64)
    with pytest.raises(ModelMismatchError, match=r"model\.gguf is another"):
        model.require_same(other, "map.json", "model.gguf")
    (warning,) = model.require_same(other, "map.json", "model.gguf", force=True)
    assert "map.json" in warning
    assert "99999999" in warning
    with pytest.raises(ModelMismatchError):
        model.require_same(identity(k=1), "map.json", "model.gguf", force=True)


def test_replacing_keeps_the_old_file_when_the_writer_fails(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")

    def fail_half_way() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_half_way()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_replacing_follows_links_and_umask(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("real")
    with replacing(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"
    plain = tmp_path / "plain"
    plain.write_text("")
    assert (tmp_path / "real").stat().st_mode == plain.stat().st_mode


def test_replacing_names_the_cure(tmp_path: Path) -> None:
    for path, words in ((tmp_path, "is a folder"), (tmp_path / "no" / "a", "create it first")):
        with pytest.raises(UsageError, match=words), replacing(path):
            pass
    with pytest.raises(UsageError, match="cannot be written"), replacing(tmp_path / "a"):
        raise OSError(13, os.strerror(13))
    with pytest.raises(StorageError, match="cannot be written"), replacing(tmp_path / "a"):
        raise OSError(28, os.strerror(28))


def test_timestamp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    assert timestamp() == "1970-01-01T00:00:00Z"
    assert timestamp("2025-01-31T12:00:00Z") == "2025-01-31T12:00:00Z"
    with pytest.raises(UsageError, match="not an ISO 8601 date"):
        timestamp("yesterday")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "x")
    with pytest.raises(UsageError, match="SOURCE_DATE_EPOCH"):
        timestamp()
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    assert timestamp().endswith("Z")


def test_sha256_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a").startswith("ba7816bf")
    with pytest.raises(FormatError, match="cannot be read"):
        sha256_file(tmp_path)


def test_limits_on_experts_of_a_layer() -> None:
    model = ModelIdentity("olmoe", 16, 64, 8, "0" * 64)
    assert (model.max_active, model.max_inactive) == (8, 56)
