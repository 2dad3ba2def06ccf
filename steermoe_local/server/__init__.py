"""An OpenAI-compatible server with steering per request: `steermoe serve`. Needs the extra `server`.

Imports: everything but cli.
Public: `create_app`, `ServerSettings`, `SteeringRegistry`, `Worker`.
"""

from __future__ import annotations

from .app import create_app
from .registry import SteeringRegistry
from .settings import ServerSettings
from .worker import Worker

__all__ = ["ServerSettings", "SteeringRegistry", "Worker", "create_app"]
