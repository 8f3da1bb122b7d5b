"""How long until all is as it was after a loss: bounds that follow from the configuration. See docs/operations.md.

Sums of what has to be noticed, started and told, one after the other, each at its slowest; most of it overlaps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from cluster.node.agents import RETRY_START_S
from cluster.node.host_claims import CLAIM_LEASE_S
from cluster.replica.member import RENEW_S
from deployments.config import AppArgs

Loss = Literal["coordinator killed", "coordinator cut off", "agent killed", "replica killed", "node lost"]
LOSSES: tuple[Loss, ...] = get_args(Loss)
# Shares move when an account has lapsed (a lease and its drift), the coordinator has looked (half a lease) and the
# replica asks again (a quarter at most).
SETTLING_LEASES = 2


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What recovery takes that no key of `args:` says. The defaults are Ray's and Ray Serve's, and room for starting.

    `health_check_period_s` is Serve's, of the replica deployment. `node_timeout_s`: when Ray counts a node as dead
    that is silent; five checks, 3 s apart, have 10 s each. `replica_start_s`: a replica's process, its imports, its
    model and the model's self-test; `actor_start_s`: the process of an agent or of the coordinator. `answer_s`: what
    the calls between all of them take together.
    """

    health_check_period_s: float = 10.0
    node_timeout_s: float = 65.0
    replica_start_s: float = 60.0
    actor_start_s: float = 10.0
    answer_s: float = 5.0


def recovery_bounds_s(args: AppArgs, around: Surroundings) -> dict[Loss, float]:
    """Seconds within which every replica serves, has the range that the allocation gives it, and is in its ledger.

    From the loss on; where a coordinator was cut off, from its first answer. A lost node's replicas need another
    that can hold them: the bound counts from when there is one, if that is later.
    """
    report_s = args.telemetry.period_s + args.telemetry.deadline_s
    heard_s = RENEW_S + report_s + around.answer_s
    settled_s = SETTLING_LEASES * args.cluster.lease_s + heard_s
    agent_s = RETRY_START_S + around.actor_start_s + CLAIM_LEASE_S + heard_s
    replica_s = around.health_check_period_s + around.replica_start_s + settled_s
    return {
        "coordinator killed": around.actor_start_s + settled_s,
        "coordinator cut off": settled_s,
        "agent killed": agent_s,
        "replica killed": replica_s,
        "node lost": around.node_timeout_s + agent_s + replica_s,
    }
