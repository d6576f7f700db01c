"""`c2c share`: a sharer as a service, for pairs on other machines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cache2cache.cli import pair as options
from cache2cache.cli.extras import need
from cache2cache.cli.listening import bind, only_this_machine, url

TOKENS, KEY = "C2C_SHARE_TOKENS", "C2C_SHARE_KEY"
"""Environment variables, instead of the files."""


def share(
    model: Annotated[str, typer.Argument(help="The sharer: a catalogue name, a hub id or a folder.")],
    host: Annotated[
        str, typer.Option(help="Address to listen at. Others than this machine need tokens.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 takes a free one.")] = 8100,
    token_file: Annotated[
        Path | None,
        typer.Option(help="Bearer tokens, one per line.", show_default=f"${TOKENS}, or nobody needs one"),
    ] = None,
    key_file: Annotated[
        Path | None,
        typer.Option(help="Key to sign caches with, shared with the pairs.", show_default=f"${KEY}, or not signed"),
    ] = None,
    max_rows: Annotated[int, typer.Option(min=1, help="Prompts read at once.", rich_help_panel="Limits")] = 16,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens read at once.", rich_help_panel="Limits")] = 16_384,
    max_waiting: Annotated[int, typer.Option(min=1, help="Requests that wait.", rich_help_panel="Limits")] = 64,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds per request.", rich_help_panel="Limits")] = 60.0,
    device: options.Device = "cpu",
    dtype: options.Dtype = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Run a sharer as a service; pairs name it with --sharer http://host:port.

    Conversations are sent to it, so put it behind TLS where others can read the network.
    """
    need("c2c share", "serve", ["fastapi", "uvicorn", "prometheus_client"])
    from cache2cache.serve.keys import Keys, secret

    keys, key = Keys.load(TOKENS, token_file), secret(KEY, key_file)
    if keys is None and not only_this_machine(host):
        raise typer.BadParameter(f"--host {host} lets other machines in: give --token-file, or ${TOKENS}")
    bound = bind(host, port)  # before anything is loaded: a port that is taken is told at once
    with options.Busy(f"loading {model}"):
        options.quiet_transformers()
        options.check_device(device)
        from cache2cache.models.load import load
        from cache2cache.serve.node import NodeSettings, create_node

        lm = load(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        app = create_node(
            lm,
            NodeSettings(
                max_rows=max_rows,
                max_tokens=max_tokens,
                max_waiting=max_waiting,
                timeout=timeout,
                keys=keys,
                signing_key=None if key is None else key.encode(),
            ),
        )
    from cache2cache.serve import logs
    from cache2cache.serve.server import Server

    logs.to_stderr()
    logs.log.info("sharing", extra={"fields": {"url": url(bound), "model": lm.card.id}})
    Server(app).run([bound])
