"""sparse-export serve"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_export.cli._click import click
from sparse_export.cli._common import json_option, print_result, require_bundles, say
from sparse_export.cli._serving import model_options

if TYPE_CHECKING:
    from sparse_export.serving.process import Ports
    from sparse_export.serving.settings import ModelSettings
    from sparse_export.serving.supervise import Loaded


def _port(name: str, default: int, what: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return click.option(
        f"--{name}-port",
        type=click.IntRange(0, 65535),
        default=default,
        show_default=True,
        help=f"{what} 0: any that is free.",
    )


@click.command("serve")
@click.argument(
    "bundles",
    metavar="BUNDLE...",
    nargs=-1,
    type=click.Path(path_type=Path),
)
@click.option(
    "--install-server", is_flag=True, help="Install the pinned server into a folder of its own, once."
)
@click.option(
    "--name",
    "names",
    multiple=True,
    metavar="NAME",
    help="Name of a bundle's model; once for each bundle, in order.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address that every port is bound to.")
@click.option(
    "--expose-unpatched-server",
    is_flag=True,
    help="Let --host be reached by others, although requests can crash the server.",
)
@_port("http", 8000, "Port of the protocol over HTTP.")
@_port("grpc", 8001, "Port of the protocol over gRPC.")
@_port("metrics", 8002, "Port of Triton's metrics.")
@_port("health", 8003, "Port of /ready and /live, which know of the drain.")
@click.option("--runtime", default="auto", show_default=True, help="auto, tensorrt, onnxruntime or python.")
@model_options
@click.option(
    "--drain",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    help="Seconds that running requests get on SIGTERM.",
)
@click.option(
    "--restarts",
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
    help="Starts within five minutes that may fail after the first one.",
)
@click.option(
    "--start-timeout",
    type=click.FloatRange(min=1),
    default=120.0,
    show_default=True,
    help="Seconds that the server has to become ready.",
)
@click.option(
    "--max-body-mb",
    type=click.IntRange(1, 2047),
    default=64,
    show_default=True,
    help="Size limit of an HTTP body, where the server can limit it.",
)
@click.option(
    "--trust",
    multiple=True,
    metavar="SHA256",
    help="Vouch for the files of a bundle from elsewhere, by its manifest's hash; may be repeated.",
)
@json_option
@click.pass_context
def command(
    context: click.Context,
    bundles: tuple[Path, ...],
    install_server: bool,
    names: tuple[str, ...],
    host: str,
    expose_unpatched_server: bool,
    http_port: int,
    grpc_port: int,
    metrics_port: int,
    health_port: int,
    runtime: str,
    settings: ModelSettings,
    drain: float,
    restarts: int,
    start_timeout: float,
    max_body_mb: int,
    trust: tuple[str, ...],
    as_json: bool,
) -> None:
    """Serve BUNDLEs on this machine with Triton, each held to its golden answer first.

    SIGTERM and Ctrl-C drain the server and end it; SIGHUP makes changed bundles a new version. The exit code
    is the server's.
    """
    from dataclasses import asdict

    from sparse_export.serving.exposure import require_loopback

    if bundles:  # before the imports that take seconds
        require_loopback(host, exposed=expose_unpatched_server)
        require_bundles(*bundles)

    from sparse_export.cli._serving import paired
    from sparse_export.serving.serve_options import ServeOptions
    from sparse_export.serving.server_files import install_server as install
    from sparse_export.serving.supervise import serve

    if install_server:
        folder = install(say)
        if not bundles:
            print_result({"server": str(folder)}, str(folder), as_json)
            return
    if not bundles:
        raise click.UsageError("Missing argument 'BUNDLE...', or --install-server.")

    def on_ready(ports: Ports, pid: int, loaded: tuple[Loaded, ...]) -> None:
        document = {"ports": asdict(ports), "server_pid": pid, "models": [asdict(one) for one in loaded]}
        models = ", ".join(one.name for one in loaded)
        text = (
            f"ready: {models} on {ports.host}, HTTP {ports.http}, gRPC {ports.grpc}, metrics "
            f"{ports.metrics}, "
            f"health {ports.health}"
        )
        print_result(document, text, as_json)

    options = ServeOptions(
        host=host,
        expose_unpatched_server=expose_unpatched_server,
        http_port=http_port,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        health_port=health_port,
        runtime=runtime,
        settings=settings,
        drain_s=drain,
        restarts=restarts,
        start_timeout_s=start_timeout,
        max_body_mb=max_body_mb,
        trust=trust,
    )
    context.exit(serve(bundles, paired(bundles, names), options, say=say, on_ready=on_ready))
