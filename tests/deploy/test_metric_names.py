"""Every metric that an alert or a panel names is exported by something."""

import ast
import json
import re
from itertools import chain
from pathlib import Path

import pytest

from gllm_ray.strict_yaml import read_documents
from tests.deploy.manifests import DEPLOY

MONITORING = DEPLOY / "components" / "monitoring"
PROTOCOLS = ("http", "grpc")
SERIES = ("_bucket", "_sum", "_count")  # of a histogram


def rule_expressions():
    (rules,) = read_documents(MONITORING / "prometheusrule.yaml")
    return [rule["expr"] for group in rules["spec"]["groups"] for rule in group["rules"]]


def panel_expressions():
    dashboard = json.loads((MONITORING / "gllm_ray.json").read_text(encoding="utf-8"))
    panels = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    variables = [item["query"] for item in dashboard["templating"]["list"]]
    return panels + [item["query"] for item in variables if isinstance(item, dict)]


def named_metrics(expression):
    """The metrics in an expression: Ray's, which all begin with `ray_`, and Prometheus' own."""
    return set(re.findall(r"\bray_\w+|\bup\b", expression))


def exported_by_the_service():
    observability = pytest.importorskip("gllm_ray.serving.observability")
    for name, kind in observability.METRICS.items():
        full_name = f"ray_{observability.METRIC_PREFIX}{name}"
        is_histogram = kind.make is observability.Histogram
        yield from (full_name + series for series in SERIES) if is_histogram else [full_name]


def exported_by_ray_serve():
    """Names in Ray Serve's source: `Counter("serve_x")` is exported as `ray_serve_x_total`."""
    serve = pytest.importorskip("ray.serve")
    for path in Path(serve.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            function = getattr(node, "func", None)
            kind = getattr(function, "attr", None) or getattr(function, "id", None)
            if isinstance(node, ast.Call) and kind in ("Counter", "Gauge", "Histogram"):
                first = node.args[0] if node.args else None
                given = [word.value for word in node.keywords if word.arg == "name"]
                for name in spelled(given[0] if given else first):
                    suffixes = {"Counter": ["_total"], "Gauge": [""], "Histogram": SERIES}[kind]
                    yield from (f"ray_{name}{suffix}" for suffix in suffixes)


def spelled(node):
    """The names that an expression may stand for; an f-string has the protocol in it."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        return [
            "".join(part.value if isinstance(part, ast.Constant) else word for part in node.values)
            for word in PROTOCOLS
        ]
    return []


def test_every_metric_of_alerts_and_dashboard_exists():
    named = set(chain.from_iterable(map(named_metrics, rule_expressions() + panel_expressions())))
    exported = {*exported_by_the_service(), *exported_by_ray_serve(), "up"}
    assert len(named) > 10
    assert named - exported == set()


def test_every_panel_asks_for_a_metric():
    assert all(map(named_metrics, rule_expressions() + panel_expressions()))


def test_the_readme_lists_every_metric_of_the_service():
    observability = pytest.importorskip("gllm_ray.serving.observability")
    text = (DEPLOY / "README.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `ray_gllm_ray_(\w+)` \|", text, re.MULTILINE))
    assert listed == set(observability.METRICS)
