"""The native engine as a worker of `benchmarks.peers`."""

from __future__ import annotations

from importlib.metadata import version

from benchmarks.worker import arguments, serve
from runtime.bench.engine import EngineBench


def main() -> None:
    """Serves measurements of this project's own engine."""
    options = arguments("osp-runtime's native engine")
    about = {"engine": "osp native", "version": version("osp-runtime"), "precision": options.precision}
    serve(lambda: EngineBench(options.shape, options.precision, options.threads), about)


if __name__ == "__main__":
    main()
