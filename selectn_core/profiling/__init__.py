"""The offline stage's measurements, and where they are kept."""
