"""`jquant evaluate`: what it prints and writes, what it keeps, and what it refuses."""

from __future__ import annotations

import csv
import json
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from helpers.commands import attempt
from helpers.converted import convert
from helpers.tiny_models import LINES, write_tiny

from jquant.core import UserError
from jquant.evaluation import _compare as comparison
from jquant.evaluation.engines import FlaxEngine

SMALL = ("--context", 32, "--engine", "jax", "--no-cache", "-q")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_tiny(folder / "llama", "LlamaForCausalLM")
    (folder / "text.txt").write_text("\n".join(LINES * 4))
    convert(folder / "llama", folder / "llama-f32.gguf")
    for kind in ("Q8_0", "Q4_0"):
        path = folder / f"llama-{kind}.gguf"
        assert attempt("quantize", folder / "llama", path, "-t", kind, "--pure", "-q").exit_code == 0
    question = {
        "question": "What jumps?",
        "choices": {"text": ["the fox", "a | house"], "label": ["A", "B"]},
        "answerKey": "A",
    }
    (folder / "arc.jsonl").write_text("\n".join([json.dumps(question)] * 3))
    return folder


def evaluate(folder: Path, *arguments: object, code: int = 0):
    files = ("llama-f32.gguf", "llama-Q8_0.gguf", "llama-Q4_0.gguf")
    result = attempt(
        "evaluate", *(folder / file for file in files), "--text", folder / "text.txt", *SMALL, *arguments
    )
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def written(folder, tmp_path_factory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("out")
    options = [(f"--{kind}", out / kind) for kind in ("csv", "markdown", "html")]
    flat = [part for option in options for part in option]
    result = evaluate(folder, *flat, "--choices", folder / "arc.jsonl", "--json")
    return {"json": result.stdout} | {kind.lstrip("-"): path.read_text() for kind, path in options}


def test_the_json_has_every_figure_with_its_error(written):
    report = json.loads(written["json"])
    original, q8, q4 = report["files"]
    assert (report["engine"], report["text"], report["context"]) == ("jax", "text.txt", 32)
    assert report["chunks"] == report["chunks_in_text"] > 10
    assert original["tokens"] == report["chunks"] * 15
    assert "kld_mean" not in original
    for row in (q8, q4):
        assert 0 < row["kld_median"] < row["kld_99"] <= row["kld_999"] <= row["kld_max"]
        for name in ("perplexity", "kld_mean", "top1", "delta_p_mean", "delta_p_rms", "accuracy"):
            assert row[f"{name}_se"] >= 0
            assert np.isfinite(row[name])
        assert row["questions"] == 3
    assert q8["kld_mean"] < q4["kld_mean"]
    assert q8["top1"] > q4["top1"]
    assert [kind["type"] for kind in q4["types"]] == ["Q4_0", "F32"]
    assert q4["bpw"] < q8["bpw"] < original["bpw"] == 32
    assert len(q4["bpw_by_block"]) == 2


def test_the_csv_has_the_same_figures(written):
    rows = list(csv.DictReader(written["csv"].splitlines()))
    for row, wanted in zip(rows, json.loads(written["json"])["files"], strict=True):
        assert row["file"] == wanted["file"]
        for name in ("perplexity", "kld_mean", "kld_999", "delta_p_rms_se", "accuracy_normalized"):
            assert row[name] == ("" if name not in wanted else str(wanted[name]))


def test_the_markdown_is_a_table_of_one_width(written):
    lines = [line for line in written["markdown"].splitlines() if line.startswith("|")]
    assert len(lines) == 5
    assert len({line.count("|") for line in lines}) == 1
    assert "text.txt" in written["markdown"].splitlines()[-1]


def test_the_page_is_well_formed_and_needs_nothing_beside_it(written):
    page = written["html"]
    root = ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>\n"))
    assert {element.tag for element in root.iter()}.isdisjoint({"script", "link", "img", "iframe", "object"})
    addresses = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attrs):
            addresses.extend(v for k, v in attrs if k in ("src", "href", "data", "xlink:href"))

    Parser().feed(page)
    assert not addresses
    assert "url(" not in page
    assert "@import" not in page
    assert page.replace('xmlns="http://www.w3.org/2000/svg"', "").count("http") == 0


def test_the_page_has_a_figure_of_each_kind_with_all_candidates(written):
    root = ElementTree.fromstring(written["html"].removeprefix("<!DOCTYPE html>\n"))
    svg = "{http://www.w3.org/2000/svg}"
    drawn = {figure.get("aria-label"): figure for figure in root.iter(f"{svg}svg")}
    assert len(list(drawn["distribution of KL divergence"].iter(f"{svg}polyline"))) == 2
    assert len(list(drawn["size and mean KL divergence"].iter(f"{svg}circle"))) == 2
    titles = {title.text for title in drawn["bits by layer of llama-Q4_0"].iter(f"{svg}title")}
    assert "blk.1.ffn_down.weight: Q4_0, 4.50 bits" in titles
    assert len(titles) == 14
    for figure in drawn.values():  # nothing lies outside
        width, height = map(float, str(figure.get("viewBox")).split()[2:])
        for dot in figure.iter(f"{svg}circle"):
            assert 0 <= float(str(dot.get("cx"))) <= width
            assert 0 <= float(str(dot.get("cy"))) <= height


def test_a_name_with_markup_in_it_stays_text(folder, tmp_path):
    odd = tmp_path / "a<b>&|.gguf"
    odd.write_bytes((folder / "llama-Q8_0.gguf").read_bytes())
    arguments = ("--text", folder / "text.txt", *SMALL, "--html", tmp_path / "r.html")
    assert attempt("evaluate", folder / "llama-f32.gguf", odd, *arguments).exit_code == 0
    page = (tmp_path / "r.html").read_text()
    ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>\n"))
    assert "a&lt;b&gt;&amp;|" in page


def test_a_file_and_itself_do_not_diverge(folder):
    file, text = folder / "llama-f32.gguf", folder / "text.txt"
    result = attempt("evaluate", file, file, "--text", text, *SMALL, "--json")
    original, same = json.loads(result.stdout)["files"]
    assert same["kld_mean"] < 1e-8
    assert same["top1"] == 1
    assert same["perplexity"] == original["perplexity"]


def test_a_folder_and_its_gguf_file_have_the_same_figures(folder):
    result = attempt(
        "evaluate", folder / "llama", folder / "llama-f32.gguf", "--text", folder / "text.txt",
        "--context", 32, "--no-cache", "-q", "--json",
    )  # fmt: skip
    report = json.loads(result.stdout)
    assert report["engine"] == "jax"
    assert report["files"][1]["kld_mean"] < 1e-8


def test_the_originals_predictions_are_made_once(folder, tmp_path, monkeypatch):
    runs = []
    logits = FlaxEngine.logits

    def counted(self, *arguments):
        runs.append(1)
        return logits(self, *arguments)

    monkeypatch.setattr(FlaxEngine, "logits", counted)
    files = [folder / "llama-f32.gguf", folder / "llama-Q8_0.gguf"]
    arguments = ("--text", folder / "text.txt", "--engine", "jax", "--cache-dir", tmp_path, "-q", "--json")
    reports = [attempt("evaluate", *files, *arguments, "--context", 32) for _ in range(2)]
    assert len(runs) == 3
    first, second = (json.loads(report.stdout)["files"] for report in reports)
    assert first == second
    assert len(list(tmp_path.iterdir())) == 1
    assert attempt("evaluate", *files, *arguments, "--context", 16).exit_code == 0
    assert len(runs) == 5
    assert len(list(tmp_path.iterdir())) == 2


def test_only_the_first_chunks_are_scored_and_that_is_said(folder):
    shown = evaluate(folder, "--chunks", 2)
    assert "text.txt: 2 of " in shown.stdout
    assert " chunks of 32 tokens" in shown.stdout


def test_without_a_hub_the_end_of_pydoc_is_scored_with_a_warning(folder, monkeypatch):
    def unreachable(repo, name):
        raise UserError("the hub cannot be reached.")

    monkeypatch.setattr("jquant.io.hub.dataset_file", unreachable)
    arguments = ("--context", 32, "--engine", "jax", "--no-cache", "--chunks", 2)
    result = attempt("evaluate", folder / "llama-f32.gguf", *arguments)
    assert result.exit_code == 0, result.output
    warning = "warning: the hub cannot be reached. Evaluating on the last quarter of Python's manual pages"
    assert warning in result.stderr
    assert "the last quarter of pydoc: 2 of " in result.stdout


def test_the_check_fails_a_file_that_the_original_would_not_write_like(folder, tmp_path):
    files = folder / "llama-f32.gguf", folder / "llama-Q8_0.gguf"
    other = convert(write_tiny(tmp_path / "other", "LlamaForCausalLM", seed=1), tmp_path / "other.gguf")
    arguments = ("--check", "--no-text", "--threads", 1, "--html", tmp_path / "r.html", "--json", "-q")
    result = attempt("evaluate", *files, other, *arguments)
    assert result.exit_code == 5, result.output
    _, q8, failed = json.loads(result.stdout)["files"]
    assert q8["coherent"]
    assert q8["coherence_likeness"] > 0.8
    assert failed["coherence_likeness"] < 0.3
    (line,) = result.stderr.splitlines()
    assert line.startswith("jquant: other: makes no sense when it writes")
    assert "the original would not write what it writes" in line
    ElementTree.fromstring((tmp_path / "r.html").read_text().removeprefix("<!DOCTYPE html>\n"))


def test_what_a_user_can_mend_is_one_line(folder, tmp_path):
    other = write_tiny(tmp_path / "other", "Qwen2ForCausalLM", tokenizer="gpt-2")
    small = write_tiny(tmp_path / "small", "LlamaForCausalLM", vocab_size=410)
    mxint = write_tiny(tmp_path / "int8", "LlamaForCausalLM", quantization_config={"quant_method": "int8"})
    (tmp_path / "short.txt").write_text("Too short.")
    (tmp_path / "there.csv").write_text("x")
    (tmp_path / "bad.jsonl").write_text('{"question": "?"}')
    file, text = folder / "llama-f32.gguf", folder / "text.txt"
    cases = [
        ((file, tmp_path / "absent.gguf"), 3, "absent.gguf"),
        ((file, other), 3, "its token "),
        ((file, small), 3, "has a vocabulary of 410 tokens"),
        ((file, mxint), 3, "quantization_config"),
        ((file, "--text", tmp_path / "short.txt"), 3, "fewer than one chunk of 32"),
        ((file, "--text", tmp_path / "absent.txt"), 3, "absent.txt: cannot be read"),
        ((file, "--csv", tmp_path / "there.csv"), 4, "exists"),
        ((file, "--html", tmp_path / "no" / "r.html"), 4, "does not exist"),
        ((file, "--choices", tmp_path / "bad.jsonl"), 3, "bad.jsonl, line 1: expected"),
        ((file, "--engine", "torch"), 3, "choose from jax, llama.cpp"),
        ((folder / "llama", "--engine", "llama.cpp"), 3, "reads GGUF files only"),
        ((folder / "llama", "--check"), 3, "reads GGUF files only"),
    ]
    for arguments, code, message in cases:
        given = arguments if "--text" in arguments else (*arguments, "--text", text)
        given = given if "--engine" in given or "--check" in given else (*given, "--engine", "jax")
        result = attempt("evaluate", *given, "--context", 32, "--no-cache", "-q")
        assert result.exit_code == code, result.output
        assert message in result.stderr, result.stderr
        assert len(result.stderr.splitlines()) == 1, result.stderr


def test_names_of_unused_tokens_do_not_matter(folder):
    a = comparison.open_file(folder / "llama-f32.gguf")
    last = len(a.tokens) - 1
    types = (*a.token_types[:last], 5)
    b = comparison.File(a.path, True, a.specs, a.nbytes, a.identity, [*a.tokens[:last], "[PAD]"], types)
    comparison.check_vocabularies([a, b])
    c = comparison.File(a.path, True, a.specs, a.nbytes, a.identity, [*a.tokens[:last], "x"], a.token_types)
    with pytest.raises(UserError, match=f"its token {last} is 'x'"):
        comparison.check_vocabularies([a, c])
