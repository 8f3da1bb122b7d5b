"""What is measured for operators: one table of metrics, and the Ray metrics made from it."""
