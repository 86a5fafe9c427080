"""The native engine as a worker of `benchmarks.peers`."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import version

from benchmarks.worker import arguments, serve
from runtime.bench.engine import EngineBench
from runtime.bench.limits import measure_limits
from runtime.bench.precision import DEFAULT_PRECISION


class NativeBench(EngineBench):
    """The engine's own bench, which also measures the machine."""

    def limits(self) -> dict[str, float]:
        """As `benchmarks.worker.MachineLimits`, on as many threads as the engine has."""
        return asdict(measure_limits(self.threads))


def main() -> None:
    """Serves measurements of this project's own engine."""
    parser = arguments("osp-runtime's native engine")
    parser.add_argument("--precision", default=DEFAULT_PRECISION)
    options = parser.parse_args()
    about = {"engine": "osp-runtime, native", "version": version("osp-runtime"), "precision": options.precision}
    serve(lambda: NativeBench(options.shape, options.precision, options.threads), about)


if __name__ == "__main__":
    main()
