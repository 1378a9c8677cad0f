"""The tests on real brokers."""
