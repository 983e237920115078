"""A server of this process, on a free port of the loopback."""

import contextlib
import socket
import threading
import time

import uvicorn

from fastdllm.serving.app import AppSettings, make_app


@contextlib.contextmanager
def live(service, **options):
    """Serve until the context ends; give the address."""
    with running(make_app(service, AppSettings(**{"name": "tiny"} | options))) as address:
        yield address


@contextlib.contextmanager
def running(app):
    """Answer requests to the application until the context ends; give the address."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
