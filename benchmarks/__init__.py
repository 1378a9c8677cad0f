"""Speed and memory, measured side by side: ``tox -e bench``, or ``python -m benchmarks --help``.

Needs RabbitMQ and Redis on 127.0.0.1. The workers that are compared are all up at the same time.
They run their loads in turn, round by round. The report has ratios; ``docs/performance.md`` says
what they mean.

A few scenarios alone, in two minutes: external tasks beside a hand-written side process, with and
without stored results and receivers of signals::

    python -m benchmarks --only "external, rabbitmq, -c 8" --rounds 3
"""
