"""The Grafana dashboard, built with Grafana's own foundation SDK from `queries.py`.

The built JSON is kept beside this file, so that only whoever changes a panel needs the SDK (the extra `dashboards`).
"""

from __future__ import annotations

import json
from pathlib import Path

from deployments.dashboards.queries import SECTIONS, Panel

UID, TITLE = "selectn", "Select-N"
BUILT = Path(__file__).with_name("selectn_grafana_dashboard.json")
HEIGHT, WIDTH = 8, 8


def built() -> str:
    """The dashboard as JSON. Raises ImportError without the SDK."""
    from grafana_foundation_sdk.builders import dashboard as builders
    from grafana_foundation_sdk.cog.encoder import JSONEncoder

    source = builders.DatasourceVariable("datasource").type("prometheus").label("Data source")
    board = (
        builders.Dashboard(TITLE)
        .uid(UID)
        .description("Latency objectives, offloading, admission and buses of a Select-N application.")
        .tags(["ray", "selectn"])
        .time("now-30m", "now")
        .refresh("10s")
        .with_variable(source)
    )
    for section in SECTIONS:
        board = board.with_row(builders.Row(section.title))
        for panel in section.panels:
            board = board.with_panel(_panel(panel))
    return json.dumps(json.loads(JSONEncoder(sort_keys=True).encode(board.build())), indent=1, sort_keys=True) + "\n"


def _panel(panel: Panel):  # type: ignore[no-untyped-def]  # the SDK is not there for type checkers
    from grafana_foundation_sdk.builders import prometheus, timeseries
    from grafana_foundation_sdk.models.dashboard import DataSourceRef

    made = (
        timeseries.Panel()
        .title(panel.title)
        .description(panel.about)
        .unit(panel.unit)
        .min(0)
        .height(HEIGHT)
        .span(WIDTH)
        .datasource(DataSourceRef(type_val="prometheus", uid="${datasource}"))
    )
    if panel.most is not None:
        made = made.max(panel.most)
    for query in panel.queries:
        made = made.with_target(prometheus.Dataquery().expr(query.expr).legend_format(query.legend))
    return made
