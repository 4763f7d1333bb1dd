"""Clients of models that run elsewhere. One file per protocol; so far the one that nearly everything speaks."""

from giong.clients.openai_compatible import RemoteModel
from giong.clients.spend import SpendLedger

__all__ = ["RemoteModel", "SpendLedger"]
