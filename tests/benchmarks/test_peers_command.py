"""`python -m benchmarks.peers` as a whole, with processes of made-up engines: what it writes, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import peers
from benchmarks.peer_environments import OURS, InstallError, Peer
from benchmarks.worker_process import WorkerProcess

ENGINE = """
import sys
from benchmarks.worker import serve

class Bench:
    rate = float(sys.argv[1])
    def decode(self, batch, context, tokens):
        return self.rate * batch
    def prefill(self, tokens):
        raise MemoryError("no room")
    def close(self):
        pass

class OurBench(Bench):
    def limits(self):
        return {"read_GBps": 24.0, "dot_GOPS": 1254.0}

serve(OurBench if sys.argv[2] == "osp" else Bench, {"engine": f"made-up {sys.argv[2]}"})
"""
RATES = {"osp": 3000, "whole": 1000, "products": 1500}


@pytest.fixture(autouse=True)
def made_up_engines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def start(peer: Peer, shape: str, threads: int) -> WorkerProcess:
        assert (shape, threads) == ("demo", 1)
        command = [sys.executable, "-c", ENGINE, str(RATES[peer.name]), peer.name]
        return WorkerProcess(peer.name, command, tmp_path / f"{peer.name}.log", directory=peers.ROOT)

    made_up = {name: Peer(name, "none", whole_model=name == "whole") for name in ("whole", "products")}
    monkeypatch.setattr(peers, "PEERS", made_up)
    monkeypatch.setattr(peers, "start_worker", start)


def run(tmp_path: Path, *options: str) -> tuple[int, str]:
    out = ("--out", str(tmp_path / "new" / "table.json"), "--shape", "demo", "--threads", "1", "--rounds", "2")
    result = CliRunner().invoke(peers.main, [*out, *options])
    return result.exit_code, result.output


def test_rows_are_measured_and_written(tmp_path: Path) -> None:
    status, output = run(tmp_path, "--peers", "whole,products", "--rows", "decode-1*")
    assert status == 0, output
    told = json.loads((tmp_path / "new" / "table.json").read_text())
    assert told["engines"]["products"]["engine"] == "made-up products"
    assert told["engines"]["osp"]["rss_MB"] > 5
    short, long, many = told["rows"]
    assert [row["name"] for row in told["rows"]] == ["decode-1", "decode-1-long", "decode-16"]
    assert short["ratios"] == pytest.approx({"whole": 3, "products": 2})
    assert short["limits"] == 2 * [{"read_GBps": 24.0, "dot_GOPS": 1254.0}]
    assert long["ratios"] == pytest.approx({"whole": 3})  # products have no context
    assert many["medians"]["whole"] == pytest.approx(16_000)
    assert (tmp_path / "new" / "table.md").read_text().strip() in output


def test_what_was_measured_stays_where_a_later_row_fails(tmp_path: Path) -> None:
    status, output = run(tmp_path, "--peers", "whole", "--rows", "[dp]*[25]")
    assert status == 1
    assert "Error: osp: MemoryError: no room" in output
    assert not (tmp_path / "new" / "table.json").exists()
    status, output = run(tmp_path, "--peers", "whole", "--rows", "*[18252]")
    assert status == 1
    assert [row["name"] for row in json.loads((tmp_path / "new" / "table.json").read_text())["rows"]] == [
        "decode-1",
        "decode-8",
    ]


def test_unknown_names_are_refused_with_those_that_there_are(tmp_path: Path) -> None:
    assert "no peer is called fast; there are: whole, products" in run(tmp_path, "--peers", "whole,fast")[1]
    assert "no row is called x; there are: decode-1," in run(tmp_path, "--peers", "whole", "--rows", "x")[1]


def test_what_pip_cannot_install_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    peer = Peer("broken", "none", whole_model=False, requirements=("./not-there",))
    assert not peer.installed(tmp_path)
    with pytest.raises(InstallError, match=r"(?s)broken cannot be installed; .*not-there.*--peers"):
        peer.install(tmp_path)
    assert not peer.installed(tmp_path)


def test_an_environment_is_made_anew_where_the_wishes_change(tmp_path: Path) -> None:
    wheel = tmp_path / "nothing-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("nothing.py", "answer = 42")
        archive.writestr("nothing-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: nothing\nVersion: 1\n")
        archive.writestr("nothing-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("nothing-1.dist-info/RECORD", "")
    peer = Peer("local", "none", whole_model=False, requirements=(str(wheel),))
    peer.install(tmp_path)
    assert peer.installed(tmp_path)
    code = "import nothing, sys; print(nothing.answer, sys.prefix)"
    printed = subprocess.run([peer.python(tmp_path), "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed == f"42 {tmp_path / 'local' / 'venv'}\n"
    assert not replace(peer, requirements=(str(wheel), "more")).installed(tmp_path)
    assert not replace(peer, build_settings={"CMAKE_ARGS": "-DMORE=ON"}).installed(tmp_path)


def test_an_engine_of_the_project_needs_no_environment(tmp_path: Path) -> None:
    assert OURS.installed(tmp_path)
    assert OURS.python(tmp_path) == Path(sys.executable)
