"""A server of two API processes with a key: /v1/cast/info, own metrics, and who reads them.

Who reads them: promtool, Prometheus with the project's rules and dashboard, and the page at /.
"""

import json
import re
import shutil
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import yaml
from browser import chromium, expect, needs_chromium, open_page
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import load_file, save_file
from server_process import Server
from tiny_models import is_linear, write_stored

# An engine start and a Prometheus; together over half a minute.
pytestmark = [pytest.mark.engine, pytest.mark.slow]

MONITORING = Path(__file__).parents[2] / "deploy" / "monitoring"
KEY = "a-key-of-the-tests"
API_SERVERS = 2
# Of the one layer that is not 2:4.
DENSE = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Dense-stored and declaring nothing: only who reads the weights knows which are 2:4."""
    folder = tmp_path_factory.mktemp("metrics") / "model"
    write_stored("llama", folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    torch.manual_seed(3)
    tensors[f"{DENSE}.weight"].normal_(std=0.1)
    # Some zeros more than the pattern has.
    tensors["model.layers.0.self_attn.o_proj.weight"][:8] = 0
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory) -> Iterator[Server]:
    running = Server(
        checkpoint,
        tmp_path_factory.mktemp("log") / "server",
        *("--quantization", "cast", "--max-model-len", "256", "--enforce-eager"),
        *("--served-model-name", "tiny", "--api-server-count", str(API_SERVERS)),
        # On a CPU 2:4 layers stay packed for it alone.
        environment={"VLLM_API_KEY": KEY, "CAST_SERVE_KERNEL": "reference"},
    )
    running.wait_ready()
    yield running
    running.stop(signal.SIGTERM)


@pytest.fixture(scope="module")
def info(server) -> dict[str, Any]:
    return get(server, "/v1/cast/info", KEY).json()


def get(server: Server, path: str, key: str | None = None) -> httpx.Response:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return httpx.get(server.url + path, headers=headers)


def samples(server: Server) -> dict[tuple[str, frozenset], float]:
    """Every cast_serve sample of /metrics, by name and labels."""
    found = [
        ((sample.name, frozenset(sample.labels.items())), sample.value)
        for family in text_string_to_metric_families(get(server, "/metrics").text)
        for sample in family.samples
        if sample.name.startswith("cast_serve_")
    ]
    assert len(dict(found)) == len(found), "a sample is there twice"
    return dict(found)


def test_both_api_servers_run(server):
    routed = re.findall(r"ApiServer_(\d) pid=.*Route: /v1/cast/info", server.log.read_text())
    assert sorted(routed) == ["0", "1"]


@pytest.mark.parametrize("key", [None, "another", KEY + "x", KEY[:-1]])
def test_info_needs_the_key(server, key):
    for _ in range(2 * API_SERVERS):
        assert get(server, "/v1/cast/info", key).status_code == 401


def test_info_of_the_model(info, checkpoint):
    assert info["model"] == {
        "name": "tiny",
        "architecture": "LlamaForCausalLM",
        "format": "plain",
        "dtype": "bfloat16",
    }
    assert info["linears"] == {"sparse": 13, "dense": 1}
    assert info["ranks"] == 1
    assert 0 < info["load_seconds"] < 120
    assert info["versions"]["torch"] == torch.__version__
    assert set(info["versions"]) >= {"cast-serve", "vllm", "cuda", "transformers", "python"}


def test_info_of_every_layer(info, checkpoint):
    """Zeros and bytes are those of the checkpoint's weights, counted here."""
    stored = load_file(checkpoint / "model.safetensors")
    assert len(info["layers"]) == 2 * 4
    for layer in info["layers"]:
        weight = torch.cat([stored[f"{linear}.weight"] for linear in layer["linears"]])
        elements = weight.numel()
        sparse = layer["linears"] != [DENSE]
        assert layer["shape"] == list(weight.shape)
        assert layer["sparsity"] == float((weight == 0).sum()) / elements
        assert layer["sparse"] is layer["packed"] is sparse
        # Of two bytes: half the values and a bit a weight.
        assert layer["bytes"] == (elements + elements // 8 if sparse else 2 * elements)
        assert layer["bytes_if_dense"] == 2 * elements
    named = [linear for layer in info["layers"] for linear in layer["linears"]]
    linears = [name for name, tensor in stored.items() if is_linear(name, tensor)]
    assert Counter(named) == Counter(name.removesuffix(".weight") for name in linears)


def test_info_adds_up(info, checkpoint):
    weights = info["weights"]
    stored = load_file(checkpoint / "model.safetensors")
    assert weights["bytes_if_dense"] == sum(tensor.nbytes for tensor in stored.values())
    parts = ("sparse_bytes", "dense_linear_bytes", "other_bytes")
    assert weights["bytes"] == sum(weights[part] for part in parts)
    of_layers = sum(layer["bytes"] for layer in info["layers"])
    assert weights["sparse_bytes"] + weights["dense_linear_bytes"] == of_layers


def test_info_of_kernels(info):
    shapes = {tuple(layer["shape"]) for layer in info["layers"] if layer["sparse"]}
    assert {tuple(entry["shape"]) for entry in info["kernels"]} == shapes
    for entry in info["kernels"]:
        assert entry["plan"] == [{"tokens": None, "kernel": "reference", "config": "fp32"}]


def test_metrics_are_those_of_info(server, info):
    found = samples(server)

    def value(name: str, **labels: str) -> float:
        return found[f"cast_serve_{name}", frozenset(labels.items())]

    assert value("sparse_layers", held="packed") == info["linears"]["sparse"]
    assert value("sparse_layers", held="dense") == 0
    assert value("dense_layers") == info["linears"]["dense"]
    weights = info["weights"]
    assert value("weight_bytes", kind="sparse") == weights["sparse_bytes"]
    assert value("weight_bytes", kind="dense") == weights["dense_linear_bytes"]
    assert value("weight_bytes", kind="other") == weights["other_bytes"]
    assert value("dense_weight_bytes") == weights["bytes_if_dense"]
    assert value("load_seconds") == pytest.approx(info["load_seconds"])
    for entry in info["kernels"]:
        shape = "x".join(map(str, entry["shape"]))
        assert value("kernel_info", layer_shape=shape, tokens="+Inf", kernel="reference:fp32") == 1
    (about,) = (dict(labels) for name, labels in found if name == "cast_serve_model_info")
    assert about["model_name"] == "tiny"
    assert about["format"] == "plain"
    assert about["torch"] == info["versions"]["torch"]


def test_metrics_are_the_same_from_every_api_server(server):
    """A connection lands on either process: 16 of them miss one with a chance of 2 in 65536."""
    seen = [samples(server) for _ in range(16)]
    assert all(other == seen[0] for other in seen)


def test_no_secret_in_metrics(server, checkpoint):
    text = get(server, "/metrics").text
    assert KEY not in text
    assert str(checkpoint.parent) not in "".join(
        line for line in text.splitlines(True) if "cast_serve" in line
    )


def test_scraping_is_not_logged(server):
    get(server, "/metrics")
    get(server, "/v1/models", KEY)
    log = server.wait_for(r"(?s).*GET /v1/models", 10)
    assert "GET /metrics" not in log


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool, of prometheus")
def test_promtool_finds_nothing_wrong(server):
    """Of our own families; vLLM's names have colons, which promtool asks to avoid."""
    lines = get(server, "/metrics").text.splitlines()
    ours = "".join(f"{line}\n" for line in lines if re.match(r"(# \w+ )?cast_serve_", line))
    assert "cast_serve_kernel_info" in ours
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=ours, capture_output=True, text=True
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


@pytest.fixture(scope="module")
def prometheus(server, tmp_path_factory) -> Iterator[str]:
    """The URL of a Prometheus with the project's rules that scrapes the server every second."""
    folder = tmp_path_factory.mktemp("prometheus")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    target = [{"targets": [f"127.0.0.1:{server.port}"]}]
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(MONITORING / "alerts.yml")],
        "scrape_configs": [{"job_name": "cast-serve", "static_configs": target}],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    command = ["prometheus", f"--config.file={folder / 'prometheus.yml'}"]
    command += [f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address={address}"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    wait_until_ready(f"http://{address}")
    yield f"http://{address}"
    process.terminate()
    process.wait(timeout=30)


def wait_until_ready(prometheus: str) -> None:
    """It refuses connections at first, then answers 503 to every query while it opens its data."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            if httpx.get(f"{prometheus}/-/ready").is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise TimeoutError(f"Prometheus at {prometheus} was not ready within 60 s")


def ask(prometheus: str, path: str, **parameters: str) -> Any:
    answer = httpx.get(f"{prometheus}/api/v1/{path}", params=parameters).json()
    assert answer["status"] == "success", answer
    return answer["data"]


def queries() -> dict[str, str]:
    """Those of the dashboard by panel, with Grafana's variables filled in."""
    filled = {"$__rate_interval": "10s", "$job": "cast-serve", "$instance": ".*", "$model": ".*"}
    found = {}
    dashboard = json.loads((MONITORING / "grafana-dashboard.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            query = target["expr"]
            for variable, value in filled.items():
                query = query.replace(variable, value)
            found[f"{panel['title']} {target['refId']}"] = query
    return found


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs prometheus")
def test_dashboard_and_rules_read_the_server(server, prometheus):
    """Under traffic, every query of the dashboard finds something and no rule fails."""
    client = server.client(KEY)
    empty = queries()
    assert len(empty) > 20
    end = time.monotonic() + 90
    while empty and time.monotonic() < end:
        client.completions.create(model="tiny", prompt="it was", max_tokens=20)
        empty = {
            panel: query
            for panel, query in empty.items()
            if not ask(prometheus, "query", query=query)["result"]
        }
    assert not empty
    rules = ask(prometheus, "rules")["groups"][0]["rules"]
    assert {rule["health"] for rule in rules} == {"ok"}
    # How fast this machine is says nothing of the rules.
    active = {rule["name"] for rule in rules if rule["state"] != "inactive"}
    assert active <= {"CastServeFirstTokenSlow"}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as running:
        yield running


@needs_chromium
def test_page_asks_for_the_key(server, browser):
    page, seen = open_page(browser, server.url)
    field = page.get_by_label("API key", exact=True)
    expect(field).to_be_focused()
    for refused in ("wrong", KEY + "x"):
        field.fill(refused)
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_have_text("The server refuses this key.")
    field.fill(KEY)
    page.get_by_role("button", name="Continue").click()
    expect(page.locator("#status")).to_have_text("ready")
    expect(page.locator("#prompt")).to_be_focused()
    expect(page.get_by_role("region", name="Kernels")).to_contain_text("reference")
    page.locator("#prompt").fill("it was")
    page.keyboard.press("Enter")
    expect(page.locator(".figures")).to_contain_text("first token")
    # Its own answers of 401 are all that the browser complains about.
    assert {said for said in seen.console if "401 (Unauthorized)" not in said} == set()
    page.context.close()


@needs_chromium
def test_page_keeps_the_key_in_memory_only(server, browser):
    page, _ = open_page(browser, server.url)
    page.get_by_label("API key", exact=True).fill(KEY)
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_have_text("ready")
    state = page.context.storage_state(indexed_db=True)
    assert (state["cookies"], state["origins"]) == ([], [])
    assert page.evaluate("() => [localStorage.length, sessionStorage.length]") == [0, 0]
    assert KEY not in page.content()
    assert KEY not in page.url
    page.reload()
    expect(page.get_by_label("API key", exact=True)).to_be_visible()
    expect(page.get_by_label("API key", exact=True)).to_have_value("")
    page.context.close()


@needs_chromium
def test_page_without_the_key(server, browser):
    """Only the charts, for which no key is asked; the dialog can be had again."""
    page, _ = open_page(browser, server.url)
    expect(page.get_by_label("API key", exact=True)).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator("#key-dialog")).to_be_hidden()
    expect(page.locator("#status")).to_have_text("locked")
    expect(page.get_by_role("button", name="Send")).to_be_disabled()
    expect(page.get_by_label(re.compile("Requests, now: running 0"))).to_be_visible()
    unlock = page.get_by_role("button", name="Enter API key")
    expect(unlock).to_be_focused()
    unlock.click()
    page.get_by_role("button", name="Not now").click()
    unlock.click()
    page.get_by_label("API key", exact=True).fill(KEY)
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_have_text("ready")
    expect(unlock).to_be_hidden()
    page.context.close()


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_key_dialog_is_accessible(server, browser, scheme):
    from axe_playwright_python.sync_playwright import Axe

    page, _ = open_page(browser, server.url, color_scheme=scheme, bypass_csp=True)
    page.get_by_label("API key", exact=True).fill("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_have_text("The server refuses this key.")
    assert Axe().run(page).response["violations"] == []
    page.context.close()
