"""wandb's server, simulated by a socket; the ranks' exchange is tested in tests/scripts/test_doctor.py."""

import socket
from pathlib import Path

import pytest

from metaformer.diagnosis.finding import Verdict
from metaformer.diagnosis.network import wandb


@pytest.fixture(autouse=True)
def no_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Remove the key from the environment, and use an empty home folder."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_a_server_that_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of wandb passes with a key and gives a warning without one."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert [finding.verdict for finding in wandb()] == [Verdict.warn]
        monkeypatch.setenv("WANDB_API_KEY", "a key")
        assert [finding.verdict for finding in wandb()] == [Verdict.ok]


def test_a_key_in_netrc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The key stored by `wandb login` is found."""
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login user password key\n")
    (tmp_path / ".netrc").chmod(0o600)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert [finding.verdict for finding in wandb()] == [Verdict.ok]


def test_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that does not answer gives a warning, not a failure: runs are stored offline."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    (found,) = wandb()
    assert found.verdict is Verdict.warn
    assert "does not answer (Connection refused)" in found.message
