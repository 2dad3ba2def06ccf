"""A warning for a key that others on the machine can read, and none for one that they cannot."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from steermoe_local.cli import main

KEY = "a-key-that-nobody-sees"
posix = pytest.mark.skipif(os.name != "posix", reason="modes of files")


def warnings_of(*args: str, env: dict[str, str] | None = None) -> list[str]:
    """What a command warns of before it fails because its model is not there."""
    result = CliRunner().invoke(main, [*args], env=env or {})
    assert result.exit_code != 0
    assert KEY not in result.output
    return [line for line in result.output.splitlines() if line.startswith("warning: ")]


def test_a_key_on_the_command_line() -> None:
    (line,) = warnings_of("serve", "-m", "tiny", "--maps", "/nowhere/at/all", "--api-key", KEY)
    for words in ("--api-key: ", "ps", "--api-key-file", "STEERMOE_API_KEY"):
        assert words in line
    for option in ("--hf-token", "-hft"):
        (line,) = warnings_of("run", "-m", "/nowhere/m.gguf", "-p", "a", option, KEY)
        assert "--hf-token: " in line
        assert "HF_TOKEN" in line
    (line,) = warnings_of("pull", "tiny", "--token", KEY)
    assert "--hf-token: " in line


def test_a_key_in_the_environment() -> None:
    for name in ("STEERMOE_API_KEY", "STEERMOE_SERVE_API_KEY"):
        assert warnings_of("serve", "-m", "tiny", "--maps", "/nowhere/at/all", env={name: KEY}) == []


@posix
@pytest.mark.parametrize(("mode", "warned"), [(0o600, False), (0o400, False), (0o640, True), (0o604, True)])
def test_files_with_a_key(tmp_path: Path, mode: int, warned: bool) -> None:
    file = tmp_path / "key"
    file.write_text(KEY)
    file.chmod(mode)
    config = tmp_path / "config.toml"
    config.write_text(f'[serve]\napi-key = "{KEY}"\n')
    config.chmod(mode)
    nowhere = ("serve", "-m", "tiny", "--maps", "/nowhere/at/all")
    for path, found in (
        (file, warnings_of(*nowhere, "--api-key-file", str(file))),
        (config, warnings_of(*nowhere, env={"STEERMOE_CONFIG": str(config)})),
    ):
        assert len(found) == warned
        assert all(f"chmod 600 {path}" in line for line in found)


@posix
def test_a_configuration_without_a_key_may_be_read(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text("[serve]\nport = 0\n")
    config.chmod(0o644)
    assert warnings_of("serve", "-m", "tiny", "--maps", "/nowhere", env={"STEERMOE_CONFIG": str(config)}) == []
