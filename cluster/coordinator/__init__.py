"""The coordinator: a pure state machine, and the Ray actor around it."""
