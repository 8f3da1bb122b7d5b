"""Node agents, coordinator and bus allocation: what makes several replicas one system (docs/architecture.md)."""
