"""deploy/monitoring/prometheus.yml, and where Grafana finds its source and its dashboard."""

import yaml
from deploy_files import DEPLOY, changed

COMPOSE = DEPLOY / "compose" / "compose.yaml"
MONITORING = DEPLOY / "monitoring"
PROMETHEUS = MONITORING / "prometheus.yml"


def test_prometheus(tool):
    """With the alert rules that it names."""
    checked = tool("promtool")("check", "config", PROMETHEUS)
    assert checked.returncode == 0, checked.stderr


def test_promtool_sees_mistakes(tool, tmp_path):
    broken = changed(PROMETHEUS, tmp_path, "static_configs:", "static_config:")
    assert tool("promtool")("check", "config", broken).returncode != 0


def test_targets_are_the_services_of_compose():
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    (job,) = yaml.safe_load(PROMETHEUS.read_text())["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["cast-serve:8000"]}]
    assert "cast-serve" in services
    (source,) = yaml.safe_load(
        (MONITORING / "grafana" / "datasources" / "prometheus.yaml").read_text()
    )["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in services


def test_grafana_finds_the_dashboard():
    (provider,) = yaml.safe_load(
        (MONITORING / "grafana" / "dashboards" / "cast-serve.yaml").read_text()
    )["providers"]
    grafana = yaml.safe_load(COMPOSE.read_text())["services"]["grafana"]
    targets = [mount.split(":")[1] for mount in grafana["volumes"]]
    assert any(target.startswith(provider["options"]["path"] + "/") for target in targets)
    assert grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] in targets
