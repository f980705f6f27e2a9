"""How `serve` behaves."""

from __future__ import annotations

from dataclasses import dataclass, field

from sparse_export.serving.settings import ModelSettings
from sparse_export.trust import TrustedDigests


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """How `serve` behaves. A port of 0 is any free one.

    Attributes:
        host: the address to bind to; of this machine alone, unless `expose_unpatched_server`.
        expose_unpatched_server: bind to another address although requests can crash the server.
        http_port: of the inference protocol over HTTP.
        grpc_port: of the inference protocol over gRPC.
        metrics_port: of the metrics page.
        health_port: of the supervisor's health endpoint.
        runtime: `auto` or one of RUNTIMES.
        settings: of the models.
        drain_s: most seconds that requests get after SIGTERM.
        restarts: how many starts may fail within five minutes, after the first one. A server that died
            after it was ready is always started again.
        start_timeout_s: seconds until it must be ready.
        max_body_mb: largest HTTP body in MiB, where the server can limit it.
        trust: digests passed with --trust.
    """

    host: str = "127.0.0.1"
    expose_unpatched_server: bool = False
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    health_port: int = 8003
    runtime: str = "auto"
    settings: ModelSettings = field(default_factory=ModelSettings)
    drain_s: float = 30.0
    restarts: int = 3
    start_timeout_s: float = 120.0
    max_body_mb: int = 64
    trust: TrustedDigests = None
