"""The tests of `engine`: real children, turned by the test, without Celery."""
