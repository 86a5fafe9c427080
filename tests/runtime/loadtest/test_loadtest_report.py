"""The report says what the result says, in both forms, whatever the result's texts are."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
from report_reader import Page, Tables, markdown_tables, numbers
from report_result import comparison

from runtime.loadtest.report import to_html, to_markdown

HEADLINE = "Medians of the repeats; A / B with its 95 % interval"
CLOSE = 0.006
"""Three digits: half of the last one may be lost."""

Reader = Callable[[dict[str, Any]], Tables]


@pytest.fixture(scope="module")
def unchanged() -> dict[str, Any]:
    return comparison()


@pytest.fixture
def result(unchanged: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(unchanged)


@pytest.fixture(params=["html", "markdown"])
def read(request: pytest.FixtureRequest) -> Reader:
    """What a form of the report has for tables."""
    if request.param == "html":
        return lambda result: Page.read(to_html(result)).tables
    return lambda result: markdown_tables(to_markdown(result))


def row(table: dict[str, list[str]], start: str) -> list[str]:
    """The row of that name, or the one whose name begins so."""
    if start in table:
        return table[start]
    (found,) = (cells for name, cells in table.items() if name.startswith(start))
    return found


@pytest.mark.parametrize(
    ("name", "key", "unit"),
    [
        ("Output throughput tokens/s", "output_throughput", 1),
        ("Requests requests/s", "request_throughput", 1),
        ("Requests within the SLO", "request_goodput", 1),
        ("Time to first token (TTFT), median", "median_ttft_ms", 1),
        ("TTFT, p99", "p99_ttft_ms", 1),
        ("Time per output token (TPOT), median", "median_tpot_ms", 1),
        ("TPOT, p99", "p99_tpot_ms", 1),
        ("Inter-token latency (ITL), p99", "p99_itl_ms", 1),
        ("Whole request (E2EL), median", "median_e2el_ms", 1),
        ("Peak resident memory", "peak_rss_MB", 1),
        ("Weight files", "weight_bytes", 1e6),
        ("Time to load", "load_seconds", 1),
    ],
)
def test_headline_has_both_sides_and_the_ratio(
    result: dict[str, Any], read: Reader, name: str, key: str, unit: float
) -> None:
    table = {re.sub(r"[()]", "", row_name): cells for row_name, cells in read(result)[HEADLINE].items()}
    a, b, ratio = row(table, re.sub(r"[()]", "", name))
    assert numbers(a) == pytest.approx([result["A"][key] / unit], rel=CLOSE)
    assert numbers(b) == pytest.approx([result["B"][key] / unit], rel=CLOSE)
    expected = [value for value in result["ratio"][key].values() if value is not None]
    assert numbers(ratio) == pytest.approx(expected, rel=CLOSE)


def test_perplexity_has_four_digits(result: dict[str, Any], read: Reader) -> None:
    a, b, ratio = row(read(result)[HEADLINE], "Perplexity")
    assert (a, b, ratio.split()[0]) == ("31.40", "29.91", "1.050")


def test_every_point_of_the_sweep(result: dict[str, Any], read: Reader) -> None:
    result["A"]["sweep"].reverse()  # bisection comes after doubling: the order is that of measuring
    table = read(result)["One row a rate"]
    keys = ("completed", "output_throughput", "median_ttft_ms", "p99_ttft_ms", "p99_tpot_ms")
    for letter in ("A", "B"):
        rates = [numbers(name)[0] for name in table if name.startswith(letter)]
        assert rates == sorted(rates)
        for point in result[letter]["sweep"]:
            (cells,) = (
                cells
                for name, cells in table.items()
                if name.startswith(letter) and numbers(name)[0] == pytest.approx(point["request_rate"], rel=CLOSE)
            )
            assert [numbers(cell)[0] for cell in cells[:5]] == pytest.approx([point[key] for key in keys], rel=CLOSE)
            assert cells[5] == ("yes" if point["meets_slo"] else "no")


def test_limits(result: dict[str, Any], read: Reader) -> None:
    table = read(result)["Limits found by the sweep"]
    for letter in ("A", "B"):
        most, at, rate, goodput = row(table, f"{letter}: ")
        assert numbers(most) == pytest.approx([result[letter]["saturation"]["output_throughput"]], rel=CLOSE)
        assert at == "closed loop"
        held = result[letter]["max_rate_at_slo"]
        assert numbers(rate) + numbers(goodput) == pytest.approx(list(held.values()), rel=CLOSE)


def test_all_latencies(result: dict[str, Any], read: Reader) -> None:
    table = read(result)["Milliseconds, medians of the repeats"]
    statistics = ("mean", "std", "median", "p90", "p95", "p99")
    for name in ("TTFT", "TPOT", "ITL", "E2EL"):
        for letter in ("A", "B"):
            expected = [result[letter][f"{statistic}_{name.lower()}_ms"] for statistic in statistics]
            cells = row(table, f"{name}, {letter}")
            assert [numbers(cell)[0] for cell in cells] == pytest.approx(expected, rel=CLOSE)


def test_every_repeat(result: dict[str, Any], read: Reader) -> None:
    table = read(result)["One row a repeat"]
    keys = ("completed", "failed", "output_throughput", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms")
    for letter in ("A", "B"):
        for number, repeat in enumerate(result[letter]["repeats"], 1):
            cells = row(table, f"{number}, {letter}")
            assert [numbers(cell)[0] for cell in cells] == pytest.approx([repeat[key] for key in keys], rel=CLOSE)


def test_quality_checks_and_machine(result: dict[str, Any], read: Reader) -> None:
    tables = read(result)
    quality = tables["Perplexity on one text, answers to the same prompts"]
    assert row(quality, "Tokens of the text") == ["69,399"]
    assert row(quality, "Answers that are the same") == ["17 of 64"]
    assert row(quality, "Share of tokens") == ["56.1 %"]
    assert row(tables["The client and the servers"], "A: w4a4") == ["11.8 %", "1.27", "yes"]
    assert row(tables["What was served"], "Kernel") == ["avx512_vnni"] * 2
    machine = tables["The machine"]
    assert row(machine, "cpu") == ["Intel(R) Xeon(R) Processor @ 2.10GHz"]
    assert row(machine, "memory GB") == ["25.3"]
    assert row(machine, "flags") == ["avx2, avx512f, avx512_vnni"]
    workload = tables["The workload"]
    assert (row(workload, "seed"), row(workload, "burstiness")) == (["20261125"], ["1"])
    assert row(workload, "slo") == ["TTFT at most 2,000 ms, TPOT at most 150 ms"]


def test_commands_stand_there_as_they_were_given(result: dict[str, Any]) -> None:
    result["commands"] = ["osp bench load 'a b' --x ```", "osp serve <model> | tee log"]
    assert Page.read(to_html(result)).texts["code"] == result["commands"]
    markdown = to_markdown(result)
    assert "````\nosp bench load 'a b' --x ```\n````\n" in markdown
    assert "```\nosp serve <model> | tee log\n```\n" in markdown


def test_a_valid_run_has_no_banner(result: dict[str, Any]) -> None:
    assert "not valid:" not in to_html(result) + to_markdown(result)


def test_an_invalid_run_says_so_first_and_why(result: dict[str, Any]) -> None:
    result |= {"valid": False, "invalid_reasons": ["A: 12 of 200 requests failed", "B: the client was late"]}
    page = Page.read(to_html(result))
    assert [element.tag for element in page.elements if element.attributes.get("role") == "alert"] == ["div"]
    assert page.texts["p"][1] == "This run is not valid: do not quote its figures."
    assert page.texts["li"][:2] == result["invalid_reasons"]
    markdown = to_markdown(result)
    assert markdown.index("not valid: do not quote") < markdown.index("tokens/s")
    assert "> - A: 12 of 200 requests failed\n> - B: the client was late\n" in markdown


def test_one_side_alone(result: dict[str, Any], read: Reader) -> None:
    result |= {"B": None, "ratio": {}}
    result["quality"] = {"perplexity": {"A": 31.402, "B": None, "ratio": None, "tokens": 99}, "token_agreement": None}
    tables = read(result)
    headline = tables["Medians of the repeats"]
    assert headline[""] == ["A: w4a4"]
    assert numbers(row(headline, "Output throughput")[0]) == pytest.approx(
        [result["A"]["output_throughput"]], rel=CLOSE
    )
    assert row(headline, "Perplexity") == ["31.40"]
    for name in ("One row a repeat", "One row a rate", "Milliseconds, medians of the repeats"):
        assert not [key for key in tables[name] if "B" in key]
    assert "A / B" not in to_html(result) + to_markdown(result)


def test_what_is_missing_is_said_with_its_reason(result: dict[str, Any], read: Reader) -> None:
    result["quality"] = {"unavailable": "the server gives no logprobs"}
    for letter in ("A", "B"):
        result[letter] |= {"sweep": [], "saturation": None, "max_rate_at_slo": None}
        for repeat in result[letter]["repeats"]:
            del repeat["samples"]
    tables = read(result)
    assert row(tables[HEADLINE], "GPU memory") == ["not measured"] * 3
    assert row(tables[HEADLINE], "Throughput at saturation")[:2] == ["not measured"] * 2
    assert all("the server gives no logprobs" in cell for cell in row(tables[HEADLINE], "Perplexity")[:2])
    for text in (to_html(result), to_markdown(result)):
        assert "Not measured: no rates were swept." in text
        assert "not measured, the result holds no samples." in text
    assert "<figure>" not in to_html(result)


def test_a_part_of_quality_may_be_missing(result: dict[str, Any], read: Reader) -> None:
    result["quality"] |= {"token_agreement": None, "reasons": ["B does not tell token ids"]}
    quality = read(result)["Perplexity on one text, answers to the same prompts"]
    assert "B does not tell token ids" in row(quality, "Answers that are the same")[0]
    assert row(quality, "Perplexity, A") == ["31.40"]


def test_servers_that_count_differently_or_not_at_all(result: dict[str, Any], read: Reader) -> None:
    result["A"]["server_metrics"] = {"agrees": False, "differences": ["9 tokens | 8 tokens"], "checked": ["tokens"]}
    result["B"]["server_metrics"] = {"agrees": None, "differences": [], "checked": []}
    result["B"] |= {"kernel": None, "threads": None}  # a server that was there already
    tables = read(result)
    checks = tables["The client and the servers"]
    assert row(checks, "A: w4a4")[2].startswith("no")
    assert "9 tokens | 8 tokens" in row(checks, "A: w4a4")[2]
    assert row(checks, "B: bfloat16")[2].startswith("not measured")
    assert row(tables["What was served"], "Kernel") == ["avx512_vnni", "not known"]


def test_a_run_that_was_cut_off(result: dict[str, Any], read: Reader) -> None:
    """Ctrl-C in the first repeat of B: it has no figures at all."""
    a_only = {key: value for key, value in result["B"].items() if not re.match(r"(mean|median|std|p\d+)_", key)}
    for key in ("completed", "failed", "output_throughput", "request_throughput", "request_goodput"):
        del a_only[key]
    result["B"] = a_only | {"repeats": [], "sweep": [], "saturation": None, "max_rate_at_slo": None}
    result |= {"ratio": {}, "valid": False, "invalid_reasons": ["interrupted by Ctrl-C"]}
    assert row(read(result)[HEADLINE], "Output throughput")[1:] == ["not measured"] * 2
