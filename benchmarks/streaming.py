"""What serving costs: tokens a second over HTTP, streamed, beside those of the engine alone, in turns.

    python -m benchmarks.streaming --model demo --streams 16 --tokens 200 --rounds 5

Both run the same prompts through the same engine in a process of its own: once in `LocalEngine.generate`, with nobody
but an event loop to take the tokens, and once in `osp serve`, with a client that opens a connection a stream and reads
server-sent events. The client parses nothing while it measures: it takes bytes, and counts tokens and events
afterwards, since it shares the machine with the server.
"""

from __future__ import annotations

import asyncio
import json
import selectors
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

import click

from runtime.engine.base import GenerationRequest, SamplingParams
from runtime.engine.registry import load_engine
from runtime.model_store import resolve_model

PROMPT = tuple(range(100, 116))


async def offline_rate(model: str, streams: int, tokens: int, rounds: int) -> None:
    """Prints the engine's tokens a second, one line a line of its input: the worker of `offline`."""
    engine = load_engine("native", resolve_model(model))

    async def run(name: str, count: int) -> None:
        request = GenerationRequest(name, PROMPT, SamplingParams(max_tokens=count, temperature=0))
        async for _ in engine.generate(request):
            pass

    await run("warm-up", 16)
    click.echo("ready")
    for number in range(rounds):
        sys.stdin.readline()
        began = time.perf_counter()
        await asyncio.gather(*(run(f"{number}-{stream}", tokens) for stream in range(streams)))
        click.echo(streams * tokens / (time.perf_counter() - began))
    await engine.shutdown(0)


def http_rate(port: int, model: str, streams: int, tokens: int) -> tuple[float, float]:
    """Tokens a second over HTTP, and tokens an event.

    Raises:
        RuntimeError: a stream has not given as many tokens as were asked for.
    """
    body = json.dumps(
        {
            "model": model,
            "prompt": list(PROMPT),
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode()
    answers: dict[socket.socket, list[bytes]] = {}
    with selectors.DefaultSelector() as selector:
        began = time.perf_counter()
        for _ in range(streams):
            opened = socket.create_connection(("127.0.0.1", port))
            opened.sendall(head + body)
            answers[opened] = []
            selector.register(opened, selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select():
                connection = key.fileobj
                assert isinstance(connection, socket.socket)
                if part := connection.recv(1 << 16):
                    answers[connection].append(part)
                else:
                    selector.unregister(connection)
                    connection.close()
        seconds = time.perf_counter() - began
    events = 0
    for parts in answers.values():
        texts = [json.loads(line[6:]) for line in b"".join(parts).split(b"\n") if line.startswith(b"data: {")]
        if not texts or texts[-1]["usage"]["completion_tokens"] != tokens:
            raise RuntimeError(f"a stream has not given {tokens} tokens: {b''.join(parts)[:500]!r}")
        events += len(texts) - 1
    return streams * tokens / seconds, streams * tokens / events


@contextmanager
def serving(model: str) -> Iterator[int]:
    """`osp serve` in a process of its own; gives its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    command = [sys.executable, "-m", "runtime.cli", "serve", model, "--engine", "native", "--port", str(port)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5).close()
                break
            except OSError:
                if process.poll() is not None:
                    raise RuntimeError(f"the server has ended with exit code {process.returncode}") from None
                time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait()


@contextmanager
def offline(model: str, streams: int, tokens: int, rounds: int) -> Iterator[subprocess.Popen[str]]:
    """The engine alone in a process of its own, which measures once for each line that it gets."""
    arguments = [f"--model={model}", f"--streams={streams}", f"--tokens={tokens}", f"--rounds={rounds}", "--offline"]
    command = [sys.executable, "-m", "benchmarks.streaming", *arguments]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise RuntimeError("the engine has not started")
        yield process
    finally:
        process.kill()
        process.wait()


@click.command()
@click.option("--model", default="demo", show_default=True)
@click.option("--streams", default=16, show_default=True)
@click.option("--tokens", default=200, show_default=True, help="Tokens a stream.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--offline", "is_worker", is_flag=True, hidden=True)
def main(model: str, streams: int, tokens: int, rounds: int, *, is_worker: bool) -> None:
    """Tokens a second of the engine alone and over HTTP, in turns."""
    if is_worker:
        asyncio.run(offline_rate(model, streams, tokens, rounds))
        return
    alone, served, sizes = [], [], []
    with offline(model, streams, tokens, rounds) as engine, serving(model) as port:
        assert engine.stdin is not None
        assert engine.stdout is not None
        http_rate(port, model, streams, 16)
        for _ in range(rounds):
            engine.stdin.write("\n")
            engine.stdin.flush()
            alone.append(float(engine.stdout.readline()))
            rate, size = http_rate(port, model, streams, tokens)
            served.append(rate)
            sizes.append(size)
            click.echo(f"alone {alone[-1]:7.0f}   served {rate:7.0f} tokens/s   {rate / alone[-1]:.2f}", err=True)
    share = median(http / engine_rate for http, engine_rate in zip(served, alone, strict=True))
    click.echo(
        f"{streams} streams: {median(alone):.0f} tokens/s alone, {median(served):.0f} served, {share:.2f} of it;"
        f" {median(sizes):.2f} tokens an event"
    )


if __name__ == "__main__":
    main()
