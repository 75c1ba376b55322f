"""The list of plugins that vLLM loads."""

import importlib.metadata
import os

import pytest

from cast_serve.server import plugin


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)


@pytest.fixture
def installed(monkeypatch):
    """Entry points of other packages beside ours."""
    entries = [
        importlib.metadata.EntryPoint("cast", "cast_serve:register", plugin.GROUP),
        importlib.metadata.EntryPoint("cast", "cast_serve.server.endpoints", plugin.ENDPOINTS),
        importlib.metadata.EntryPoint("gguf", "gguf:register", plugin.GROUP),
        importlib.metadata.EntryPoint("npu", "npu:register", "vllm.platform_plugins"),
        importlib.metadata.EntryPoint("gguf", "gguf:routes", plugin.ENDPOINTS),
        importlib.metadata.EntryPoint("admin", "admin:routes", plugin.ENDPOINTS),
    ]
    found = importlib.metadata.EntryPoints(entries)
    monkeypatch.setattr(importlib.metadata, "entry_points", found.select)


def test_all_that_would_load_without_a_list_loads(installed):
    plugin.allow()
    assert os.environ["VLLM_PLUGINS"] == "cast,gguf,npu"


def test_routes_that_a_list_brings_along_are_named(installed, capsys):
    plugin.allow()
    assert "routes of other plugins are served too: gguf;" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "expected"), [("", "cast"), ("gguf", "gguf,cast"), ("cast,gguf", "cast,gguf")]
)
def test_a_given_list_is_kept(installed, monkeypatch, capsys, given, expected):
    monkeypatch.setenv("VLLM_PLUGINS", given)
    plugin.allow()
    assert os.environ["VLLM_PLUGINS"] == expected
    assert capsys.readouterr().err == ""


def test_endpoints_are_found():
    assert plugin.why_no_endpoints() is None


def test_an_older_installation_is_named(installed, monkeypatch):
    monkeypatch.setattr(plugin, "ENDPOINTS", "vllm.another_group")
    assert plugin.why_no_endpoints().startswith("the installed package has no vllm.another_group")


def test_an_older_vllm_is_named(monkeypatch):
    monkeypatch.delattr("vllm.plugins.load_endpoint_plugins")
    assert plugin.why_no_endpoints().endswith("has no endpoint plugins, 0.26 and later do")
