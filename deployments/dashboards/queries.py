"""The panels of the dashboard and what each asks Prometheus: the same queries are tested against a real run.

`$rate` stands for the window of a rate; Grafana puts its own in.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.metrics.table import BY_NAME

RATE = "$__rate_interval"


@dataclass(frozen=True, kw_only=True)
class Query:
    """PromQL, and how its series are called; {{label}} is the value of a label."""

    expr: str
    legend: str


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A time line. `unit` is one of Grafana's; `about` says what it shows and what to look for."""

    title: str
    about: str
    unit: str
    queries: tuple[Query, ...]
    most: float | None = None  # of the axis


@dataclass(frozen=True, kw_only=True)
class Section:
    """Panels under one heading."""

    title: str
    panels: tuple[Panel, ...]


def _of(name: str) -> str:
    return BY_NAME[name].exported


def _rate(name: str, suffix: str = "", where: str = "") -> str:
    return f"rate({_of(name)}{suffix}{{{where}}}[{RATE}])"


def _sum_rate(name: str, by: str = "", suffix: str = "", where: str = "") -> str:
    grouping = f" by ({by})" if by else ""
    return f"sum{grouping} ({_rate(name, suffix, where)})"


def _quantile(quantile: float, name: str) -> Query:
    expr = f"histogram_quantile({quantile}, {_sum_rate(name, 'le', '_bucket')})"
    return Query(expr=expr, legend=f"p{round(100 * quantile)}")


def _latency(title: str, name: str, about: str, objective: str | None = None) -> Panel:
    queries = tuple(_quantile(each, name) for each in (0.5, 0.95, 0.99))
    if objective is not None:
        queries += (Query(expr=f"max({_of(objective)})", legend="objective"),)
    return Panel(title=title, about=about, unit="s", queries=queries)


def _gauge(title: str, name: str, unit: str, about: str, legend: str, most: float | None = None) -> Panel:
    return Panel(title=title, about=about, unit=unit, queries=(Query(expr=_of(name), legend=legend),), most=most)


def _mean(name: str) -> str:
    return f"{_sum_rate(name, suffix='_sum')} / {_sum_rate(name, suffix='_count')}"


def _attained(objective: str) -> Query:
    """Of all that were offered, those that met the objective. Of the unserved only those who left may have."""
    name, where = "selectn_slo_requests", f'objective="{objective}"'
    met, had = _or_0(_sum_rate(name, where=f'{where},met="true"')), _or_0(_sum_rate(name, where=where))
    left = 'outcome="cancelled"' if objective == "tpot" else 'met="true"'  # no token of theirs was late
    met_unserved = _or_0(_sum_rate("selectn_ingress_unserved_requests", where=left))
    offered = f"{had} + {_or_0(_sum_rate('selectn_ingress_unserved_requests'))}"
    return Query(expr=f"({met} + {met_unserved}) / (({offered}) > 0)", legend=objective)


def _or_0(expr: str) -> str:
    return f"({expr} or vector(0))"


SECTIONS = (
    Section(
        title="Objectives",
        panels=(
            Panel(
                title="Attainment",
                about="Share of offered requests that met their objectives. Below the target the error budget burns.",
                unit="percentunit",
                queries=tuple(_attained(each) for each in ("both", "ttft", "tpot")),
                most=1.0,
            ),
            Panel(
                title="Error budget burn rate",
                about="Missed share over the share that may be missed (1 %). At 1 the budget lasts exactly its period.",
                unit="none",
                queries=(
                    Query(expr="selectn:slo_burn_rate:5m", legend="5 min"),
                    Query(expr="selectn:slo_burn_rate:1h", legend="1 h"),
                ),
            ),
            Panel(
                title="Goodput",
                about="Output tokens of requests that met both objectives, and of all.",
                unit="short",
                queries=(
                    Query(expr=_sum_rate("selectn_goodput_tokens"), legend="good tokens/s"),
                    Query(expr=_sum_rate("vllm_generation_tokens"), legend="tokens/s"),
                ),
            ),
            _latency(
                "TTFT",
                "vllm_time_to_first_token_seconds",
                "From arrival at the ingress.",
                "selectn_ttft_objective_seconds",
            ),
            _latency(
                "TPOT",
                "vllm_request_time_per_output_token_seconds",
                "A request's mean time per output token.",
                "selectn_tpot_objective_seconds",
            ),
            _latency("ITL", "vllm_inter_token_latency_seconds", "Between two tokens of a request."),
            Panel(
                title="Where the TTFT goes",
                about="Means. Queue: until the request begins. Prefill: to its first token. Framework: the rest of "
                "what the ingress waited for its first text.",
                unit="s",
                queries=(
                    Query(expr=_mean("vllm_request_queue_time_seconds"), legend="queue"),
                    Query(expr=_mean("vllm_request_prefill_time_seconds"), legend="prefill"),
                    Query(
                        expr=f"clamp_min({_mean('selectn_ingress_time_to_first_token_seconds')} - "
                        f"({_mean('vllm_time_to_first_token_seconds')}), 0)",
                        legend="framework",
                    ),
                ),
            ),
        ),
    ),
    Section(
        title="Offloading",
        panels=(
            _gauge(
                "Offloaded units (k)", "selectn_offloaded_units", "none", "Of all units of the model.", "{{WorkerId}}"
            ),
            Panel(
                title="Why k is what it is",
                about="The reason that holds now: memory (requests need it), objective (steps would be too long), "
                "bus share, queue (speed over memory), everything, policy, by hand.",
                unit="none",
                queries=(Query(expr=f"sum by (reason) ({_of('selectn_plan_limited_by')})", legend="{{reason}}"),),
            ),
            Panel(
                title="Weights in host memory only",
                about="Bytes of device memory that other requests can use are these, less the slots.",
                unit="bytes",
                queries=(Query(expr=_of("selectn_offloaded_bytes"), legend="{{WorkerId}}"),),
            ),
            Panel(
                title="Link busy",
                about="Share of time in which the link copied. Near 1 the link decides how long steps take.",
                unit="percentunit",
                queries=(Query(expr=_rate("selectn_link_busy_seconds"), legend="{{WorkerId}}"),),
                most=1.0,
            ),
            Panel(
                title="Link",
                about="What is copied, what the controller measures, and what the coordinator allows.",
                unit="Bps",
                queries=(
                    Query(expr=_rate("selectn_link_copied_bytes"), legend="copied {{WorkerId}}"),
                    Query(expr=_of("selectn_link_measured_bytes_per_second"), legend="measured {{WorkerId}}"),
                    Query(expr=_of("selectn_link_share_bytes_per_second"), legend="allowed {{WorkerId}}"),
                ),
            ),
            Panel(
                title="Stalls",
                about="Share of time in which compute waited for a copy.",
                unit="percentunit",
                queries=(Query(expr=_rate("selectn_stall_seconds"), legend="{{WorkerId}}"),),
            ),
            _latency("Step time", "selectn_step_seconds", "Of an inference iteration."),
            Panel(
                title="Prediction error and cost of deciding",
                about="Mean error of predicted step times; share of step time that steps wait for decisions.",
                unit="percentunit",
                queries=(
                    Query(expr=_of("selectn_prediction_error_ratio"), legend="error {{WorkerId}}"),
                    Query(expr=_of("selectn_controller_share_ratio"), legend="deciding {{WorkerId}}"),
                ),
            ),
        ),
    ),
    Section(
        title="Requests and KV cache",
        panels=(
            Panel(
                title="Requests",
                about="Running, waiting in replicas, and waiting in ingresses for a place.",
                unit="none",
                queries=(
                    Query(expr=f"sum({_of('vllm_num_requests_running')})", legend="running"),
                    Query(expr=f"sum({_of('vllm_num_requests_waiting')})", legend="waiting in replicas"),
                    Query(expr=f"sum({_of('selectn_ingress_waiting_requests')})", legend="waiting for a place"),
                ),
            ),
            Panel(
                title="Admission",
                about="Requests per second by what admission said.",
                unit="reqps",
                queries=(Query(expr=_sum_rate("selectn_admissions", "verdict"), legend="{{verdict}}"),),
            ),
            Panel(
                title="KV cache in use",
                about="Of the tokens that the cache holds now.",
                unit="percentunit",
                queries=(Query(expr=_of("vllm_kv_cache_usage_perc"), legend="{{WorkerId}}"),),
                most=1.0,
            ),
            _gauge(
                "Headroom",
                "selectn_headroom_tokens",
                "short",
                "Tokens that are neither promised nor held.",
                "{{WorkerId}}",
            ),
            Panel(
                title="Preemptions",
                about="Requests per second whose KV was taken from them, and of these those that were swapped.",
                unit="reqps",
                queries=(
                    Query(expr=_sum_rate("vllm_num_preemptions"), legend="preempted"),
                    Query(expr=_sum_rate("selectn_swapped_preemptions"), legend="swapped"),
                ),
            ),
            Panel(
                title="How requests ended",
                about="Per second.",
                unit="reqps",
                queries=(
                    Query(expr=_sum_rate("vllm_request_success", "finished_reason"), legend="{{finished_reason}}"),
                ),
            ),
        ),
    ),
    Section(
        title="Nodes and buses",
        panels=(
            Panel(
                title="Host memory",
                about="What may still be used, and what the ledger has reserved.",
                unit="bytes",
                queries=(
                    Query(expr=_of("selectn_host_memory_available_bytes"), legend="available {{node}}"),
                    Query(expr=_of("selectn_ledger_reserved_bytes"), legend="reserved {{node}}"),
                ),
            ),
            Panel(
                title="Buses",
                about="The most that a bus's replicas may be using.",
                unit="Bps",
                queries=(
                    Query(expr=_of("selectn_coordinator_bus_committed_bytes_per_second"), legend="committed {{bus}}"),
                ),
            ),
            _gauge(
                "Age of the oldest report",
                "selectn_coordinator_report_age_seconds",
                "s",
                "Of a node to the coordinator. It grows while a node, or the way to it, is down.",
                "age",
            ),
            _gauge("Start-up", "selectn_startup_seconds", "s", "By phase, of each replica.", "{{phase}} {{WorkerId}}"),
        ),
    ),
)
PANELS = tuple(panel for section in SECTIONS for panel in section.panels)
