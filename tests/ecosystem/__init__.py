"""Public packages, unmodified, in the scenarios of their own documentation."""
