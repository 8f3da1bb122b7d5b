"""The process behind `nvml.Sampler`: a sample as a line of JSON for every line of input."""

from __future__ import annotations

import json
import sys
import threading
from dataclasses import asdict

from cluster.node.bus_topology import BusConfig
from cluster.node.telemetry import Telemetry, TelemetryConfig


def main() -> None:
    options = json.loads(sys.argv[1])
    buses = tuple(BusConfig(**{**bus, "gpus": tuple(bus.get("gpus", ()))}) for bus in options.pop("buses", ()))
    with Telemetry(TelemetryConfig(buses=buses, **options)) as telemetry:
        for _ in sys.stdin:
            report = asdict(telemetry.sample())
            print(json.dumps({**report, "num_threads": threading.active_count()}), flush=True)


if __name__ == "__main__":
    main()
