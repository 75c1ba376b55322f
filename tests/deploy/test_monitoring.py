"""The alert rules and the dashboard, as far as they can be judged without a server."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

FOLDER = Path(__file__).parents[2] / "deploy" / "monitoring"
RULES = FOLDER / "alerts.yml"
CASES = FOLDER / "alerts.test.yml"
DASHBOARD = json.loads((FOLDER / "grafana-dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="needs promtool, of Debian's package prometheus"
)


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *arguments], capture_output=True, text=True, cwd=FOLDER)


@needs_promtool
def test_rules_are_right():
    checked = promtool("check", "rules", "--lint-fatal", RULES.name)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@needs_promtool
def test_rules_fire_when_they_should():
    tested = promtool("test", "rules", CASES.name)
    assert tested.returncode == 0, tested.stdout + tested.stderr


@needs_promtool
def test_the_cases_can_fail(tmp_path):
    """A rule that never fires does not pass."""
    (tmp_path / CASES.name).write_text(CASES.read_text())
    (tmp_path / RULES.name).write_text(RULES.read_text().replace("== 0\n", "== 2\n"))
    tested = promtool("test", "rules", str(tmp_path / CASES.name))
    assert tested.returncode == 1
    assert "CastServeDown" in tested.stdout + tested.stderr


def test_every_alert_is_tested():
    alerts = {
        rule["alert"]
        for group in yaml.safe_load(RULES.read_text())["groups"]
        for rule in group["rules"]
    }
    fired = {
        case["alertname"]
        for test in yaml.safe_load(CASES.read_text())["tests"]
        for case in test["alert_rule_test"]
        if case.get("exp_alerts")
    }
    assert fired == alerts


def test_panels_do_not_overlap():
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (place["x"] + column, place["y"] + row)
            for column in range(place["w"])
            for row in range(place["h"])
        }
        assert place["x"] + place["w"] <= 24, panel["title"]
        assert not cells & taken, panel["title"]
        taken |= cells


def test_panels_are_told_apart():
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in PANELS:
        letters = [target["refId"] for target in panel["targets"]]
        assert len(set(letters)) == len(letters), panel["title"]


def test_queries_use_variables_that_there_are():
    declared = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?([a-z]\w*)", json.dumps(DASHBOARD)))
    assert used == declared


@needs_promtool
def test_queries_are_promql(tmp_path):
    """Each as a recording rule, with Grafana's variables filled in."""
    rules = [
        {"record": f"q{index}", "expr": target["expr"].replace("$__rate_interval", "1m")}
        for index, target in enumerate(t for panel in PANELS for t in panel["targets"])
    ]
    file = tmp_path / "queries.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    checked = promtool("check", "rules", str(file))
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{len(rules)} rules found" in checked.stdout
