"""Every figure in README and docs comes from a script here; each has `--quick`, `--json FILE` and checks."""
