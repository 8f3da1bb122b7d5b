"""docs/metrics.md, made from the table: `selectn dashboards reference`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cluster.metrics.table import COORDINATOR, GENAI, INGRESS, NODE, REPLICA, VLLM, Metric

HEAD = """\
# Metrics

This page is made from `cluster/metrics/table.py`: run `selectn dashboards reference > docs/metrics.md` after a change.

Ray's metrics agent exports every metric on each node, with its own labels (`WorkerId`, `NodeAddress`, `SessionName`).
Names below are those in Prometheus. A histogram has `_bucket`, `_sum` and `_count` behind its name.

- Labels are bounded. A label has at most 64 values; later ones count as `other`. No label comes from a request.
- Metrics are published once a second by a thread that serves nothing. A request that ends shows up within a second, and
  in Ray's export a few seconds later.
- A counter never goes back while its process lives. After a restart it begins at 0 with another `WorkerId`.
- A gauge without a value is not set. Its last value leaves Ray's export after some tens of seconds.
- An ingress counts offered requests that no engine has had. A replica counts those that its engine has had. Together
  they are everything that was offered, each once (`docs/algorithm.md` says what counts as offered).

`selectn dashboards install` puts a Grafana dashboard and Prometheus rules where they are found. The chapter
[Watching it](operations.md#watching-it) says how.
"""

SECTIONS: tuple[tuple[str, str, Sequence[Metric]], ...] = (
    (
        "vLLM's names",
        "They have vLLM's names, meanings and buckets, so that Ray's own Serve LLM dashboard and rules made for vLLM "
        "work without change. Token buckets end at 100,000.",
        VLLM,
    ),
    ("Replicas", "Each replica has the label `model_name`.", REPLICA),
    (
        "OpenTelemetry's GenAI names",
        "Replicas export them with `telemetry.genai_metrics: true`. The conventions are in development and may change.",
        GENAI,
    ),
    ("Ingresses", "", INGRESS),
    ("Nodes", "Each node's agent has the label `node`, the Ray node's id. See [Node telemetry](telemetry.md).", NODE),
    ("The coordinator", "", COORDINATOR),
)


def reference_page() -> str:
    """The page, as Markdown."""
    return HEAD + "".join("".join(_section(*section)) for section in SECTIONS)


def _section(title: str, says: str, metrics: Sequence[Metric]) -> Iterator[str]:
    yield f"\n## {title}\n\n"
    if says:
        yield f"{says}\n\n"
    yield "| metric | type | unit | labels | |\n|---|---|---|---|---|\n"
    for metric in metrics:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        yield f"| `{metric.exported}` | {metric.kind} | {metric.unit} | {labels} | {metric.means} |\n"
