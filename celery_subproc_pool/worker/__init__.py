"""Celery's side: makes jobs of the engine of task messages, and Celery's callbacks of outcomes.

It may import all folders and Celery.

Read `pool` first: what Celery calls. Then `runner`: one job from `apply_async` to its end; and
`jobs`: what `apply_async` returns.
"""
