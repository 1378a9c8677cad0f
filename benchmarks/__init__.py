"""Speed and memory, measured side by side: ``tox -e bench``, or ``python -m benchmarks --help``.

Needs RabbitMQ and Redis on 127.0.0.1. The workers that are compared are all up at the same time.
They run their loads in turn, round by round. The report has ratios; ``docs/performance.md`` says
what they mean.
"""
