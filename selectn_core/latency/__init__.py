"""How long steps take: the recurrence, what goes into it, and where it places units. No torch."""
