"""The checks that `gpu_check.py` runs beside tests and bench_interval, each in a process of its own."""
