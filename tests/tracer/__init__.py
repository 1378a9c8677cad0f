"""A tracer by itself: what it reads and what it writes."""
