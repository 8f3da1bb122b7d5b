"""Interval selection and offload execution: the algorithm and the engine. Imports no Ray."""
