"""What is made from the table of metrics: a Grafana dashboard, rules for Prometheus, and a page of documentation."""
