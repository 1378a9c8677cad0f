"""Public packages, unmodified, each by the scenario of its own documentation."""
