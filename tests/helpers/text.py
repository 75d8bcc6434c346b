"""Text to calibrate with."""

from jquant.text.samples import Text


def cats(sentences: int) -> Text:
    """So many short sentences that differ in their numbers."""
    words = " ".join(f"the {n} cats sat on {n + 1} mats, and so did I." for n in range(sentences))
    return Text("words", words.encode())


TEXT = cats(400)
