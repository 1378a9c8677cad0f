"""Speed and memory, measured side by side: ``tox -e bench``, or ``python -m benchmarks --help``.

Needs RabbitMQ and Redis on 127.0.0.1. What is compared runs in turn, round by round, in workers
that are all up at the same time; what is reported is ratios. ``docs/performance.md`` tells what
they mean.
"""
