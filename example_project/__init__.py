"""A small Celery project with tasks in perl and shell; run ``python -m example_project``."""
