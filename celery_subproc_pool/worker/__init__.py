"""Celery's side: what turns task messages into jobs of the engine, and outcomes into callbacks.

It may import all folders and Celery. `tasks`, which web processes import to send tasks, must bring
neither the engine nor `celery.worker` along.

Read `pool` first: what Celery calls. Then `jobs`: what `apply_async` returns.
"""
