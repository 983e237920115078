"""The command line of the server: what it refuses, and how the checkpoint and the options become a service."""

import socket

import pytest
from pages import ROOT

from fastdllm.serving import command
from fastdllm.serving.command import LOOPBACK_NAMES, ServeConfig, app_settings, is_loopback, make_service, serve

TINY = str(ROOT / "data/tiny-adapted")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host": "0.0.0.0"}, "host 0.0.0.0 lets other machines ask, and no API key is set; set api_key_file"),
        ({"host": "example.org"}, "lets other machines ask"),
        ({"api_key": "a", "api_key_file": "b"}, "mean the same"),
        ({"is_open": True}, "is_open does nothing on the loopback or with an API key"),
        ({"is_open": True, "host": "0.0.0.0", "api_key": "k"}, "is_open does nothing on the loopback or with"),
        ({"port": 70000}, "port must be 0 to 65535, got 70000"),
        ({"max_body_bytes": 0}, "max_body_bytes must be 1 or more, got 0"),
        ({"cache_bytes": -1}, "must be 0 \\(chosen\\) or more"),
    ],
)
def test_options_that_are_wrong_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ServeConfig(checkpoint=TINY, **options)


def test_other_machines_are_served_with_a_key_or_on_purpose(tmp_path):
    for host in ("localhost", "127.0.0.1", "::1"):
        assert is_loopback(host) and app_settings(ServeConfig(checkpoint=TINY, host=host)).hosts == LOOPBACK_NAMES
    assert app_settings(ServeConfig(checkpoint=TINY, host="127.1.2.3")).hosts == (*LOOPBACK_NAMES, "127.1.2.3")
    key = tmp_path / "key"
    key.write_text("sesame\nrest\n")
    settings = app_settings(ServeConfig(checkpoint=TINY, host="0.0.0.0", api_key_file=str(key)))
    assert (settings.api_key, settings.hosts, settings.name) == ("sesame", (), "tiny-adapted")
    assert app_settings(ServeConfig(checkpoint=TINY, host="0.0.0.0", is_open=True)).api_key == ""
    key.write_text("\n")
    with pytest.raises(ValueError, match="must hold the API key in its first line"):
        app_settings(ServeConfig(checkpoint=TINY, api_key_file=str(key)))
    for wrong in ("sésame", "ses\tame", " "):  # which no client can send, or which arrive otherwise
        with pytest.raises(ValueError, match="an API key must be of printable ASCII characters without spaces"):
            app_settings(ServeConfig(checkpoint=TINY, api_key=wrong))
    with pytest.raises(FileNotFoundError, match="api_key_file .*: no such file"):
        app_settings(ServeConfig(checkpoint=TINY, api_key_file=str(tmp_path / "nowhere")))


def test_a_model_is_called_by_the_last_part_of_its_checkpoint(monkeypatch):
    assert app_settings(ServeConfig(checkpoint="Qwen/Qwen2.5-0.5B-Instruct")).name == "Qwen2.5-0.5B-Instruct"
    monkeypatch.chdir(TINY)
    assert app_settings(ServeConfig(checkpoint=".")).name == "tiny-adapted"
    assert app_settings(ServeConfig(checkpoint=".", name="own")).name == "own"


def test_a_service_takes_the_checkpoint_s_settings_where_none_are_given():
    with make_service(ServeConfig(checkpoint=TINY)) as service:
        assert (service.mode, service.decode.threshold, service.max_tokens) == ("diffusion", 0.9, 1024)
        assert service.modes == ("diffusion", "ar") and service.decode.temperature == 0
    with make_service(ServeConfig(checkpoint=TINY, threshold=0.5, temperature=1.0, max_tokens=99)) as service:
        assert (service.decode.threshold, service.decode.temperature, service.max_tokens) == (0.5, 1.0, 99)
    with make_service(ServeConfig(checkpoint=str(ROOT / "data/tiny"))) as service:
        assert service.modes == ("ar",) and service.mode == "ar"
    with pytest.raises(ValueError, match="threshold 0.5 has no effect token by token, and .* was never adapted"):
        make_service(ServeConfig(checkpoint=str(ROOT / "data/tiny"), threshold=0.5))
    with pytest.raises(ValueError, match="max_tokens must be at most 1024, the positions of this model, got 2000"):
        make_service(ServeConfig(checkpoint=TINY, max_tokens=2000))


def test_every_limit_of_the_options_reaches_the_service_and_the_application():
    limits = dict(batch_size=3, max_waiting=5, max_engines=2, top_p=0.5, temperature=0.7, mode="ar")
    with make_service(ServeConfig(checkpoint=TINY, device="cpu", cache_bytes=10**8, **limits)) as service:
        assert (service.batch_size, service.max_waiting, service.max_engines) == (3, 5, 2)
        assert (service.decode.top_p, service.decode.temperature, service.mode) == (0.5, 0.7, "ar")
        assert service._engine_bytes == 10**8 // 2
    settings = app_settings(ServeConfig(checkpoint=TINY, max_body_bytes=99, default_new_tokens=7))
    assert (settings.max_body_bytes, settings.default_new_tokens) == (99, 7)


def test_a_port_that_is_taken_is_said_before_the_model_is_loaded():
    message = "cannot listen at 127.0.0.1, port .*; try another --port"
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(RuntimeError, match=message):
        serve(ServeConfig(checkpoint="nowhere", port=other.getsockname()[1]))


@pytest.mark.parametrize("name", ["uvicorn", "starlette", "pydantic"])
def test_a_library_that_is_absent_is_named_with_the_way_to_install_it(monkeypatch, name):
    monkeypatch.setattr(command, "find_spec", lambda library: None if library == name else object())
    with pytest.raises(RuntimeError, match=rf'serve needs {name}, which is absent.*pip install -e "\.\[serve\]"'):
        serve(ServeConfig(checkpoint="nowhere"))


def test_an_interrupt_ends_the_server_without_a_word(monkeypatch, capsys):
    import uvicorn

    def interrupt(server, sockets):
        raise KeyboardInterrupt

    monkeypatch.setattr(uvicorn.Server, "run", interrupt)
    serve(ServeConfig(checkpoint=TINY, port=0))
    assert capsys.readouterr().out.startswith("serving tiny-adapted (diffusion) at http://127.0.0.1:")
