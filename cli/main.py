"""The `jquant` command."""


def main() -> None:
    raise SystemExit("not yet")
