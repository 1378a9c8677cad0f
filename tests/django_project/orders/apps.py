"""The app's configuration."""

from django.apps import AppConfig


class OrdersConfig(AppConfig):
    """The orders."""

    name = "orders"
