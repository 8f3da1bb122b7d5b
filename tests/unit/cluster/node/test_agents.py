"""Which agents are started and stopped, whatever nodes do."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from cluster.node.agents import AgentChanges, plan_changes

node_sets = st.sets(st.sampled_from("abcdef"))


@given(nodes=node_sets, agents=node_sets)
def test_one_decision_brings_them_in_step(nodes, agents):
    changes = plan_changes(nodes, agents, started_s={}, now_s=0)
    assert (set(agents) | set(changes.start)) - set(changes.stop) == nodes
    assert not set(changes.start) & agents
    assert not set(changes.stop) & nodes
    assert len(set(changes.start)) == len(changes.start)


@given(nodes=node_sets)
def test_in_step_nothing_is_done(nodes):
    assert plan_changes(nodes, nodes, started_s={}, now_s=0) == AgentChanges(start=(), stop=())


@given(steps=st.lists(st.tuples(node_sets, node_sets), min_size=1, max_size=12))
def test_whatever_comes_and_dies_it_converges_and_no_start_is_repeated_too_soon(steps):
    """Each step: the nodes there are, and the agents that die before the manager looks."""
    agents: set[str] = set()
    started_s: dict[str, float] = {}
    last_start_s: dict[str, float] = {}
    for now_s, (nodes, dying) in enumerate([*steps, *[(steps[-1][0], set())] * 6]):
        agents -= dying
        changes = plan_changes(nodes, agents, started_s=started_s, now_s=now_s, retry_s=5)
        for node in changes.start:
            assert now_s - last_start_s.get(node, -5) >= 5
            last_start_s[node] = started_s[node] = now_s
        agents = (agents | set(changes.start)) - set(changes.stop)
    assert agents == steps[-1][0]


def test_an_agent_that_does_not_stay_is_started_again_after_a_while():
    def start(now_s: float) -> tuple[str, ...]:
        return plan_changes({"a"}, set(), started_s={"a": 10.0}, now_s=now_s, retry_s=5).start

    assert start(14.9) == ()
    assert start(15.0) == ("a",)
