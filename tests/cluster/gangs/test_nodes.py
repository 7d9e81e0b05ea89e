"""`muster cluster`: a head that cannot be started or joined gives one message, before Ray is started."""

import socket

import pytest


@pytest.fixture
def taken(tmp_path, monkeypatch):
    """A port that another process listens on."""
    (tmp_path / "token").write_text("5ec7e7" * 10)
    (tmp_path / "token").chmod(0o600)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.mark.parametrize("option", ["--port", "--dashboard-port"])
def test_a_port_that_is_taken(muster, taken, option):
    free = {"--port": "--dashboard-port", "--dashboard-port": "--port"}[option]
    code, _, err = muster("cluster", "up", f"{option}={taken}", f"{free}=0")
    assert code == 2
    assert err.startswith(f"muster: {option} {taken} is in use (address already in use), perhaps by a cluster that is")
    assert f"`muster cluster up {option} {taken + 1}`" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("address", ["127.0.0.1:1", "localhost:1"])
def test_a_head_that_does_not_answer(muster, taken, address):
    code, _, err = muster("cluster", "join", address)
    assert code == 2
    assert err.startswith(f"muster: {address}: no head of a cluster answers there (")
    assert err.count("\n") == 1
