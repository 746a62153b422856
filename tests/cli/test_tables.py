"""Tables on narrow terminals."""

import io

from rich.console import Console

from moemerge.cli.tables import Table


def printed(table: Table, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, soft_wrap=True)
    console.print(table)
    return console.file.getvalue()


def test_columns_that_do_not_fit_follow_below_and_no_word_is_broken():
    table = Table("model", "mathematics", "programming", "mean")
    table.add_row("merged", "2.366 (10.65)", "1.234 (3.43)", "1.8")
    table.add_row("wörld", "-", "", "\x1b")
    assert printed(table, 40) == (
        "model   mathematics    programming\n"
        "merged  2.366 (10.65)  1.234 (3.43)\n"
        "wörld   -\n"
        "\n"
        "model   mean\n"
        "merged  1.8\n"
        "wörld   \\x1b\n"
    )
    assert len(printed(table, 80).splitlines()) == 3
    assert "2.366 (10.65)" in printed(table, 8)
