"""Figures: what is drawn equals the numbers, read back from the figure's own artists, and files are whole."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from helpers.commands import run
from helpers.tiny_models import LINES, write_tiny
from matplotlib.image import imread
from scipy.stats import entropy

from jquant.calibration import figures

RNG = np.random.default_rng(0)
QKV, OUT, DOWN = "attn_k, attn_q, attn_v", "attn_output", "ffn_down"
INPUTS = {
    (block, label): RNG.lognormal(0, 1, width)
    for block in range(5)
    for label, width in ((QKV, 300), (OUT, 300), (DOWN, 500))
    if (block, label) != (2, OUT)
}


def test_the_importance_map_shows_the_mean_of_every_input():
    figure = figures.importance(INPUTS)
    ax, bar = figure.axes
    (image,) = ax.images
    shown = image.get_array()
    assert shown.shape == (3, 5)
    for (block, label), channels in INPUTS.items():
        np.testing.assert_allclose(shown[[QKV, OUT, DOWN].index(label), block], channels.mean())
    assert np.ma.getmaskarray(shown).nonzero() == (1, 2)  # the block that has no such input
    assert [tick.get_text() for tick in ax.get_yticklabels()] == [QKV, OUT, DOWN]
    assert (ax.get_title(), ax.get_xlabel()) == ("Importance by block and projection", "block")
    assert bar.get_ylabel() == "mean x²"


def test_a_bin_of_the_channel_map_shows_its_largest_channel():
    planted = {key: channels.copy() for key, channels in INPUTS.items()}
    planted[3, DOWN][77] = 500 * np.median(planted[3, DOWN])
    figure = figures.channels(planted)
    panels = [ax for ax in figure.axes if ax.images]
    assert [ax.get_title() for ax in panels] == [QKV, OUT, DOWN]
    down = panels[2].images[0].get_array()
    assert down.shape == (167, 5)  # bins of 3
    assert panels[2].get_ylabel() == "channel (bins of 3)"
    for block in range(5):
        channels = np.append(planted[block, DOWN], 0)
        np.testing.assert_allclose(down[:, block], channels.reshape(-1, 3).max(1) / np.median(channels[:-1]))
    assert np.unravel_index(down.argmax(), down.shape) == (77 // 3, 3)


def test_lines_show_the_share_of_the_top_channels_and_the_entropy():
    share, spread = figures.concentration(INPUTS).axes
    assert [line.get_label() for line in share.lines] == [QKV, OUT, DOWN]
    for i, label in enumerate((QKV, OUT, DOWN)):
        blocks = [block for block, name in INPUTS if name == label]
        channels = [INPUTS[block, label] for block in blocks]
        assert share.lines[i].get_xdata().tolist() == blocks
        top = [sum(sorted(c)[-round(0.01 * len(c)) :]) / sum(c) for c in channels]
        np.testing.assert_allclose(share.lines[i].get_ydata(), top)
        even = [entropy(c) / np.log(len(c)) for c in channels]
        np.testing.assert_allclose(spread.lines[i].get_ydata(), even)
    assert share.get_title() == "Importance held by the top 1% of channels"
    assert (spread.get_title(), spread.get_xlabel()) == ("Entropy of importance over channels", "block")


def test_channels_that_are_all_zero_are_as_even_as_can_be():
    assert figures.top_share(np.zeros(200)) == 0.01
    assert figures.relative_entropy(np.zeros(200)) == 1


def test_super_weights_are_where_they_are_said_to_be():
    weights = [(1, 7, 90, 0.5), (2, 7, 30, 1.5)]
    figure = figures.super_weights(weights, dict.fromkeys(range(4), (64, 128)))
    columns, rows, bar = figure.axes
    for ax, places in ((columns, [(1, 90), (2, 30)]), (rows, [(1, 7), (2, 7)])):
        (points,) = ax.collections
        assert points.get_offsets().tolist() == [list(map(float, place)) for place in places]
        assert points.get_array().tolist() == [0.5, 1.5]
        assert [text.get_text() for text in ax.texts] == [str(place) for _, place in places]
    assert columns.get_title() == "Super weights"
    assert bar.get_ylabel() == "change of the loss without it, nats a token"


def test_nothing_is_drawn_beyond_the_edge(tmp_path):
    for draw in (figures.importance, figures.channels, figures.concentration):
        png, svg = figures.save(draw(INPUTS), tmp_path, draw.__name__)
        pixels = imread(png)
        edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert (edge == 1).all(), draw.__name__
        assert pixels.shape[1] == 1400
        assert ET.parse(svg).getroot().tag.endswith("svg")
        assert QKV in svg.read_text()  # text stays text


def test_the_same_numbers_give_the_same_bytes(tmp_path):
    first = [path.read_bytes() for path in figures.save(figures.importance(INPUTS), tmp_path, "a")]
    assert first == [path.read_bytes() for path in figures.save(figures.importance(INPUTS), tmp_path, "a")]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "llama", "LlamaForCausalLM")


def test_the_command_writes_figures_and_does_not_replace_them(model, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("\n".join(LINES * 4))
    arguments = (
        "analyze",
        model,
        "-c",
        text,
        *("--samples", 3, "--sequence-length", 40),
        "-q",
        "--json",
        "--figures",
        tmp_path / "new" / "figures",
    )
    report = json.loads(run(*arguments).stdout)
    names = {"importance", "channels", "concentration"}
    assert {path.name for path in (tmp_path / "new" / "figures").iterdir()} == {
        f"{name}.{kind}" for name in names for kind in ("png", "svg")
    }
    assert sorted(report["figures"]) == sorted(map(str, (tmp_path / "new" / "figures").iterdir()))
    assert "importance.png: exists; give another name" in run(*arguments, code=4).stderr
    run(*arguments, "--force")


def test_what_stands_in_the_way_of_figures_shows_at_once(model, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    refused = run("analyze", model, "--figures", tmp_path / "file", code=4)
    assert "file: cannot be made" in refused.stderr
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused = run("analyze", model, "--figures", tmp_path / "figures", code=3)
    assert "pip install matplotlib" in refused.stderr
