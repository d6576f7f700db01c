"""`c2c serve`: a pair behind the OpenAI API."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cache2cache.cli import pair as options
from cache2cache.cli.extras import need
from cache2cache.cli.listening import bind, only_this_machine, url

if TYPE_CHECKING:
    from cache2cache.serve.engine import Engine
    from cache2cache.serve.settings import ServeSettings

KEYS_VARIABLE = "C2C_API_KEYS"

_GIB = 1 << 30
_SERVER, _LOAD = "Server", "Load"


def serve(
    receiver: options.Receiver = options.DEMO_RECEIVER,
    sharer: options.Sharers = None,
    fuser: options.Fusers = None,
    no_sharer: options.NoSharer = False,
    mode: options.Mode = "parallel",
    host: Annotated[
        str,
        typer.Option(help="Address to listen at. Others than this machine need keys.", rich_help_panel=_SERVER),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen at; 0 takes a free one.", rich_help_panel=_SERVER)
    ] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help="API keys, one per line.",
            show_default=f"${KEYS_VARIABLE}, or nobody needs one",
            rich_help_panel=_SERVER,
        ),
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=0.001, help="Seconds after which a request is given up.", rich_help_panel=_SERVER)
    ] = 600,
    notice: Annotated[
        float,
        typer.Option(
            min=0,
            help="Seconds for which it is served on after SIGTERM while /ready says no already.",
            rich_help_panel=_SERVER,
        ),
    ] = 0,
    grace: Annotated[
        float,
        typer.Option(min=0, help="Seconds that running requests then have to end.", rich_help_panel=_SERVER),
    ] = 30,
    engine: Annotated[
        Literal["transformers", "vllm"],
        typer.Option(help="What answers are written with.", rich_help_panel=_LOAD),
    ] = "transformers",
    vllm_option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="An option of vLLM's engine, such as tensor_parallel_size=2; repeat for several.",
            show_default="vLLM's own",
            rich_help_panel=_LOAD,
        ),
    ] = None,
    max_choices: Annotated[
        int,
        typer.Option(
            min=1,
            help="Most answers that one request may ask for; never more than --max-waiting.",
            rich_help_panel=_LOAD,
        ),
    ] = 16,
    max_batch: Annotated[
        int, typer.Option(min=1, help="Most answers that are written at a time.", rich_help_panel=_LOAD)
    ] = 16,
    max_waiting: Annotated[
        int, typer.Option(min=1, help="Most answers that wait; more are refused.", rich_help_panel=_LOAD)
    ] = 64,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.", rich_help_panel=_LOAD)] = 1024,
    cache_memory: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="GiB for caches of running requests; with vLLM, for those on their way to it.",
            show_default="no limit",
            rich_help_panel=_LOAD,
        ),
    ] = None,
    prefix_memory: Annotated[
        float,
        typer.Option(
            min=0, help="GiB for conversations that are kept for requests that go on with them.", rich_help_panel=_LOAD
        ),
    ] = 0,
    sharer_token_file: options.SharerTokenFile = None,
    sharer_key_file: options.SharerKeyFile = None,
    sharer_precision: options.SharerPrecision = None,
    sharer_timeout: options.SharerTimeout = None,
    on_sharer_failure: options.OnSharerFailure = "fail",
    device: options.Device = "cpu",
    sharer_device: options.SharerDevice = None,
    dtype: options.Dtype = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Serve a pair to clients of the OpenAI API.

    Without options the demo pair answers, to this machine only. Models are listed at /v1/models: the pair, its receiver
    alone, each sharer alone. Logs are JSON on stderr.
    """
    need("c2c serve", "serve", ("fastapi", "uvicorn", "prometheus_client"))
    vllm_options = _vllm_options(engine, vllm_option, prefix_memory)
    from cache2cache.serve.admission import Limits
    from cache2cache.serve.keys import Keys
    from cache2cache.serve.settings import ServeSettings

    keys = Keys.load(KEYS_VARIABLE, api_key_file)
    if keys is None and not only_this_machine(host):
        raise typer.BadParameter(f"--host {host} lets other machines in: give --api-key-file, or ${KEYS_VARIABLE}")
    bound = bind(host, port)  # before anything is loaded: a port that is taken is told at once
    pair = options.load_pair(
        receiver,
        sharer,
        fuser,
        no_sharer=no_sharer,
        mode=mode,
        device=device,
        sharer_device=sharer_device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        elsewhere=options.Elsewhere(
            sharer_token_file, sharer_key_file, sharer_precision, sharer_timeout, on_sharer_failure
        ),
    )
    names = tuple(Path(name).name for name in options.complete(receiver, sharer, fuser, no_sharer)[1])
    settings = ServeSettings(
        fusers=names, keys=keys, max_choices=max_choices, timeout=timeout, notice=notice, grace=grace
    )
    memory = None if cache_memory is None else int(cache_memory * _GIB)
    limits = Limits(max_batch, max_waiting, memory, max_new_tokens)
    if engine == "vllm":
        from cache2cache.serve.vllm.engine import VllmEngine

        _run(VllmEngine(pair, limits, options=vllm_options), settings, bound)
    else:
        from cache2cache.serve.embedded import TransformersEngine

        _run(TransformersEngine(pair, limits, prefix_bytes=int(prefix_memory * _GIB)), settings, bound)


def _vllm_options(engine: str, given: Sequence[str] | None, prefix_memory: float) -> dict[str, Any]:
    """NAME=VALUE as vLLM takes them: values are JSON, or else text."""
    if engine != "vllm":
        if given:
            raise typer.BadParameter("--vllm-option needs --engine vllm")
        return {}
    need("c2c serve --engine vllm", "vllm", ["vllm"])
    if prefix_memory:
        raise typer.BadParameter("--prefix-memory is of --engine transformers: vLLM keeps prefixes in its own cache")
    found: dict[str, Any] = {}
    for option in given or ():
        name, equals, value = option.partition("=")
        if not equals or not name.isidentifier():
            raise typer.BadParameter(f"--vllm-option {option}: must be NAME=VALUE")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def _run(engine: Engine, settings: ServeSettings, bound: socket.socket) -> None:
    from cache2cache.serve import logs
    from cache2cache.serve.app import create_app
    from cache2cache.serve.server import Server

    logs.to_stderr()
    logs.log.info("serving", extra={"fields": {"url": f"{url(bound)}/v1"}})
    Server(create_app(engine, settings)).run([bound])
