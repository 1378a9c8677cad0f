"""What the shop keeps."""

from __future__ import annotations

from django.db import models


class Order(models.Model):
    """What somebody bought."""

    reference = models.CharField(max_length=40, unique=True)
    total = models.DecimalField(max_digits=8, decimal_places=2)
    confirmed = models.BooleanField(default=False)
    created = models.DateTimeField(auto_now_add=True)

    def __str__(self) -> str:
        return self.reference
