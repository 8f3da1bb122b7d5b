"""The offline stage: performance records, and the plans that meet objectives by them. No torch."""
