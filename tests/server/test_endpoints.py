"""What cast-serve adds to vLLM's API server where there is no engine to ask, and its page."""

import argparse
import asyncio

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from cast_serve.server.endpoints import INFO, CastEndpoints


def client(**flags: object) -> TestClient:
    """Of an app that has what vLLM's render server would have: no engine."""
    app, endpoints = FastAPI(), CastEndpoints()
    endpoints.attach_router(app)
    given = {"model": "m", "served_model_name": None, "worker_extension_cls": "", **flags}
    asyncio.run(endpoints.init_state(None, app.state, argparse.Namespace(**given)))
    return TestClient(app)


def test_info_without_an_engine():
    answer = client().get(INFO)
    assert answer.status_code == 404
    assert answer.json()["error"]["message"] == f"no {INFO}: this server has no engine"


def test_page():
    answer = client(no_ui=False).get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")


def test_no_page():
    served = client(no_ui=True)
    assert served.get("/").status_code == 404
    assert served.get("/ui/app.js").status_code == 404


@pytest.mark.parametrize("path", ["/", "/ui/app.js", "/ui/style.css"])
def test_nothing_but_the_page_s_own_files_may_run(path):
    headers = client().get(path).headers
    policy = dict(rule.split(" ", 1) for rule in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == "'self'"
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("path", ["/ui/../server/page.py", "/ui/%2e%2e/page.py", "/ui/"])
def test_no_other_file_is_served(path):
    assert client().get(path).status_code == 404
